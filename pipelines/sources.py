"""Where pairs come from: one adapter a data set layout. Each lists pairs by path and decodes nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nafnet_core import InputError
from pipelines.images import list_images

# Folder names that people use for the two sides, best known first.
_LQ_NAMES = ("blur", "lq", "input", "blurred", "blurry")
_GT_NAMES = ("sharp", "gt", "target", "groundtruth", "ground_truth")
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRef:
    """One pair by its paths. `scene` groups pairs that a split must not separate."""

    key: str
    scene: str
    lq: Path
    gt: Path


class Source(Protocol):
    """What an adapter provides."""

    adapter: str
    licence: str

    def options(self) -> dict[str, Any]:
        """What the manifest records, as JSON values."""
        ...

    def pairs(self) -> list[PairRef]:
        """All pairs, sorted by key. Raises `InputError` where the layout is not as expected."""
        ...


@dataclass(frozen=True, kw_only=True)
class FolderPairs:
    """Two folders with matching names: the same path below each, any image suffix.

    The scene is the subfolder; in a flat folder every file is its own.
    """

    lq_dir: Path
    gt_dir: Path
    lq_name: str = "{}"
    """How the blurred file is named after the sharp one's stem, for example `{}_blur`."""
    adapter = "folders"
    licence = "unknown"

    def options(self) -> dict[str, Any]:
        return {"lq_dir": str(self.lq_dir), "gt_dir": str(self.gt_dir), "lq_name": self.lq_name}

    def pairs(self) -> list[PairRef]:
        lq, gt = _by_stem(self.lq_dir), _by_stem(self.gt_dir)
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
            shown = ", ".join(str(path) for path in lonely[:_SHOWN])
            raise InputError(
                f"{len(lonely)} images without a partner of the same name",
                file=shown,
                expected=f"{len(refs)} pairs found, and nothing left over",
                fix="Remove them, or say how the blurred files are named with --lq-name '{}_blur'",
            )
        return sorted(refs, key=lambda ref: ref.key)


@dataclass(frozen=True, kw_only=True)
class GoProPairs:
    """GOPRO_Large as published (Nah et al., CVPR 2017): `{train,test}/SEQUENCE/{blur,blur_gamma,sharp}`."""

    root: Path
    split: str
    blur: str = "blur"
    """`blur_gamma` holds frames averaged in linear light, `blur` without; scores on the two differ."""
    adapter = "gopro"
    licence = "not stated by the publisher; cite Nah et al., CVPR 2017"

    def options(self) -> dict[str, Any]:
        return {"root": str(self.root), "split": self.split, "blur": self.blur}

    def pairs(self) -> list[PairRef]:
        folder = self.root / self.split
        refs: list[PairRef] = []
        for sequence in sorted(path for path in folder.glob("*") if (path / "sharp").is_dir()):
            side = FolderPairs(lq_dir=sequence / self.blur, gt_dir=sequence / "sharp")
            refs += [
                PairRef(key=f"{sequence.name}/{ref.key}", scene=sequence.name, lq=ref.lq, gt=ref.gt)
                for ref in side.pairs()
            ]
        if not refs:
            raise InputError("no GoPro sequences", file=folder, expected=f"SEQUENCE/{self.blur} and sharp")
        return sorted(refs, key=lambda ref: ref.key)


def find_source(root: Path, *, split: str, lq_name: str = "{}", blur: str = "blur") -> Source:
    """Recognise the layout of `root`: GoPro's, or two folders of pairs (also below `root/split`).

    Raises:
        InputError: there is no such folder, or no layout is recognised.
    """
    if not root.is_dir():
        raise InputError("no such folder", file=root)
    if any((root / split).glob("*/sharp")) and any((root / split).glob(f"*/{blur}")):
        return GoProPairs(root=root, split=split, blur=blur)
    for folder in (root, root / split):
        sides = [_first_folder(folder, names) for names in (_LQ_NAMES, _GT_NAMES)]
        if all(sides):
            return FolderPairs(lq_dir=sides[0], gt_dir=sides[1], lq_name=lq_name)  # type: ignore[arg-type]
    others = sorted({path.parent.parent.name for path in root.glob("*/*/sharp")})
    if others:
        raise InputError(
            f"no sequences for --split {split} in this folder",
            file=root / split,
            expected=f"SEQUENCE/{blur} and SEQUENCE/sharp",
            got=f"sequences in {' and '.join(others)}",
            fix="Copy the missing part of the data set there, or choose another --split or --blur",
        )
    raise InputError(
        "no pairs found in this folder",
        file=root,
        expected="subfolders blur and sharp (or lq and gt, input and target), or GoPro's layout",
        fix="Name both: `prepare --lq BLURRED --gt SHARP`, or `evaluate MODEL BLURRED SHARP`; "
        "sharp photos alone are for `synth`",
    )


def hold_out(refs: Sequence[PairRef], share: float, *, test: bool) -> list[PairRef]:
    """One side of a split by scene: `share` of the scenes, chosen by a hash of their names, are the test set.

    Raises:
        InputError: there are not two scenes to split.
    """
    scenes = sorted({ref.scene for ref in refs}, key=lambda s: hashlib.sha256(s.encode()).digest())
    if len(scenes) < 2:
        raise InputError("cannot hold out a part of one scene", expected="two scenes", got=scenes)
    held = set(scenes[: max(1, min(len(scenes) - 1, math.ceil(share * len(scenes))))])
    return [ref for ref in refs if (ref.scene in held) == test]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_images(folder):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise InputError("two images of one name", file=path, got=found[key].name)
        found[key] = path
    return found


def _first_folder(parent: Path, names: Sequence[str]) -> Path | None:
    return next((parent / name for name in names if (parent / name).is_dir()), None)
