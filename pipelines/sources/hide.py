"""HIDE, as folders or with lists of its parts."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nafnet_core import InputError
from pipelines.images import list_images
from pipelines.packed import Packed
from pipelines.sources.base import PairRef, checked, refuse_shared
from pipelines.sources.remote import AnyPath, text_lines

log = logging.getLogger(__name__)

_GT = "GT"
_SHARP_FOLDERS = frozenset({"GT", "gt", "sharp", "target"})


@dataclass(frozen=True, kw_only=True)
class HidePairs:
    """HIDE (Shen et al., ICCV 2019): `{train,test}/**/NAME.png` blurred, `GT/NAME.png` sharp.

    `test` has its two parts, `test-close-ups` and `test-long-shot`, below it. Where lists lie beside `GT`
    (`train.txt`; `test.txt`, or one for each part as `test-close-ups.txt`), a split is what its lists name,
    one blurred image a line, wherever it is. The scene is the video that a frame's name ends with, as in
    `105fromGOPR0996.png`.
    """

    root: AnyPath
    split: str
    adapter = "hide"
    licence = "not stated by the publisher; cite Shen et al., ICCV 2019"

    def options(self) -> dict[str, Any]:
        return {"root": str(self.root), "split": self.split}

    def pairs(self) -> Packed[PairRef]:
        blurred = self._blurred(self.split)
        if not blurred:
            raise InputError("no images in this folder", file=self.root / self.split)
        refs = [
            PairRef(key=lq.stem, scene=_video_of(lq.stem), lq=lq, gt=self.root / _GT / lq.name)
            for lq in blurred
        ]
        self._check_split(refs)
        return checked(refs, file=self.root / _GT)

    def _check_split(self, refs: list[PairRef]) -> None:
        others = {path.stem for split in ("train", "val", "test") if split != self.split
                  for path in self._blurred(split)}  # fmt: skip
        refuse_shared({ref.key for ref in refs}, others, what="images", file=self.root)
        # Not refused: how far the published split keeps videos apart is not documented.
        videos = {ref.scene for ref in refs} & {_video_of(name) for name in others}
        if videos:
            log.warning("%d videos of HIDE are in %s and in another split: %s", len(videos), self.split,
                        ", ".join(sorted(videos)[:3]))  # fmt: skip

    def _blurred(self, split: str) -> list[AnyPath]:
        lists = hide_lists(self.root, split)
        folder = self.root / split
        if not lists:
            return list_images(folder) if folder.is_dir() else []
        found = {path.name: path for path in list_images(self.root) if path.parent.name not in _SHARP_FOLDERS}
        return [_listed(self.root, line, found) for path in lists for line in _lines(path)]


def hide_lists(root: AnyPath, split: str) -> list[AnyPath]:
    """Lists of a split of HIDE: of the whole, else of its parts."""
    whole = root / f"{split}.txt"
    return [whole] if whole.is_file() else sorted(root.glob(f"{split}-*.txt"))


def is_hide(root: AnyPath, split: str) -> bool:
    """Whether `root` looks like HIDE and has this split."""
    return (root / _GT).is_dir() and ((root / split).is_dir() or bool(hide_lists(root, split)))


def _lines(path: AnyPath) -> list[str]:
    """The first column of each line: some copies name the sharp image, or annotations, behind it."""
    return [line.split()[0] for line in text_lines(path) if line.strip()]


def _listed(root: AnyPath, line: str, found: dict[str, AnyPath]) -> AnyPath:
    """The file of a line, which may be a path, a name, or a name without suffix."""
    if (root / line).is_file():
        return root / line
    name = Path(line).name
    for guess in (name, f"{name}.png"):
        if guess in found:
            return found[guess]
    return root / line  # not there, which `checked` says


def _video_of(stem: str) -> str:
    match = re.fullmatch(r"\d+from(.+)", stem)
    return match[1] if match else stem
