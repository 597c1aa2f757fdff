"""A small map enlarged to a photo's size by blocks: the photo's floats are never there as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_BLOCK_PX = 256, 2048  # rows and columns; OpenCV's own limit is 32,766 px a side
_REACH = 4  # pixels beyond those in question that bicubic interpolation sees, and some


def add_enlarged(
    image_hwc: NDArray[Any], small_hwc: NDArray[np.float32], *, interpolation: int
) -> NDArray[Any]:
    """`image + small enlarged to its size`, clipped to the dtype's range and rounded.

    Args:
        image_hwc: (H, W, 3) uint8 or uint16; it is not changed.
        small_hwc: (h, w, 3) float32, in the image's levels, pixel centres as `cv2.resize` has them.
        interpolation: `cv2.INTER_LINEAR` or `cv2.INTER_CUBIC`.
    """
    result, highest = np.empty_like(image_hwc), np.iinfo(image_hwc.dtype).max
    (height, width), (small_height, small_width) = image_hwc.shape[:2], small_hwc.shape[:2]
    for rows, first_row, y in _blocks(height, small_height, _BLOCK_PX[0]):
        for columns, first_column, x in _blocks(width, small_width, _BLOCK_PX[1]):
            part = small_hwc[first_row : int(y[-1]) + _REACH + 2, first_column : int(x[-1]) + _REACH + 2]
            larger = cv2.remap(
                part,
                np.tile(x - first_column, (len(y), 1)),
                np.repeat((y - first_row)[:, None], len(x), axis=1),
                interpolation,
                borderMode=cv2.BORDER_REPLICATE,
            )
            sums = np.clip(image_hwc[rows, columns] + larger, 0, highest)
            result[rows, columns] = np.rint(sums, out=sums)
    return result


def _blocks(length: int, small: int, block: int) -> Iterator[tuple[slice, int, NDArray[np.float32]]]:
    """Pieces of an axis, the first entry of the small one that each needs, and its places on that."""
    for start in range(0, length, block):
        stop = min(start + block, length)
        places = ((np.arange(start, stop) + 0.5) * (small / length) - 0.5).astype(np.float32)
        yield slice(start, stop), max(0, int(places[0]) - _REACH), places
