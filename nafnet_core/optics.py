"""Blur of an image in linear light, the whole of it or any part: a part comes out as if cut from the whole.

Patches of training are blurred so. A kernel is applied tap by tap, in one order at every pixel: a Fourier
transform rounds otherwise in every window, and takes ten times as long for the few taps of a shake. It is
left to kernels of more than 500 taps, of which a part may differ from the whole by a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core.kernels import Kernel, Path, Taps, rasterized
from nafnet_core.transforms import Box

LinearImage = NDArray[np.float32]
Size = tuple[int, int]

# OpenCV takes kernels of up to 11×11 tap by tap, leaving out zeros, and larger ones through a Fourier
# transform. That is faster from some 500 taps on: 5 ms at 300², of which a tap takes 0.008.
_TILE_PX, _MAX_TAPS = 11, 500
# Of a varying blur: kernels are interpolated between those that move a point by this much more or less.
_NODE_STEP_PX, _GRID_CELLS = 2.0, (4, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What is known of an image in linear light: all of it, or what lies around a part.

    Beyond the image itself, light is mirrored at its border.
    """

    size: Size
    """Height and width of the whole image."""
    box: Box
    """Where `linear` lies in it."""
    linear: LinearImage
    """(H, W, 3) of the box."""

    def around(self, part: Box, reach_px: int) -> LinearImage:
        """The part with `reach_px` on each side."""
        slices, missing = [], []
        for start, length, first, size in zip(part[:2], part[2:], self.box[:2], self.size, strict=True):
            begin, end = start - reach_px, start + length + reach_px
            slices.append(slice(max(0, begin) - first, min(size, end) - first))
            missing += [max(0, -begin), max(0, end - size)]
        known = self.linear[slices[0], slices[1]]
        if not any(missing):
            return known
        return cv2.copyMakeBorder(known, *missing, cv2.BORDER_REFLECT_101)  # type: ignore[return-value]


class Blur(Protocol):
    """A blur of which everything is drawn."""

    def reach_px(self, size: Size) -> int:
        """How far away light may come from, at most, in an image of this height and width."""
        ...

    def of(self, window: Window, part: Box) -> LinearImage:
        """The blurred part, (H, W, 3). `window` holds it with `reach_px` around, as far as the image goes."""
        ...


@dataclass(frozen=True, slots=True)
class UniformBlur:
    """The same kernel everywhere."""

    kernel: Kernel | Taps
    """(K, K), or (K,) for a symmetric one that is the product of its rows and columns."""

    def reach_px(self, size: Size) -> int:
        return self.kernel.shape[0] // 2

    def of(self, window: Window, part: Box) -> LinearImage:
        return _convolved(window.around(part, self.reach_px(window.size)), self.kernel)


@dataclass(frozen=True, slots=True)
class VaryingBlur:
    """Blur of a camera that shifts and rolls about its axis: the further from the centre, the more it turns.

    Each point moves along `path` plus its share of the roll. Kernels are taken at the nodes of a grid and
    interpolated in between, by blending the images that they make (Nagy & O'Leary, "Restoring images degraded
    by spatially variant blur", SIAM J. Sci. Comput. 1998): flat fields stay flat. The grid is as fine as
    neighbouring kernels need to be alike.
    """

    path: Path
    """(T,) shift over the exposure, x + iy in pixels, of mean 0: nothing is shifted on average."""
    roll_rad: NDArray[np.float64]
    """(T,) angle over the exposure, of mean 0."""

    def reach_px(self, size: Size) -> int:
        corner_px = np.hypot(*size) / 2
        return int(np.ceil(np.abs(self.path).max() + np.abs(self.roll_rad).max() * corner_px)) + 1

    def of(self, window: Window, part: Box) -> LinearImage:
        (height, width), roll_rad = window.size, float(np.ptp(self.roll_rad))
        centre = complex((width - 1) / 2, (height - 1) / 2)
        rows, cols = (
            _Axis.of(length, start, count, roll_rad)
            for length, start, count in zip(window.size, part[:2], part[2:], strict=True)
        )
        result = np.zeros((part[2], part[3] * 3), np.float32)
        for row, row_weights, (top, bottom) in rows.nodes:
            for col, col_weights, (left, right) in cols.nodes:
                kernel = rasterized(self.path + 1j * self.roll_rad * (complex(col, row) - centre))
                cell = (part[0] + top, part[1] + left, bottom - top, right - left)
                piece = _convolved(window.around(cell, kernel.shape[0] // 2), kernel)
                # Flat, for three channels are too short a loop for NumPy.
                weights = np.outer(row_weights[top:bottom], np.repeat(col_weights[left:right], 3))
                piece = piece.reshape(weights.shape) * weights.astype(np.float32)
                result[top:bottom, 3 * left : 3 * right] += piece
        return result.reshape(*part[2:], 3)


@dataclass(frozen=True, slots=True)
class _Axis:
    """The nodes along one axis of an image that matter to a part of it."""

    nodes: list[tuple[float, NDArray[np.float64], tuple[int, int]]]
    """Position in the image; weight at each pixel of the part; where in the part that is not 0."""

    @classmethod
    def of(cls, length: int, start: int, count: int, roll_rad: float) -> _Axis:
        """Nodes between which points move apart by `_NODE_STEP_PX`, within `_GRID_CELLS`."""
        cells = int(np.clip(np.ceil(roll_rad * length / _NODE_STEP_PX), *_GRID_CELLS))
        positions = np.linspace(0, length - 1, min(cells + 1, length))
        pixels = np.arange(start, start + count)
        nodes = []
        for position, unit in zip(positions.tolist(), np.eye(len(positions)), strict=True):
            weights = np.interp(pixels, positions, unit)  # linear interpolation: they add up to 1
            if weights.any():
                first, last = np.flatnonzero(weights)[[0, -1]].tolist()
                nodes.append((position, weights, (first, last + 1)))
        return cls(nodes)


def _convolved(surrounded: LinearImage, kernel: Kernel | Taps) -> LinearImage:
    """Convolution where the kernel fits in: (H + K − 1, W + K − 1, 3) → (H, W, 3)."""
    reach = kernel.shape[0] // 2
    height, width = surrounded.shape[0] - 2 * reach, surrounded.shape[1] - 2 * reach
    inner = (slice(reach, reach + height), slice(reach, reach + width))
    if kernel.ndim == 1:
        return cv2.sepFilter2D(surrounded, -1, kernel, kernel)[inner]  # type: ignore[return-value]
    turned = np.ascontiguousarray(kernel[::-1, ::-1])  # OpenCV correlates
    if np.count_nonzero(turned) > _MAX_TAPS:
        return cv2.filter2D(surrounded, -1, turned)[inner].clip(0, None)
    result = np.zeros((height, width, 3), np.float32)
    for top in range(0, len(turned), _TILE_PX):
        for left in range(0, len(turned), _TILE_PX):
            tile = turned[top : top + _TILE_PX, left : left + _TILE_PX]
            if not tile.any():
                continue
            rows, cols = tile.shape
            under = surrounded[top : top + height + rows - 1, left : left + width + cols - 1]
            # What the anchor leaves out below and on the right is beyond the result.
            result += cv2.filter2D(under, -1, tile, anchor=(0, 0))[:height, :width]
    return result
