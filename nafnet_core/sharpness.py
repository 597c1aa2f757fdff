"""Sharpness of an image by itself, and how much of its detail a blur took.

    sharpness(luma(rgb))             # 0…1, no truth needed
    detail_lost(luma(lq), luma(gt))  # 0: as sharp as the truth

All sums are of whole numbers, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

_FILTER_PX = 11  # Crete et al.: enough for blurs of up to its size, beyond which the measure saturates
_EDGE_PX = 2  # rows and columns at the border, where a filter sees what is not there


def luma(rgb_hwc_u8: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB → (H, W) uint8 luma of ITU-R BT.601."""
    return cv2.cvtColor(np.ascontiguousarray(rgb_hwc_u8), cv2.COLOR_RGB2GRAY)  # type: ignore[return-value]


def sharpness(luma_hw_u8: NDArray[np.uint8]) -> float:
    """One minus the perceptual blur metric of Crete et al. 2007 ("The blur effect", SPIE 6492).

    How much of the differences between neighbours a second blur takes away: much in a sharp image, little
    in one that is blurred already. The worse of the two directions counts. Noise and ringing count as
    sharp, so it says nothing of faithfulness. Equals 1 − `skimage.measure.blur_effect` of the same luma.

    Args:
        luma_hw_u8: (H, W) uint8.

    Returns:
        0 (blurred) to 1 (sharp); NaN of an image without an edge or below 4 px a side.
    """
    worst = math.inf
    image = luma_hw_u8.astype(np.float32)
    for axis, size in enumerate(((1, _FILTER_PX), (_FILTER_PX, 1))):  # width and height
        # Sums instead of means, whole numbers below 2²⁴: exact in fp32.
        sums = cv2.boxFilter(luma_hw_u8, cv2.CV_32F, size, normalize=False, borderType=cv2.BORDER_REFLECT)
        before = _inner(np.abs(_slope(image, axis)) * _FILTER_PX)
        lost = before - _inner(np.abs(_slope(sums, axis)))
        total = before.sum(dtype=np.float64)
        if not total:
            return math.nan
        worst = min(worst, float(np.maximum(lost, 0).sum(dtype=np.float64) / total))
    return worst


def detail_lost(lq_hw_u8: NDArray[np.uint8], gt_hw_u8: NDArray[np.uint8]) -> float:
    """Strength of a blur: one minus the ratio of the two images' root mean square gradients.

    Contrast and content cancel, and a shift between the two does not matter. The PSNR of the blurred input
    says something else: it is low where there is much texture, however weak the blur.

    Args:
        lq_hw_u8, gt_hw_u8: (H, W) uint8 luma of one size, degraded and sharp.

    Returns:
        0 where nothing is lost to 1 where nothing is left; below 0 where the degraded one has more (noise).
        NaN where the sharp one has no edge.

    Raises:
        ValueError: sizes differ.
    """
    if lq_hw_u8.shape != gt_hw_u8.shape:
        raise ValueError(f"expected two images of one size, got {lq_hw_u8.shape} and {gt_hw_u8.shape}")
    energies = []
    for image in (lq_hw_u8, gt_hw_u8):
        values = image.astype(np.float32)
        slopes = (_slope(values, axis).astype(np.float64) for axis in (0, 1))
        energies.append(sum(float(np.square(slope, out=slope).sum()) for slope in slopes))
    return 1 - math.sqrt(energies[0] / energies[1]) if energies[1] else math.nan


def _slope(image: cv2.typing.MatLike, axis: int) -> NDArray[np.float32]:
    """Sobel's derivative along an axis, eight times the slope."""
    return cv2.Sobel(image, cv2.CV_32F, axis, 1 - axis, borderType=cv2.BORDER_REFLECT)  # type: ignore


def _inner(image: NDArray[np.float32]) -> NDArray[np.float32]:
    height, width = image.shape
    return image[_EDGE_PX : height - 1, _EDGE_PX : width - 1]
