"""Restore an image of any size: whole where it fits, else in overlapping tiles, blended.

    restored = restore_image(model, rgb_hwc_u8, train_patch_px=256, tile_px=512)

Source and result stay in host memory; one tile at a time goes to the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nafnet_core.local_stats import local_statistics
from nafnet_core.model import NAFNet
from nafnet_core.strips import forward_in_strips

DEFAULT_OVERLAP_PX = 64
# Beyond this a tile saves little overlap, and its maps cost page faults instead of staying in the caches.
MAX_TILE_PX = 1024
MIN_TILE_PX = 192  # The smallest multiple of 64 of which `DEFAULT_OVERLAP_PX` is below half.
# Floats alive at once a pixel at full resolution, in units of `width`: on the CPU in strips (4.3 at most,
# read off allocations at several sizes and windows), elsewhere with every map of a block whole.
_LIVE_MAPS_IN_STRIPS, _LIVE_MAPS_WHOLE = 5, 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A rectangle of the image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def tile_px_for(model: NAFNet, memory_mib: float) -> int:
    """Side of the largest tile up to `MAX_TILE_PX` whose forward pass fits into `memory_mib`, an estimate.

    A multiple of 64 px, and at least `MIN_TILE_PX`.
    """
    in_strips = next(model.parameters()).device.type == "cpu"
    bytes_per_px = 4 * model.config.width * (_LIVE_MAPS_IN_STRIPS if in_strips else _LIVE_MAPS_WHOLE)
    side = int((memory_mib * 2**20 / bytes_per_px) ** 0.5)
    return min(MAX_TILE_PX, max(MIN_TILE_PX, side // 64 * 64))


@torch.inference_mode()
def restore_image(
    model: NAFNet,
    lq_hwc: NDArray[np.uint8] | NDArray[np.uint16],
    *,
    train_patch_px: int | None,
    tile_px: int | None = None,
    overlap_px: int = DEFAULT_OVERLAP_PX,
    autocast: bool = False,
    on_tile: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Restore one image.

    Args:
        model: the network, in eval mode, on any device.
        lq_hwc: (H, W, 3) RGB, uint8 or uint16, full range.
        train_patch_px: patch side in training, which sets the window of local statistics; None turns them
            off, and then tiles and whole image differ.
        tile_px: side of a tile; None runs the whole image at once.
        overlap_px: how far neighbouring tiles overlap; blended by a linear ramp.
        autocast: run in bf16.
        on_tile: called after each tile with the tiles done and all tiles; not where the image is run whole.

    Returns:
        (H, W, 3), dtype of the input.

    Raises:
        ValueError: not (H, W, 3) of uint8 or uint16, the overlap is not smaller than half a tile, or the tile
            is too small for the network.
    """
    if lq_hwc.ndim != 3 or lq_hwc.shape[2] != model.config.img_channel or 0 in lq_hwc.shape:
        raise ValueError(f"expected (H, W, {model.config.img_channel}), got {lq_hwc.shape}")
    if lq_hwc.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"expected uint8 or uint16, got {lq_hwc.dtype}")
    white = float(np.iinfo(lq_hwc.dtype).max)
    height, width = lq_hwc.shape[:2]
    with local_statistics(model, train_patch_px):
        if tile_px is None or max(height, width) <= tile_px:
            whole = _run(model, lq_hwc, white, autocast)
            return _quantized(whole, white, lq_hwc.dtype)
        if not 0 <= 2 * overlap_px < tile_px:
            raise ValueError(f"overlap {overlap_px} px must be below half of the tile, {tile_px} px")
        if tile_px - overlap_px < model.config.stride_px:
            raise ValueError(
                f"tile {tile_px} px must exceed the overlap, {overlap_px} px, "
                f"by the network's stride, {model.config.stride_px} px"
            )
        return _run_tiled(model, lq_hwc, white, tile_px, overlap_px, autocast, on_tile)


def tiles(height: int, width: int, tile_px: int, overlap_px: int, align_px: int = 1) -> Iterator[Tile]:
    """Cover (height, width) with tiles, row by row, overlapping by at least `overlap_px`.

    Tiles are as equal as can be, of up to `tile_px` a side, and start at multiples of `align_px`, which must
    not exceed `tile_px - overlap_px`.
    """
    for top, tile_height in _spans(height, tile_px, overlap_px, align_px):
        for left, tile_width in _spans(width, tile_px, overlap_px, align_px):
            yield Tile(top=top, left=left, height=tile_height, width=tile_width)


def _spans(length: int, tile_px: int, overlap_px: int, align_px: int) -> list[tuple[int, int]]:
    """Start and length of as few equal tiles as cover an axis: no more of it is run twice than need be."""
    if length <= tile_px:
        return [(0, length)]
    number = -(-(length - overlap_px) // (tile_px - overlap_px - align_px + 1))
    starts = sorted({i * (length - overlap_px) // number // align_px * align_px for i in range(number)})
    stops = [start + overlap_px for start in starts[1:]] + [length]
    return [(start, stop - start) for start, stop in zip(starts, stops, strict=True)]


def _run_tiled(
    model: NAFNet,
    lq_hwc: NDArray[np.uint8] | NDArray[np.uint16],
    white: float,
    tile_px: int,
    overlap_px: int,
    autocast: bool,
    on_tile: Callable[[int, int], None],
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    # One band of tiles is blended at a time, so that the float sums never cover the whole photo.
    height, width = lq_hwc.shape[:2]
    restored = np.empty_like(lq_hwc)
    # The network downsamples on a grid: a tile off the whole image's grid gives other pixels, not just seams.
    rows = _spans(height, tile_px, overlap_px, model.config.stride_px)
    cols = _spans(width, tile_px, overlap_px, model.config.stride_px)
    tallest = max(tile_height for _, tile_height in rows)
    total = torch.zeros(tallest, width, lq_hwc.shape[2])
    weight = torch.zeros(tallest, width, 1)
    for index, (top, tile_height) in enumerate(rows):
        for column, (left, tile_width) in enumerate(cols, start=1):
            patch = lq_hwc[top : top + tile_height, left : left + tile_width]
            ramp = (
                _ramp(tile_height, top, height, overlap_px)[:, None, None]
                * _ramp(tile_width, left, width, overlap_px)[None, :, None]
            )
            total[:tile_height, left : left + tile_width] += _run(model, patch, white, autocast) * ramp
            weight[:tile_height, left : left + tile_width] += ramp
            on_tile(index * len(cols) + column, len(rows) * len(cols))
        done = (rows[index + 1][0] if index + 1 < len(rows) else height) - top
        restored[top : top + done] = _quantized(total[:done] / weight[:done], white, lq_hwc.dtype)
        total = torch.cat([total[done:], torch.zeros(done, *total.shape[1:])])
        weight = torch.cat([weight[done:], torch.zeros(done, *weight.shape[1:])])
    return restored


def _ramp(length: int, start: int, total: int, overlap_px: int) -> Tensor:
    """Blend weights along one axis of a tile: rising from an inner edge, flat at the image's own edge."""
    position = torch.arange(length, dtype=torch.float32) + 0.5
    ramp = torch.ones(length)
    if start > 0 and overlap_px:
        ramp = torch.minimum(ramp, position / overlap_px)
    if start + length < total and overlap_px:
        ramp = torch.minimum(ramp, (length - position) / overlap_px)
    return ramp


def _run(
    model: NAFNet, lq_hwc: NDArray[np.uint8] | NDArray[np.uint16], white: float, autocast: bool
) -> Tensor:
    """Run the network on one piece: (H, W, C) integers → (H, W, C) fp32 on the CPU, in 0…1."""
    device = next(model.parameters()).device
    integers = torch.from_numpy(np.ascontiguousarray(lq_hwc).astype(np.int32))
    lq_nchw = integers.to(device).float().div_(white).permute(2, 0, 1)[None]
    height, width = lq_nchw.shape[-2:]
    stride = model.config.stride_px
    bottom, right = -height % stride, -width % stride
    mode = "reflect" if bottom < height and right < width else "replicate"
    padded = F.pad(lq_nchw, (0, right, 0, bottom), mode=mode)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        # Strips pay where maps outgrow the caches: not on a GPU, whose memory is as fast for all of them.
        restored = forward_in_strips(model, padded) if device.type == "cpu" else model(padded)
    return restored[0, :, :height, :width].permute(1, 2, 0).float().cpu()


def _quantized(image: Tensor, white: float, dtype: np.dtype) -> NDArray:
    return image.clamp(0, 1).mul(white).round().numpy().astype(dtype)
