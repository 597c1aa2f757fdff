"""Pairs that a file lists, wherever they are."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nafnet_core import InputError
from pipelines.packed import Packed
from pipelines.sources.base import PairRef, checked, refuse_shared
from pipelines.sources.remote import AnyPath, beside, text_lines
from pipelines.urls import is_url

LIST_SUFFIXES = (".csv", ".jsonl")
_COLUMNS = ("lq", "gt", "scene", "split", "key")


@dataclass(frozen=True, kw_only=True)
class ListedPairs:
    """A CSV file with a header, or JSON lines: `lq` and `gt`, and if need be `scene`, `split` and `key`.

    Paths are relative to the list's folder, or absolute. The scene is, if not given, the sharp file's folder;
    a line with another `split` than the one asked for is left out. A sharp file, or a scene that the list
    names, must not be in two of its splits.
    """

    path: AnyPath
    split: str
    adapter = "list"
    licence = "unknown"

    def options(self) -> dict[str, Any]:
        return {"path": str(self.path), "split": self.split}

    def pairs(self) -> Packed[PairRef]:
        refs: Packed[PairRef] = Packed()
        # Scenes and sharp files, ours and the other splits'.
        named: tuple[Packed[str], Packed[str]] = Packed(), Packed()
        sharp: tuple[Packed[str], Packed[str]] = Packed(), Packed()
        for number, row in self._rows():
            unknown = sorted(set(row) - set(_COLUMNS))
            if unknown or not row.get("lq") or not row.get("gt"):
                is_header = self.path.suffix == ".csv" and (unknown or not {"lq", "gt"} <= set(row))
                raise InputError(
                    "line 1, the header, names other columns" if is_header else f"line {number} is no pair",
                    file=self.path,
                    expected="lq and gt, if need be scene, split and key",
                    got=", ".join(sorted(row) if is_header else unknown) or row,
                )
            lq, gt = (beside(self.path.parent, row[side]) for side in ("lq", "gt"))
            is_other = row.get("split", "") not in ("", self.split)
            if row.get("split"):
                sharp[is_other].append(str(gt))
                named[is_other].extend([row["scene"]] if row.get("scene") else [])
            if is_other:
                continue
            key = row.get("key") or _key_of(row["lq"])
            refs.append(PairRef(key=key, scene=row.get("scene") or str(gt.parent), lq=lq, gt=gt))
        if not refs:
            raise InputError(f"no pairs of split {self.split} in this list", file=self.path)
        refuse_shared(*named, what="scenes", file=self.path)
        refuse_shared(*sharp, what="sharp images", file=self.path)
        return checked(refs, file=self.path)

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Each line's number and its columns."""
        lines = text_lines(self.path)
        if self.path.suffix == ".csv":
            for number, row in enumerate(csv.DictReader(lines), start=2):
                # Cells beyond the header come under None, cells that lack are None.
                cells = {str(name).strip(): cell for name, cell in row.items() if cell is not None}
                yield number, {name: str(cell).strip() for name, cell in cells.items()}
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"line {number} is not JSON", file=self.path, got=error) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"line {number} is no pair", file=self.path, expected="an object", got=line[:80]
                )
            yield number, {name: str(value) for name, value in row.items() if value is not None}


def _key_of(lq: str) -> str:
    path = urlsplit(lq).path if is_url(lq) else lq
    return Path(path).with_suffix("").as_posix().lstrip("/")
