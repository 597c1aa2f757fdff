"""Does a restored tile show what the network made of the photo, or the network's own failure?

NAFNet breaks on some real photos (megvii-research/NAFNet#83, #189, #25: about 0.3 % of a set, with local
statistics on): coloured mosaic, or tiles that explode. There is no sharp photo to compare with, but taking a
blur away moves light by a few pixels: it hardly changes the colour of a patch, and adds no more contrast than
lies around it. The limits were read off what an ideal network would do, `sharp - blurred`, on 700,000 cells:
17 GoPro pairs, and 60 photos under shakes of 15 to 61 px, discs of 15 px and gaussians of σ 6, with and
without noise of 12 levels. None was broken; the first is with floors of 0.12 and 0.36.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CELL_PX = 32
_MIN_CELL_PX = 16  # of less, a single edge is too large a part
_SAMPLED_EVERY_PX = 2  # in both directions; a cell has 256 samples left
_NEIGHBOURS = 5  # cells a side from which light may have come
# Root mean square of the change in colour, and in anything, that is too much; 1 is the range of the image.
_COLOUR_FLOOR, _COLOUR_PER_CONTRAST = 0.15, 0.35
_CHANGE_FLOOR, _CHANGE_PER_CONTRAST = 0.42, 0.5
# Values beyond these are no overshoot at an edge any more.
_WILD_BELOW, _WILD_ABOVE, _WILD_SHARE = -0.5, 1.5, 0.25


def is_broken(lq: Tensor, restored: Tensor) -> Tensor:
    """Whether a tile must not be shown.

    Args:
        lq: (N, H, W, 3) float, RGB in 0…1.
        restored: what the network made of it, same shape, not clipped.

    Returns:
        (N,) bool: a value is not finite, a quarter of some 64 px cell is far out of range, or a cell changed
        its colour, or a larger one its values, by more than the contrast around it explains.
    """
    found = ~restored.isfinite().flatten(1).all(dim=1)
    every = _SAMPLED_EVERY_PX
    lq, restored = (image[:, ::every, ::every].contiguous() for image in (lq, restored))
    cell = min(_CELL_PX // _SAMPLED_EVERY_PX, *lq.shape[1:3])
    wild = ((restored < _WILD_BELOW) | (restored > _WILD_ABOVE)).float().mean(dim=3)
    found |= (_means(wild, min(2 * cell, *lq.shape[1:3])) > _WILD_SHARE).flatten(1).any(dim=1)
    if cell * _SAMPLED_EVERY_PX < _MIN_CELL_PX:
        return found
    change = restored.clamp(0, 1) - lq
    squares = change.square().mean(dim=3)
    colour = squares - change.mean(dim=3).square()
    luma = lq.mean(dim=3)
    for side, energy, floor, share in (
        (cell, colour, _COLOUR_FLOOR, _COLOUR_PER_CONTRAST),
        (2 * cell, squares, _CHANGE_FLOOR, _CHANGE_PER_CONTRAST),
    ):
        if side > min(luma.shape[1:3]):
            continue
        limit = floor + share * _contrast_around(luma, side)
        found |= (_means(energy, side).clamp_min(0).sqrt() > limit).flatten(1).any(dim=1)
    return found


def _means(values: Tensor, side: int) -> Tensor:
    """(N, H, W) → means of cells of `side`² px, those at the border of what there is of them."""
    return F.avg_pool2d(values[:, None], side, ceil_mode=True)[:, 0]


def _contrast_around(luma: Tensor, side: int) -> Tensor:
    """Largest deviation in a cell, or half the range of cells' means, among the neighbours of each cell."""
    means = _means(luma, side)
    deviation = (_means(luma.square(), side) - means.square()).clamp_min(0).sqrt()
    return torch.maximum(_largest(deviation), (_largest(means) + _largest(-means)) / 2)


def _largest(cells: Tensor) -> Tensor:
    return F.max_pool2d(cells[:, None], _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2)[:, 0]
