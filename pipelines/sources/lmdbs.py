"""Pairs in two LMDBs as BasicSR writes them: encoded images under the names that `meta_info.txt` lists."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lmdb

from nafnet_core import InputError
from pipelines.images import MAX_MEGAPIXELS, Photo, read_photo
from pipelines.packed import Packed, matched
from pipelines.sources.base import PairRef
from pipelines.sources.remote import AnyPath, text_lines

META = "meta_info.txt"
_PICKLE_MAGIC = b"\x80"
_SHOWN = 3
_OPENING = threading.Lock()


@dataclass(frozen=True, slots=True)
class LmdbImage:
    """One encoded image in an LMDB."""

    path: Path
    key: str

    def __str__(self) -> str:
        return f"{self.path}#{self.key}"

    def read_photo(self, *, max_megapixels: float = MAX_MEGAPIXELS) -> Photo:
        """Decode it. Raises `InputError` where it is missing, no image, or damaged."""
        with opened_lmdb(self.path).begin(buffers=True) as transaction:
            value = transaction.get(self.key.encode())
            if value is None:
                raise InputError("listed, but not in the LMDB", file=str(self))
            refuse_pickle(value, self.path)
            return read_photo(bytes(value), name=str(self), max_megapixels=max_megapixels)

    def size_bytes(self) -> int:
        """Length of the value, -1 where it is missing."""
        with opened_lmdb(self.path).begin(buffers=True) as transaction:
            value = transaction.get(self.key.encode())
            return -1 if value is None else len(value)

    def read_bytes(self, start: int, count: int) -> bytes:
        """A part of the value."""
        with opened_lmdb(self.path).begin(buffers=True) as transaction:
            return bytes(transaction.get(self.key.encode(), b"")[start : start + count])


@dataclass(frozen=True, kw_only=True)
class LmdbPairs:
    """Two LMDBs with the same keys.

    The scene is the key's folder; else the key, without the `_s012` of sub-images cut from one picture.
    """

    lq_dir: Path
    gt_dir: Path
    adapter = "lmdb"
    licence = "unknown"

    def options(self) -> dict[str, Any]:
        return {"lq_dir": str(self.lq_dir), "gt_dir": str(self.gt_dir)}

    def pairs(self) -> Packed[PairRef]:
        refs: Packed[PairRef] = Packed()
        num_lonely, shown = 0, []
        for key, lq, gt in matched(_keys(self.lq_dir), _keys(self.gt_dir)):
            if lq and gt:
                scene = key.rpartition("/")[0] or re.sub(r"_s\d+$", "", key)
                images = (LmdbImage(root, key) for root in (self.lq_dir, self.gt_dir))
                refs.append(PairRef(key=key, scene=scene, lq=next(images), gt=next(images)))
                continue
            num_lonely += 1
            shown += [key] if num_lonely <= _SHOWN else []
        if num_lonely:
            raise InputError(
                f"{num_lonely} images without a partner of the same key",
                file=", ".join(shown),
                expected=f"{len(refs)} pairs found, and nothing left over",
            )
        return refs


def is_lmdb(path: AnyPath) -> bool:
    """Whether a folder is an LMDB."""
    return path.is_dir() and (path / "data.mdb").is_file()


def _keys(root: Path) -> Iterator[tuple[str, None]]:
    """Keys that `meta_info.txt` lists, in lines such as `0001_s003.png (480,480,3) 1`."""
    meta = root / META
    if not meta.is_file():
        with opened_lmdb(root).begin(buffers=True) as transaction, transaction.cursor() as cursor:
            if cursor.first():
                refuse_pickle(cursor.value(), root)
        raise InputError("an LMDB without a list of its images", file=meta, expected="a line an image")
    name = None
    for name in (line.split(" (")[0].strip() for line in text_lines(meta) if line.strip()):
        yield (str(Path(name).with_suffix("")) if Path(name).suffix else name), None
    if name is None:
        raise InputError("an empty list of images", file=meta)


def refuse_pickle(value: bytes | memoryview, root: Path) -> None:
    """Raise `InputError` where a value is a pickle and no image: those are never loaded."""
    if bytes(value[:1]) == _PICKLE_MAGIC:
        raise InputError(
            "an LMDB of pickled objects, which would run code on loading",
            file=root,
            expected="encoded images",
            fix="Prepare the folders that it was made from: nafnet prepare --lq BLUR --gt SHARP --out STORE",
        )


def opened_lmdb(root: Path) -> lmdb.Environment:
    """Open once a process, which is all that LMDB allows; threads that come together wait for the first."""
    with _OPENING:
        return _open(root)


@lru_cache(maxsize=8)
def _open(root: Path) -> lmdb.Environment:
    try:
        return lmdb.open(str(root), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError("not an LMDB, or a damaged one", file=root, got=error) from error
