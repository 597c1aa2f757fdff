"""Paired geometry on HWC arrays. What to do is given as numbers; nothing here draws at random."""

from __future__ import annotations

from itertools import permutations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Box = tuple[int, int, int, int]

_ORDERS = tuple(permutations(range(3)))
# OpenCV's flip codes, by the two low bits of a variant.
_FLIPS = {1: 1, 2: 0, 3: -1}
_FLIPS_TRANSPOSED = {1: 0, 2: 1, 3: -1}


def crop(image_hwc: Image, top: int, left: int, size_px: int) -> Image:
    """Square view of `size_px` at (top, left)."""
    return image_hwc[top : top + size_px, left : left + size_px]


def dihedral(image_hwc: Image, variant: int) -> Image:
    """One of the eight flips and quarter turns of a square, as a view.

    Args:
        image_hwc: (H, W, C).
        variant: 0…7; bit 0 flips left-right, bit 1 up-down, bit 2 transposes. 0 changes nothing.
    """
    if variant & 1:
        image_hwc = image_hwc[:, ::-1]
    if variant & 2:
        image_hwc = image_hwc[::-1]
    if variant & 4:
        image_hwc = image_hwc.transpose(1, 0, 2)
    return image_hwc


def dihedral_into(out_hwc: Image, image_hwc: Image, variant: int) -> None:
    """Write `dihedral(image_hwc, variant)` into `out_hwc`.

    Through OpenCV: NumPy copies a mirrored or transposed image of 3-byte pixels byte by byte, 10 to 50 times
    slower (measured at 256²).

    Args:
        out_hwc: (H, W, 3), contiguous; must not overlap `image_hwc`.
        image_hwc: (H, W, 3) square; a window of a larger image is fine, and need not be writable.
        variant: 0…7, as in `dihedral`.
    """
    flips = variant & 3
    if variant & 4 and flips:
        cv2.flip(cv2.transpose(image_hwc), _FLIPS_TRANSPOSED[flips], dst=out_hwc)
    elif variant & 4:
        cv2.transpose(image_hwc, dst=out_hwc)
    elif flips:
        cv2.flip(image_hwc, _FLIPS[flips], dst=out_hwc)
    else:
        out_hwc[...] = image_hwc


def channel_order(image_hwc: Image, variant: int) -> Image:
    """One of the six orders of the channels, as a copy: a network may not rely on the colour of things.

    Args:
        image_hwc: (H, W, 3).
        variant: 0…5, in lexicographic order. 0 changes nothing.
    """
    return image_hwc[..., list(_ORDERS[variant])]


def cutblur(lq_hwc: Image, gt_hwc: Image, box: Box, *, sharp_inside: bool) -> Image:
    """Degraded image of which a part is sharp, so that a network learns where, not only how, to deblur.

    Yoo et al., "Rethinking Data Augmentation for Image Super-resolution", CVPR 2020, section 3.2.

    Args:
        lq_hwc, gt_hwc: (H, W, C) of one shape.
        box: top, left, height and width of the part.
        sharp_inside: the box is sharp and the rest blurred, or the other way round.

    Returns:
        (H, W, C), a copy.
    """
    top, left, height, width = box
    inside = (slice(top, top + height), slice(left, left + width))
    source, rest = (gt_hwc, lq_hwc) if sharp_inside else (lq_hwc, gt_hwc)
    mixed = rest.copy()
    mixed[inside] = source[inside]
    return mixed


def crop_corners(length_px: int, crop_px: int, stride_px: int, min_remainder_px: int) -> list[int]:
    """Starts of the crops that cover one axis, as the usual GoPro preparation cuts them.

    Crops start every `stride_px`; a last one is set flush to the end where more than `min_remainder_px`
    would otherwise be left uncovered.

    Args:
        length_px: the axis' length, at least `crop_px`.
        crop_px: side of a crop.
        stride_px: distance between starts.
        min_remainder_px: remainders up to this are dropped.
    """
    starts = list(range(0, length_px - crop_px + 1, stride_px))
    if length_px - (starts[-1] + crop_px) > min_remainder_px:
        starts.append(length_px - crop_px)
    return starts
