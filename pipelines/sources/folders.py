"""Two folders with matching names, which other layouts are made of."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nsmallest
from posixpath import splitext
from typing import Any

from nafnet_core import InputError
from pipelines.images import image_names
from pipelines.packed import Packed, in_order, matched
from pipelines.sources.base import PairRef, check_name
from pipelines.sources.remote import AnyPath

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class FolderPairs:
    """Two folders with matching names: the same path below each, any image suffix.

    The scene is the subfolder; in a flat folder every file is its own.
    """

    lq_dir: AnyPath
    gt_dir: AnyPath
    lq_name: str = "{}"
    """How the blurred file is named after the sharp one's stem, for example `{}_blur`."""
    adapter = "folders"
    licence = "unknown"

    def options(self) -> dict[str, Any]:
        return {"lq_dir": str(self.lq_dir), "gt_dir": str(self.gt_dir), "lq_name": self.lq_name}

    def pairs(self) -> Packed[PairRef]:
        return Packed(self.each())

    def each(self) -> Iterator[PairRef]:
        """The pairs one by one, sorted by key. Raises before the first."""
        for key, lq_name, gt_name in in_order(self._names()):
            parent, _, stem = key.rpartition("/")
            lq, gt = self.lq_dir / lq_name, self.gt_dir / gt_name
            yield PairRef(key=key, scene=parent or stem, lq=lq, gt=gt)

    def _names(self) -> Iterator[tuple[str, str, str]]:
        """Key, blurred and sharp file of each pair, sorted by the blurred file."""
        num_pairs, num_blurred, num_sharp = 0, 0, 0
        lonely_blurred: Packed[str] = Packed()
        lonely_sharp: Packed[str] = Packed()
        lq = ((key, f"{key}{suffix}") for key, suffix in images_by_stem(self.lq_dir))
        gt = ((self._lq_key(key), (key, f"{key}{suffix}")) for key, suffix in images_by_stem(self.gt_dir))
        for _, blurred, sharp in matched(lq, gt):  # at most one is blurred
            num_blurred, num_sharp = num_blurred + len(blurred), num_sharp + len(sharp)
            for key, name in sharp[: len(blurred)]:
                num_pairs += 1
                yield key, blurred[0], name
            lonely_blurred.extend(blurred[len(sharp) :])
            lonely_sharp.extend(name for _, name in sharp[len(blurred) :])
        for folder, count in ((self.lq_dir, num_blurred), (self.gt_dir, num_sharp)):
            if not count:
                raise InputError("no images in this folder", file=folder, expected="png, jpg, tif, webp, bmp")
        if num_lonely := len(lonely_sharp) + len(lonely_blurred):
            first = [path for folder, names in ((self.gt_dir, lonely_sharp), (self.lq_dir, lonely_blurred))
                     for path in nsmallest(_SHOWN, (folder / name for name in names))]  # fmt: skip
            raise InputError(
                f"{num_lonely} images without a partner of the same name",
                file=", ".join(map(str, first[:_SHOWN])) + (", …" if num_lonely > _SHOWN else ""),
                expected=f"a partner for each, as {num_pairs} others have",
                fix="Remove them, or say how the blurred files are named with --lq-name '{}_blur'",
            )

    def _lq_key(self, key: str) -> str:
        parent, _, stem = key.rpartition("/")
        return f"{parent}/{self.lq_name.replace('{}', stem)}".lstrip("/")


def images_by_stem(folder: AnyPath) -> Iterator[tuple[str, str]]:
    """Images below a folder by their path in it without suffix, sorted, each with its suffix.

    Raises:
        InputError: no such folder, two images that share a path, or a name that is not UTF-8.
    """
    before = ("", "")
    for key, suffix in in_order(map(splitext, image_names(folder))):
        if not key.isascii():
            check_name(key, file=folder / f"{key}{suffix}")
        if key == before[0]:
            got = f"{posixpath.basename(key)}{before[1]}"
            raise InputError("two images of one name", file=folder / f"{key}{suffix}", got=got)
        before = (key, suffix)
        yield before
