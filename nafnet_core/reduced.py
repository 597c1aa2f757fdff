"""Blur that is larger than what a network was trained on: restore a smaller image, add its gain to the large.

At half the size a trail of 40 px is one of 20. What the network changes there, enlarged, is added to the
input, which keeps what detail it has:  restored = lq + enlarged(network(reduced(lq)) - reduced(lq)).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core.enlarging import add_enlarged


def reduced(lq_hwc: NDArray[Any], scale: float) -> NDArray[Any]:
    """(H, W, 3) uint8 or uint16 → the same at `scale`, 0…1, of its sides, of at least 1 px; area means."""
    height, width = lq_hwc.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(np.ascontiguousarray(lq_hwc), size, interpolation=cv2.INTER_AREA)


def merged(lq_hwc: NDArray[Any], small_hwc: NDArray[Any], restored_hwc: NDArray[Any]) -> NDArray[Any]:
    """Add what was gained on the small image to the large one.

    Args:
        lq_hwc: (H, W, 3) uint8 or uint16, full range; it is not changed.
        small_hwc: `reduced(lq_hwc, scale)`.
        restored_hwc: what the network made of that.

    Returns:
        (H, W, 3) of the same dtype.
    """
    gain = restored_hwc.astype(np.float32) - small_hwc.astype(np.float32)
    return add_enlarged(lq_hwc, gain, interpolation=cv2.INTER_CUBIC)
