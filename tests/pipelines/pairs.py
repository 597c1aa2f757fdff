"""Small paired data sets of real photos, and stores made from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage import data

from pipelines import prepare
from pipelines.png import encode_png
from pipelines.prepare import PrepareConfig
from pipelines.sources import FolderPairs
from pipelines.store import PairStore


def piece(number: int, height: int = 72, width: int = 96) -> NDArray[np.uint8]:
    """A piece of a photo; no two numbers give the same one."""
    whole = (data.astronaut, data.chelsea)[number % 2]()
    top = 37 * number % (whole.shape[0] - height)
    left = 53 * number % (whole.shape[1] - width)
    return np.ascontiguousarray(whole[top : top + height, left : left + width])


def blurred(sharp: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return cv2.GaussianBlur(sharp, (5, 5), 0)


def write_pairs(root: Path, names: list[str], *, height: int = 72, width: int = 96) -> FolderPairs:
    """Write `root/blur/NAME.png` and `root/sharp/NAME.png`; names may lie in subfolders."""
    for number, name in enumerate(names):
        sharp = piece(number, height, width)
        for side, image in (("blur", blurred(sharp)), ("sharp", sharp)):
            path = root / side / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(image))
    return FolderPairs(lq_dir=root / "blur", gt_dir=root / "sharp")


def make_store(source: FolderPairs, out: Path, **options: Any) -> PairStore:
    """Prepare `source` in this process: 32 px crops, two photos a shard, unless `options` say otherwise."""
    config = PrepareConfig(out=out, crop_px=32, stride_px=32, pairs_per_shard=2, use_ray=False)
    prepare.run(source, source.pairs(), replace(config, **options))
    return PairStore(out)
