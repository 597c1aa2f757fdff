"""Published data sets in their own layouts, with their official splits.

A scene on both sides of a split is refused, except in REDS, which numbers the sequences of each part from
000. HIDE is in `hide.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nafnet_core import InputError
from pipelines.packed import Packed
from pipelines.sources.base import PairRef, check_name, checked, refuse_shared
from pipelines.sources.folders import FolderPairs
from pipelines.sources.remote import AnyPath, text_lines

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class GoProPairs:
    """GOPRO_Large as published (Nah et al., CVPR 2017): `{train,test}/SEQUENCE/{blur,blur_gamma,sharp}`."""

    root: AnyPath
    split: str
    blur: str = "blur"
    """`blur_gamma` holds frames averaged in linear light, `blur` without; scores on the two differ."""
    adapter = "gopro"
    licence = "not stated by the publisher; cite Nah et al., CVPR 2017"

    def options(self) -> dict[str, Any]:
        return {"root": str(self.root), "split": self.split, "blur": self.blur}

    def pairs(self) -> Packed[PairRef]:
        folder = self.root / self.split
        refs: Packed[PairRef] = Packed()
        scenes: list[str] = []
        sequences = (path for path in folder.glob("*") if (path / "sharp").is_dir())
        # With the slash, the keys' order: `a-b/1` comes before `a/1`.
        for sequence in sorted(sequences, key=lambda path: f"{path.name}/"):
            check_name(sequence.name, file=sequence)
            scenes.append(sequence.name)
            side = FolderPairs(lq_dir=sequence / self.blur, gt_dir=sequence / "sharp")
            refs.extend(
                PairRef(key=f"{sequence.name}/{ref.key}", scene=sequence.name, lq=ref.lq, gt=ref.gt)
                for ref in side.each()
            )
        if not refs:
            raise InputError("no GoPro sequences", file=folder, expected=f"SEQUENCE/{self.blur} and sharp")
        others = (path.parent for path in self.root.glob("*/*/sharp"))
        others = {path.name for path in others if path.parent != folder and path.parent.name in SPLITS}
        refuse_shared(scenes, others, what="sequences", file=self.root)
        return refs


@dataclass(frozen=True, kw_only=True)
class RedsPairs:
    """REDS (Nah et al., CVPRW 2019): `SPLIT_{blur,blur_comp,…}/SEQUENCE` and `SPLIT_sharp/SEQUENCE`.

    Its test set has no sharp frames: `val` is what papers score on.
    """

    root: AnyPath
    split: str
    blur: str = "blur"
    """`blur_comp` is compressed as video, `blur_jpeg` as JPEG (the track of NTIRE 2021)."""
    adapter = "reds"
    licence = "CC BY 4.0"

    def options(self) -> dict[str, Any]:
        return {"root": str(self.root), "split": self.split, "blur": self.blur}

    def pairs(self) -> Packed[PairRef]:
        folder = _reds_folder(self.root, self.split)
        side = FolderPairs(lq_dir=folder / f"{self.split}_{self.blur}", gt_dir=folder / f"{self.split}_sharp")
        return side.pairs()


def is_reds(root: AnyPath, split: str) -> bool:
    """Whether `root` holds this split of REDS."""
    return (_reds_folder(root, split) / f"{split}_sharp").is_dir()


def _reds_folder(root: AnyPath, split: str) -> AnyPath:
    # The archives unpack to `train/train_sharp`; many move the inner folders up.
    return root / split if (root / split / f"{split}_sharp").is_dir() else root


@dataclass(frozen=True, kw_only=True)
class RealBlurPairs:
    """RealBlur (Rim et al., ECCV 2020): `RealBlur_{J,R}_{train,test}_list.txt` beside the folders they name.

    A line is `…/sceneNNN/gt/gt_K.png …/sceneNNN/blur/blur_K.png`, below the list's folder.
    """

    root: AnyPath
    split: str
    subset: str
    """`J`: the camera's JPEG pictures. `R`: developed from its raw files."""
    adapter = "realblur"
    licence = "not stated by the publisher; cite Rim et al., ECCV 2020"

    def options(self) -> dict[str, Any]:
        return {"root": str(self.root), "split": self.split, "subset": self.subset}

    def pairs(self) -> Packed[PairRef]:
        path = self.root / f"RealBlur_{self.subset}_{self.split}_list.txt"
        if not path.is_file():
            raise InputError(
                "no list of this part of RealBlur",
                file=path,
                fix="Choose --split train or test and --blur J or R; the lists come with the data set",
            )
        refs = Packed(self._listed(path))
        if not refs:
            raise InputError("an empty list", file=path)
        lists = (self.root / f"RealBlur_{self.subset}_{split}_list.txt" for split in SPLITS)
        others = [other for other in lists if other != path and other.is_file()]
        scenes = {ref.scene for other in others for ref in self._listed(other)}
        refuse_shared({ref.scene for ref in refs}, scenes, what="scenes", file=path)
        return checked(refs, file=path)

    def _listed(self, path: AnyPath) -> Iterator[PairRef]:
        for number, line in enumerate(text_lines(path), start=1):
            if not line.strip():
                continue
            columns = line.split()
            if len(columns) < 2 or not re.search(r"/blur/[^/]+$", columns[1]):
                expected = "a path below gt and one below blur"
                raise InputError(f"line {number} is no pair", file=path, expected=expected, got=line[:80])
            gt, lq = (self.root / column for column in columns[:2])
            scene = lq.parent.parent.name
            yield PairRef(key=f"{scene}/{lq.stem}", scene=scene, lq=lq, gt=gt)


def realblur_subset(root: AnyPath, blur: str | None) -> str | None:
    """J or R, where `root` has lists of RealBlur; None where it has none.

    Raises:
        InputError: it has both, and `blur` does not say which.
    """
    # Not by `glob`: of a folder of a million photos it would keep all names.
    lists = {subset: [root / f"RealBlur_{subset}_{split}_list.txt" for split in SPLITS] for subset in "JR"}
    subsets = [subset for subset, paths in lists.items() if any(path.is_file() for path in paths)]
    if not subsets or blur in ("J", "R"):
        return blur if subsets else None
    if blur is not None or len(subsets) > 1:
        got = blur or " and ".join(subsets)
        raise InputError("which part of RealBlur?", file=root, got=got, fix="Say --blur J or --blur R")
    return subsets[0]
