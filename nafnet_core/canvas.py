"""One image in overlapping tiles: how it is cut, and how what the network makes of the pieces is blended.

canvas = Canvas(image_hwc, tile_px=1024, overlap_px=64, stride_px=16)
for tile in canvas.tiles:
    canvas.put(tile, restored(canvas.piece(tile)))
canvas.restored
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_QUANTIZED_ROWS = 64  # at a time, so that a wide photo's floats are not there three times


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A rectangle of the image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def tiles(height: int, width: int, tile_px: int, overlap_px: int, align_px: int = 1) -> Iterator[Tile]:
    """Cover (height, width) with tiles, row by row, overlapping by at least `overlap_px`.

    Tiles are as equal as can be, of up to `tile_px` a side, and start at multiples of `align_px`, which must
    not exceed `tile_px - overlap_px`.
    """
    for top, tile_height in _spans(height, tile_px, overlap_px, align_px):
        for left, tile_width in _spans(width, tile_px, overlap_px, align_px):
            yield Tile(top=top, left=left, height=tile_height, width=tile_width)


def _spans(length: int, tile_px: int, overlap_px: int, align_px: int) -> list[tuple[int, int]]:
    """Start and length of as few tiles as cover an axis, so that no more of it is run twice than need be.

    All but the last are equal, to be run in batches; that one ends with the axis, and is hardly shorter.
    """
    if length <= tile_px:
        return [(0, length)]
    number = -(-(length - overlap_px) // (tile_px - overlap_px - align_px + 1))
    starts = sorted({i * (length - overlap_px) // number // align_px * align_px for i in range(number)})
    longest = max(after - start for start, after in pairwise([*starts, length - overlap_px])) + overlap_px
    return [(start, min(longest, length - start)) for start in starts]


class Canvas:
    """An image and its restored version, which grows tile by tile, in the order of `tiles`.

    Args:
        image: (H, W, C) uint8 or uint16, full range; it is not changed.
        tile_px: largest side of a tile; None is one tile, whatever the size.
        overlap_px: how far neighbouring tiles overlap, blended by a linear ramp.
        stride_px: tiles start at multiples of it: the network downsamples on a grid, and a tile off the whole
            image's grid gives other pixels, not just seams.

    Attributes:
        tiles: row by row.
        restored: (H, W, C) of the image's dtype; whole once every tile has been put.
    """

    def __init__(
        self, image: NDArray[Any], *, tile_px: int | None, overlap_px: int, stride_px: int = 1
    ) -> None:
        height, width, channels = image.shape
        self.image, self.restored = image, np.empty_like(image)
        self.tiles = tuple(tiles(height, width, tile_px or max(height, width), overlap_px, stride_px))
        self._overlap_px = overlap_px
        self._num_put = 0
        self._sums: tuple[Tensor, Tensor] | None = None
        if len(self.tiles) > 1:
            # One band of tiles is blended at a time: the float sums never cover the whole photo.
            tallest = max(tile.height for tile in self.tiles)
            self._sums = torch.zeros(tallest, width, channels), torch.zeros(tallest, width, 1)

    @property
    def is_whole(self) -> bool:
        """Whether every tile has been put."""
        return self._num_put == len(self.tiles)

    def piece(self, tile: Tile) -> NDArray[Any]:
        """What the image holds there, as a view."""
        return self.image[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]

    def put(self, tile: Tile, piece: Tensor) -> None:
        """Blend in what the network made of a tile: (h, w, C) fp32 on the CPU, about 0…1."""
        assert tile is self.tiles[self._num_put], "tiles come in their order"
        self._num_put += 1
        if self._sums is None:
            self._quantize(tile.top, piece)
            return
        height, width = self.image.shape[:2]
        total, weight = self._sums
        down = _ramp(tile.height, tile.top, height, self._overlap_px)[:, None, None]
        ramp = down * _ramp(tile.width, tile.left, width, self._overlap_px)[None, :, None]
        columns = slice(tile.left, tile.left + tile.width)
        total[: tile.height, columns] += piece * ramp
        weight[: tile.height, columns] += ramp
        following = self.tiles[self._num_put] if not self.is_whole else None
        if following is None or following.top != tile.top:
            self._finish_band(tile.top, height if following is None else following.top)

    def _finish_band(self, top: int, bottom: int) -> None:
        """Rows above `bottom` get no more tiles; what lies below is the beginning of the next band."""
        assert self._sums is not None
        done = bottom - top
        total, weight = self._sums
        total[:done] /= weight[:done]
        self._quantize(top, total[:done])
        for sums in self._sums:
            kept = sums[done:].clone()
            sums.zero_()
            sums[: len(kept)] = kept

    def _quantize(self, top: int, rows: Tensor) -> None:
        dtype = self.image.dtype
        for row in range(0, len(rows), _QUANTIZED_ROWS):
            part = rows[row : row + _QUANTIZED_ROWS]
            levels = part.clamp(0, 1).mul(float(np.iinfo(dtype).max)).round()
            self.restored[top + row : top + row + len(part)] = levels.numpy().astype(dtype)


def _ramp(length: int, start: int, total: int, overlap_px: int) -> Tensor:
    """Blend weights along one axis of a tile: rising from an inner edge, flat at the image's own edge."""
    position = torch.arange(length, dtype=torch.float32) + 0.5
    ramp = torch.ones(length)
    if start > 0 and overlap_px:
        ramp = torch.minimum(ramp, position / overlap_px)
    if start + length < total and overlap_px:
        ramp = torch.minimum(ramp, (length - position) / overlap_px)
    return ramp
