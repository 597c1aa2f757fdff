"""How far a restored image strays from the colours of its input, and how to keep them.

NAFNet shifts colours in low light: it was trained on daylight. Blur moves no light further than its own size,
so means over wide areas should stay as they were.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core.enlarging import add_enlarged

_CELL_PX = 8  # low frequencies are taken from means of so many pixels a side


def colour_shift(lq_hwc: NDArray[Any], restored_hwc: NDArray[Any]) -> tuple[float, float, float]:
    """Mean of the output less mean of the input, by channel.

    Args:
        lq_hwc, restored_hwc: (H, W, 3) RGB of one size, uint8 or uint16, full range.

    Returns:
        Red, green and blue in levels of 8 bit, whatever the dtype.
    """
    levels = 255 / np.iinfo(lq_hwc.dtype).max
    means = [cv2.mean(np.ascontiguousarray(image)) for image in (lq_hwc, restored_hwc)]
    red, green, blue = (levels * (after - before) for before, after in list(zip(*means, strict=True))[:3])
    return red, green, blue


def with_colours_of(
    lq_hwc: NDArray[Any], restored_hwc: NDArray[Any], *, sigma_px: float = 64.0
) -> NDArray[Any]:
    """Give the output the low frequencies of the input.

    Args:
        lq_hwc, restored_hwc: (H, W, 3) RGB of one size, uint8 or uint16, full range; neither is changed.
        sigma_px: standard deviation of the gaussian below which frequencies are low. It has to exceed the
            blur by far, else blur comes back with the colours.

    Returns:
        (H, W, 3) of the input's dtype.
    """
    height, width = lq_hwc.shape[:2]
    size = (max(1, width // _CELL_PX), max(1, height // _CELL_PX))
    small = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in (lq_hwc, restored_hwc)]
    missing = small[0].astype(np.float32) - small[1].astype(np.float32)
    sigma = max(sigma_px / _CELL_PX, 1e-3)
    smooth = cv2.GaussianBlur(missing, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return add_enlarged(restored_hwc, smooth.astype(np.float32), interpolation=cv2.INTER_LINEAR)
