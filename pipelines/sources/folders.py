"""Two folders with matching names, which other layouts are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nafnet_core import InputError
from pipelines.images import list_images
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

    def pairs(self) -> list[PairRef]:
        lq, gt = images_by_stem(self.lq_dir), images_by_stem(self.gt_dir)
        for folder, found in ((self.lq_dir, lq), (self.gt_dir, gt)):
            if not found:
                raise InputError("no images in this folder", file=folder, expected="png, jpg, tif, webp, bmp")
        refs, lonely = [], []
        for key, gt_path in gt.items():
            parent, _, stem = key.rpartition("/")
            lq_key = f"{parent}/{self.lq_name.replace('{}', stem)}".lstrip("/")
            if lq_key in lq:
                refs.append(PairRef(key=key, scene=parent or stem, lq=lq.pop(lq_key), gt=gt_path))
            else:
                lonely.append(gt_path)
        lonely += lq.values()
        if lonely:
            shown = ", ".join(str(path) for path in lonely[:_SHOWN]) + (", …" if len(lonely) > _SHOWN else "")
            raise InputError(
                f"{len(lonely)} images without a partner of the same name",
                file=shown,
                expected=f"a partner for each, as {len(refs)} others have",
                fix="Remove them, or say how the blurred files are named with --lq-name '{}_blur'",
            )
        return sorted(refs, key=lambda ref: ref.key)


def images_by_stem(folder: AnyPath) -> dict[str, AnyPath]:
    """Images below a folder by their path in it, without suffix. Raises `InputError` where two share one."""
    found: dict[str, AnyPath] = {}
    for path in list_images(folder):
        key = path.relative_to(folder).with_suffix("").as_posix()
        check_name(key, file=path)
        if key in found:
            raise InputError("two images of one name", file=path, got=found[key].name)
        found[key] = path
    return found
