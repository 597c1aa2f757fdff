"""The difference of two reports, image by image and on the whole, with a paired bootstrap interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from nafnet_core.bootstrap import bootstrap_interval
from pipelines.evaluate.report import Report, comparable
from pipelines.evaluate.summary import mean

COMPARISON_VERSION = 1
RESAMPLES, CONFIDENCE, SEED = 10_000, 0.95, 0


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    images = []
    for a in first.images:
        b = by_key[a.key]
        both = a.ssim_restored is not None and b.ssim_restored is not None
        images.append(
            ImageDifference(
                key=a.key,
                scene=a.scene,
                psnr_a_db=a.psnr_restored_db,
                psnr_b_db=b.psnr_restored_db,
                psnr_gain_db=b.psnr_restored_db - a.psnr_restored_db,
                ssim_a=a.ssim_restored,
                ssim_b=b.ssim_restored,
                ssim_gain=b.ssim_restored - a.ssim_restored if both else None,  # type: ignore[operator]
            )
        )
    scenes = Counter(image.scene for image in images)
    is_by_scene = 1 < len(scenes) < len(images)
    with_ssim = [image for image in images if image.ssim_gain is not None]
    gains = [image.psnr_gain_db for image in images]
    return Comparison(
        first=first,
        second=second,
        psnr_db=_difference(gains, images, is_by_scene),
        ssim=_difference([image.ssim_gain or 0.0 for image in with_ssim], with_ssim, is_by_scene)
        if with_ssim
        else None,
        unit="scene" if is_by_scene else "image",
        num_units=len(scenes) if is_by_scene else len(images),
        num_better=sum(gain > 0 for gain in gains),
        num_worse=sum(gain < 0 for gain in gains),
        images=tuple(images),
    )


def _difference(values: list[float], images: Sequence[ImageDifference], is_by_scene: bool) -> Difference:
    scenes = [image.scene for image in images] if is_by_scene else None
    interval = bootstrap_interval(values, scenes, confidence=CONFIDENCE, resamples=RESAMPLES, seed=SEED)
    low, high = interval or (None, None)
    found = mean(values)
    assert found is not None
    return Difference(mean=found, low=low, high=high)
