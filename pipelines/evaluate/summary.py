"""What many scores come to: means, percentiles, by scene, by strength of the blur."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipelines.scoring import ImageScore

BLUR_RULE = (
    "Thirds of the images by the detail that the blur took: one minus the ratio of the root mean square "
    "gradients of blurred and sharp luma, 0 for none and 1 where no edge is left. Images whose truth is "
    "flat are in none. Not by the PSNR of the blurred input: it is low where there is much texture, and the "
    "gain is counted from it. Noise in the blurred image counts as detail"
)
_THIRDS = ("weak", "medium", "strong")
_PERCENTILES = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Distribution(_Record):
    """Percentiles over images, linear between two of them."""

    min: float
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    max: float


class Group(_Record):
    """Means over the images of a scene, or of a strength of the blur."""

    name: str
    num_images: int
    psnr_blurred_db: float
    psnr_restored_db: float
    gain_db: float
    ssim_blurred: float | None
    ssim_restored: float | None
    detail_lost: tuple[float, float] | None = None
    """Least and most of its images."""


def means(scores: Sequence[ImageScore]) -> dict[str, float | None]:
    """Mean of each score, over the images that have it; None where none has.

    Raises:
        ValueError: no images.
    """
    if not scores:
        raise ValueError("no images, no mean")
    names = [name for name in scores[0].to_dict() if "_blurred" in name or "_restored" in name]
    return {name: mean(getattr(score, name) for score in scores) for name in [*names, "sharpness_truth"]}


def distributions(scores: Sequence[ImageScore]) -> dict[str, Distribution]:
    """Percentiles of PSNR and SSIM restored, and of the gain; of what no image has, none."""
    found = {}
    for name in ("psnr_restored_db", "gain_db", "ssim_restored"):
        values = [value for score in scores if (value := getattr(score, name)) is not None]
        if values:
            found[name] = percentiles(values)
    return found


def percentiles(values: Sequence[float]) -> Distribution:
    """Percentiles of one value or more, as numpy's `linear` method."""
    levels = np.percentile(np.asarray(values, np.float64), list(_PERCENTILES.values())).tolist()
    return Distribution(**dict(zip(_PERCENTILES, levels, strict=True)))


def by_scene(scores: Iterable[ImageScore]) -> tuple[Group, ...]:
    """Means of each scene, in the order of their names."""
    scenes: dict[str, list[ImageScore]] = {}
    for score in scores:
        scenes.setdefault(score.scene, []).append(score)
    return tuple(_group(name, scenes[name]) for name in sorted(scenes))


def by_blur(scores: Iterable[ImageScore]) -> tuple[Group, ...]:
    """Means of thirds of the images by `BLUR_RULE`, the weakest blurs first; of two images, two groups.

    Where they cannot be equal, the first ones are larger. Images of one strength are told apart by name.
    """
    known = [score for score in scores if score.detail_lost is not None]
    known.sort(key=lambda score: (score.detail_lost or 0.0, score.key))
    parts = np.array_split(np.arange(len(known)), len(_THIRDS))
    return tuple(
        _group(name, [known[index] for index in part])
        for name, part in zip(_THIRDS, parts, strict=True)
        if len(part)
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the known ones, summed exactly, whatever their order."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _group(name: str, scores: Sequence[ImageScore]) -> Group:
    found: dict[str, Any] = means(scores)
    strengths = [score.detail_lost for score in scores if score.detail_lost is not None]
    return Group(
        name=name,
        num_images=len(scores),
        psnr_blurred_db=found["psnr_blurred_db"],
        psnr_restored_db=found["psnr_restored_db"],
        gain_db=found["psnr_restored_db"] - found["psnr_blurred_db"],
        ssim_blurred=found["ssim_blurred"],
        ssim_restored=found["ssim_restored"],
        detail_lost=(min(strengths), max(strengths)) if strengths else None,
    )
