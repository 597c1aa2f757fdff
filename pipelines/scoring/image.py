"""Scores of one image by the evaluation protocol; shared by `evaluate` and by validation in training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from nafnet_core.metrics import PROTOCOL_NAME, PROTOCOL_VERSION, SSIM_WINDOW_PX, psnr, ssim
from nafnet_core.sharpness import detail_lost, luma, sharpness

# The ceiling of a finite score: 8-bit images that differ by one level in one of 30 M values.
_EQUAL_DB = 120.0


class Protocol(BaseModel):
    """Everything beside the data that a score depends on. Two scores compare only where these agree."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = PROTOCOL_NAME
    version: int = PROTOCOL_VERSION
    backend: str = "torch"
    precision: str = "fp32"
    local_statistics: bool = True
    tile_px: int | None = None
    """None runs whole images, one at a time."""
    overlap_px: int | None = None
    threads: int = 1
    """Of network and scores, an image: with another number 8-bit outputs may differ by a level."""

    def difference(self, other: Protocol) -> str | None:
        """First field that differs, as `field a ≠ b`; None where all agree."""
        for field in type(self).model_fields:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{field} {mine} ≠ {theirs}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScore:
    """Scores of one image, before (`blurred`) and after (`restored`), against its ground truth."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)  # for the report's schema

    key: str
    scene: str
    height_px: int
    width_px: int
    psnr_blurred_db: float
    psnr_restored_db: float
    ssim_blurred: float | None
    """None where the image is smaller than SSIM's window."""
    ssim_restored: float | None
    detail_lost: float | None = None
    """Strength of the blur: 0 none, 1 no edge is left, see `nafnet_core.sharpness`. None of a flat truth.
    This and what follows is for reports; validation in training leaves it out."""
    sharpness_blurred: float | None = None
    """0 to 1, without reference: one minus the blur metric of Crete et al. 2007, on 8-bit luma."""
    sharpness_restored: float | None = None
    sharpness_truth: float | None = None
    perceptual_blurred: float | None = None
    """Distance of features to the truth's, 0 where equal; None where it was not asked for."""
    perceptual_restored: float | None = None

    @property
    def gain_db(self) -> float:
        """PSNR over that of the blurred input."""
        return self.psnr_restored_db - self.psnr_blurred_db

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_image(
    key: str,
    scene: str,
    lq: NDArray[np.uint8],
    restored: NDArray[np.uint8],
    gt: NDArray[np.uint8],
) -> ImageScore:
    """Score one image: three (H, W, 3) uint8 RGB arrays of one size. Equal images count as 120 dB."""
    batch = torch.from_numpy(np.stack([lq, restored]).transpose(0, 3, 1, 2))
    truth = torch.from_numpy(np.ascontiguousarray(gt.transpose(2, 0, 1)))[None].expand_as(batch)
    psnr_db = psnr(batch, truth, data_range=255).clamp(max=_EQUAL_DB).tolist()
    fits = min(gt.shape[:2]) >= SSIM_WINDOW_PX
    ssims = ssim(batch, truth, data_range=255).tolist() if fits else [None, None]
    return ImageScore(
        key=key,
        scene=scene,
        height_px=gt.shape[0],
        width_px=gt.shape[1],
        psnr_blurred_db=psnr_db[0],
        psnr_restored_db=psnr_db[1],
        ssim_blurred=ssims[0],
        ssim_restored=ssims[1],
    )


def with_sharpness(
    score: ImageScore, lq: NDArray[np.uint8], restored: NDArray[np.uint8], gt: NDArray[np.uint8]
) -> ImageScore:
    """The score with the strength of the blur and the sharpness of all three images."""
    lumas = [luma(image) for image in (lq, restored, gt)]
    blurred, clear, truth = (_known(sharpness(image)) for image in lumas)
    return replace(
        score,
        detail_lost=_known(detail_lost(lumas[0], lumas[2])),
        sharpness_blurred=blurred,
        sharpness_restored=clear,
        sharpness_truth=truth,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
