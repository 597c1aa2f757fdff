"""The difference of two reports, image by image and on the whole, with a paired bootstrap interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from nafnet_core.bootstrap import bootstrap_interval
from pipelines.evaluate.report import Report, comparable
from pipelines.scoring import ImageScore

COMPARISON_VERSION = 1
RESAMPLES, CONFIDENCE, SEED = 10_000, 0.95, 0


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Difference(_Record):
    """B − A, mean over images."""

    mean: float
    low: float | None
    """With `high`, the paired bootstrap interval; None where there is but one image, or one scene."""
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


class ImageDifference(_Record):
    """One image in both models. `psnr_gain_db` and `ssim_gain` are B − A."""

    key: str
    scene: str
    psnr_a_db: float
    psnr_b_db: float
    psnr_gain_db: float
    ssim_a: float | None
    ssim_b: float | None
    ssim_gain: float | None
    perceptual_gain: float | None = None


class Comparison(_Record):
    """B against A on the same data by the same protocol."""

    schema_version: int = COMPARISON_VERSION
    first: Report
    """A."""
    second: Report
    """B."""
    psnr_db: Difference
    ssim: Difference | None
    """None where no image is as large as SSIM's window."""
    perceptual: Difference | None = None
    """Below 0, B is nearer to the truth. None where it was not asked for."""
    unit: Literal["scene", "image"]
    """What was resampled: scenes where there are several and one of them has several images, which are not
    independent of each other; else images."""
    num_units: int
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    seed: int = SEED
    num_better: int
    """Images of a higher PSNR in B than in A."""
    num_worse: int
    images: tuple[ImageDifference, ...]


def difference_of(first: Report, second: Report) -> Comparison:
    """B (`second`) against A (`first`), image by image and on the whole.

    Raises:
        InputError: data or protocol differ; the difference is named.
    """
    comparable(first, second)
    by_key = {score.key: score for score in second.images}
    images = [_image(a, by_key[a.key]) for a in first.images]
    num_scenes = len({image.scene for image in images})
    is_by_scene = 1 < num_scenes < len(images)
    psnr_db = _difference(images, "psnr_gain_db", is_by_scene)
    assert psnr_db is not None
    return Comparison(
        first=first,
        second=second,
        psnr_db=psnr_db,
        ssim=_difference(images, "ssim_gain", is_by_scene),
        perceptual=_difference(images, "perceptual_gain", is_by_scene),
        unit="scene" if is_by_scene else "image",
        num_units=num_scenes if is_by_scene else len(images),
        num_better=sum(image.psnr_gain_db > 0 for image in images),
        num_worse=sum(image.psnr_gain_db < 0 for image in images),
        images=tuple(images),
    )


def _image(a: ImageScore, b: ImageScore) -> ImageDifference:
    return ImageDifference(
        key=a.key,
        scene=a.scene,
        psnr_a_db=a.psnr_restored_db,
        psnr_b_db=b.psnr_restored_db,
        psnr_gain_db=b.psnr_restored_db - a.psnr_restored_db,
        ssim_a=a.ssim_restored,
        ssim_b=b.ssim_restored,
        ssim_gain=_gain(a.ssim_restored, b.ssim_restored),
        perceptual_gain=_gain(a.perceptual_restored, b.perceptual_restored),
    )


def _gain(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a


def _difference(images: Sequence[ImageDifference], field: str, is_by_scene: bool) -> Difference | None:
    """Of the images that have this score; None where none has."""
    known = [(value, image.scene) for image in images if (value := getattr(image, field)) is not None]
    if not known:
        return None
    values = [value for value, _ in known]
    scenes = [scene for _, scene in known] if is_by_scene else None
    interval = bootstrap_interval(values, scenes, confidence=CONFIDENCE, resamples=RESAMPLES, seed=SEED)
    low, high = interval or (None, None)
    return Difference(mean=statistics.fmean(values), low=low, high=high)
