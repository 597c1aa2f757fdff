"""Photos that the bundled model was not trained on, and blur made of them: the same in every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage import data
from sklearn.datasets import load_sample_image

from nafnet_core.blur import BlurKind, degrade, draw_degradation, sample_rng
from pipelines.images import read_rgb_u8
from pipelines.shards import Pair

Image = NDArray[np.uint8]

_SEED = 2026
_CHOSEN_ON = 50


def photos_of(root: Path | None) -> tuple[list[tuple[str, Image]], list[tuple[str, Image]]]:
    """Photos to choose on, and to be judged by."""
    if root is None:
        found = shipped()
        return found[:2], found[2:]
    files = sorted((root / "sharp" / "bsds500" / "val").glob("*.jpg"))
    named = [(file.stem, read_rgb_u8(file)) for file in files]
    return named[:_CHOSEN_ON], named[_CHOSEN_ON:]


def shipped() -> list[tuple[str, Image]]:
    """Photos of scikit-image and scikit-learn, none of which was trained on."""
    found = [(name, getattr(data, name)()) for name in ("coffee", "rocket", "chelsea", "astronaut")]
    return found + [(name, load_sample_image(f"{name}.jpg")) for name in ("flower", "china")]


def blurred(
    photos: Sequence[tuple[str, Image]], kind: BlurKind, sizes: tuple[int, int], kernels: Sequence = ()
) -> Iterator[Pair]:
    """Each photo with a blur of its own, the same in every run."""
    for number, (key, photo) in enumerate(photos):
        rng = sample_rng(_SEED, number)
        drawn = draw_degradation(
            rng, kinds=(kind,), min_size_px=sizes[0], max_size_px=sizes[1], max_noise=0.004, encoded_share=0.5
        )
        lq = degrade(photo, drawn, rng, measured_kernels=kernels)
        yield Pair(key=key, scene=kind, lq=lq, gt=photo)
