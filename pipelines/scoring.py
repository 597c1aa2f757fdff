"""Scores of one image by the evaluation protocol; shared by `evaluate` and by validation in training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from nafnet_core.metrics import PROTOCOL_NAME, PROTOCOL_VERSION, SSIM_WINDOW_PX, psnr, ssim

# The ceiling of a finite score: 8-bit images that differ by one level in one of 30 M values.
_EQUAL_DB = 120.0


class Protocol(BaseModel):
    """Everything beside the data that a score depends on. Two scores compare only where these agree."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = PROTOCOL_NAME
    version: int = PROTOCOL_VERSION
    backend: str = "torch"
    precision: str = "fp32"
    local_statistics: bool = True
    tile_px: int | None = None
    """None runs whole images, one at a time."""
    overlap_px: int | None = None

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

    key: str
    scene: str
    height_px: int
    width_px: int
    psnr_blurred_db: float
    psnr_restored_db: float
    ssim_blurred: float | None
    """None where the image is smaller than SSIM's window."""
    ssim_restored: float | None

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
