"""Sharp photos alone, which training blurs anew each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nafnet_core import InputError
from pipelines.packed import Packed
from pipelines.sources.base import PairRef
from pipelines.sources.find import find_source
from pipelines.sources.folders import images_by_stem
from pipelines.sources.remote import AnyPath


@dataclass(frozen=True, kw_only=True)
class SharpPhotos:
    """A folder of sharp photos, subfolders included.

    The scene is the subfolder; in a flat folder every photo is its own.
    """

    root: AnyPath
    adapter = "sharp"
    licence = "unknown"

    def options(self) -> dict[str, Any]:
        return {"sharp_dir": str(self.root)}

    def pairs(self) -> Packed[PairRef]:
        if not self.root.is_dir():
            raise InputError("no such folder" if not self.root.exists() else "not a folder", file=self.root)
        self._refuse_pairs()
        refs = Packed(
            PairRef(key=key, scene=key.rpartition("/")[0] or key, lq=None, gt=self.root / f"{key}{suffix}")
            for key, suffix in images_by_stem(self.root)
        )
        if not refs:
            raise InputError(
                "no photos in this folder", file=self.root, expected="png, jpg, tif, webp or bmp"
            )
        return refs

    def _refuse_pairs(self) -> None:
        """Blurred images must not be taken for sharp ones."""
        for split in ("train", "val", "test"):
            try:
                adapter = find_source(self.root, split=split).adapter
            except InputError:
                continue
            raise InputError(
                "blurred images in this folder",
                file=self.root,
                expected="sharp photos alone",
                got=f"pairs ({adapter})",
                fix="Leave out --sharp, or name the folder of the sharp ones",
            )
