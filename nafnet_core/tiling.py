"""Restore an image of any size: whole where it fits, else in overlapping tiles, blended.

    restored = restore_image(model, rgb_hwc_u8, train_patch_px=256)

Source and result stay in host memory; one batch of tiles at a time goes to the model's device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nafnet_core.local_stats import local_statistics
from nafnet_core.memory import free_memory_mib
from nafnet_core.model import NAFNet
from nafnet_core.strips import forward_in_strips

log = logging.getLogger(__name__)

MIN_OVERLAP_PX = 64
# Beyond this a tile saves little overlap, and its maps cost page faults instead of staying in the caches.
MAX_TILE_PX = 1024
MIN_TILE_PX = 192  # The smallest multiple of 64 of which `MIN_OVERLAP_PX` is below half.
# Floats alive at once a pixel at full resolution, in units of `width`: on the CPU in strips (4.3 at most,
# read off allocations at several sizes and windows), elsewhere with every map of a block whole.
_LIVE_MAPS_IN_STRIPS, _LIVE_MAPS_WHOLE = 5, 22
_QUANTIZED_ROWS = 64  # at a time, so that a wide photo's floats are not there three times
_MEMORY_SHARE = 0.5  # of what is free: other processes want some too, and an overrun is the end of this one


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A rectangle of the image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tiling:
    """How an image is cut and run, whatever the side of the tiles."""

    overlap_px: int | None
    batch: int
    train_patch_px: int | None
    autocast: bool
    on_tile: Callable[[int, int], None]


def tile_px_for(model: NAFNet, memory_mib: float) -> int:
    """Side of the largest tile up to `MAX_TILE_PX` whose forward pass fits into `memory_mib`, an estimate.

    A multiple of 64 px, and at least `MIN_TILE_PX`.
    """
    in_strips = next(model.parameters()).device.type == "cpu"
    bytes_per_px = 4 * model.config.width * (_LIVE_MAPS_IN_STRIPS if in_strips else _LIVE_MAPS_WHOLE)
    side = int((memory_mib * 2**20 / bytes_per_px) ** 0.5)
    return min(MAX_TILE_PX, max(MIN_TILE_PX, side // 64 * 64))


def auto_tile_px(model: NAFNet, tile_batch: int = 1) -> int:
    """Side of the largest tiles of which a batch fits into half of what is free on the network's device."""
    free_mib = free_memory_mib(next(model.parameters()).device)
    return tile_px_for(model, free_mib * _MEMORY_SHARE / tile_batch)


@torch.inference_mode()
def restore_image(
    model: NAFNet,
    lq_hwc: NDArray[np.uint8] | NDArray[np.uint16],
    *,
    train_patch_px: int | None,
    tile_px: int | Literal["auto"] | None = "auto",
    overlap_px: int | None = None,
    tile_batch: int = 1,
    autocast: bool = False,
    on_tile: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Restore one image.

    Source and result stay in host memory. Where a GPU runs out of memory, the image is done again with half
    the batch, then with tiles of half the side.

    Args:
        model: the network, in eval mode, on any device.
        lq_hwc: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) gray, uint8 or uint16, full range. Alpha is passed
            through; gray is restored as RGB and averaged.
        train_patch_px: patch side in training, which sets the window of local statistics; None turns them
            off, and then tiles and whole image differ.
        tile_px: largest side of a tile; None runs the whole image at once, `auto` whatever fits into half of
            the free memory, up to 1024 px.
        overlap_px: how far neighbouring tiles overlap, blended by a linear ramp; None takes
            `default_overlap_px`.
        tile_batch: tiles in one forward pass, where neighbours in a row are of one size; more than one is for
            GPUs. With another batch the result may differ by one level.
        autocast: run in bf16.
        on_tile: called after each batch with the tiles done and all tiles; not where the image is run whole.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: another shape or dtype, a patch, tile or batch below 1, an overlap that is not smaller
            than half a tile, or a tile that is too small for the network.
    """
    channels = model.config.img_channel
    if lq_hwc.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"expected uint8 or uint16, got {lq_hwc.dtype}")
    is_gray = lq_hwc.ndim == 2
    image: NDArray[Any] = np.repeat(lq_hwc[..., None], channels, axis=2) if is_gray else lq_hwc
    has_alpha = image.ndim == 3 and channels == 3 and image.shape[2] == 4
    image = image[..., :3] if has_alpha else image
    if image.ndim != 3 or image.shape[2] != channels or 0 in image.shape:
        raise ValueError(f"expected (H, W, {channels}) or (H, W), none of them 0, got {lq_hwc.shape}")
    if tile_batch < 1:
        raise ValueError(f"tile_batch must be at least 1, got {tile_batch}")
    if train_patch_px is not None and train_patch_px < 1:
        raise ValueError(
            f"train_patch_px must be at least 1, or None for no statistics: got {train_patch_px}"
        )
    if tile_px not in ("auto", None) and tile_px < 1:
        raise ValueError(f"tile_px must be at least 1, got {tile_px}")
    if tile_px == "auto":
        tile_px = auto_tile_px(model, tile_batch)
    how = _Tiling(
        overlap_px=overlap_px,
        batch=tile_batch,
        train_patch_px=train_patch_px,
        autocast=autocast,
        on_tile=on_tile,
    )
    with local_statistics(model, train_patch_px):
        restored: NDArray[Any] = _halving(
            lambda side, batch: _restore(model, image, side, replace(how, batch=batch)),
            tile_px,
            tile_batch,
            max(image.shape[:2]),
        )
    if is_gray:
        return restored.mean(axis=2).round().astype(lq_hwc.dtype)
    if has_alpha:
        restored = np.concatenate([restored, lq_hwc[..., 3:]], axis=2)
    return restored


def default_overlap_px(train_patch_px: int | None, tile_px: int) -> int:
    """Overlap of tiles that leaves no seam to see: half a training patch, at least 64 px.

    The window of local statistics grows with the patch, and is cut at a tile's edge. Tiles of 1024 px against
    a whole photo of 1280×720, with `mobile`: at patch 96 69 dB with 64 px; at patch 256 54 dB with 64 px,
    58 dB with 128, and 66 dB with 192.
    """
    return min(max(MIN_OVERLAP_PX, (train_patch_px or 0) // 2), tile_px // 3)


def _halving(
    run: Callable[[int | None, int], NDArray[Any]], tile_px: int | None, batch: int, longest_px: int
) -> NDArray[Any]:
    """`run(tile_px, batch)`; where the GPU's memory is too small for it, with fewer, then smaller tiles."""
    while True:
        try:
            return run(tile_px, batch)
        except torch.OutOfMemoryError:
            side = min(tile_px or longest_px, longest_px)
            if batch > 1:
                batch //= 2
            elif side > MIN_TILE_PX:
                tile_px = max(MIN_TILE_PX, side // 2 // 64 * 64)
            else:
                raise
            log.warning("out of GPU memory: going on with %d tiles of %s px", batch, tile_px or longest_px)
        torch.cuda.empty_cache()


def _restore(model: NAFNet, image: NDArray[Any], tile_px: int | None, how: _Tiling) -> NDArray[Any]:
    if tile_px is None or max(image.shape[:2]) <= tile_px:
        return _quantized(_run(model, np.stack([image]), how.autocast)[0], image.dtype)
    overlap_px = how.overlap_px
    if overlap_px is None:
        overlap_px = default_overlap_px(how.train_patch_px, tile_px)
    if not 0 <= 2 * overlap_px < tile_px:
        raise ValueError(f"overlap {overlap_px} px must be below half of the tile, {tile_px} px")
    if tile_px - overlap_px < model.config.stride_px:
        raise ValueError(
            f"tile {tile_px} px must exceed the overlap, {overlap_px} px, "
            f"by the network's stride, {model.config.stride_px} px"
        )
    return _run_tiled(model, image, tile_px, overlap_px, how)


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


def _run_tiled(
    model: NAFNet, image: NDArray[Any], tile_px: int, overlap_px: int, how: _Tiling
) -> NDArray[Any]:
    # One band of tiles is blended at a time, so that the float sums never cover the whole photo.
    height, width = image.shape[:2]
    restored = np.empty_like(image)
    # The network downsamples on a grid: a tile off the whole image's grid gives other pixels, not just seams.
    rows = _spans(height, tile_px, overlap_px, model.config.stride_px)
    cols = _spans(width, tile_px, overlap_px, model.config.stride_px)
    tallest = max(tile_height for _, tile_height in rows)
    total = torch.zeros(tallest, width, image.shape[2])
    weight = torch.zeros(tallest, width, 1)
    num_done = 0
    for index, (top, tile_height) in enumerate(rows):
        band = image[top : top + tile_height]
        ramp_down = _ramp(tile_height, top, height, overlap_px)[:, None, None]
        for lefts, tile_width in _batches(cols, how.batch):
            batch = np.stack([band[:, left : left + tile_width] for left in lefts])
            for left, piece in zip(lefts, _run(model, batch, how.autocast), strict=True):
                ramp = ramp_down * _ramp(tile_width, left, width, overlap_px)[None, :, None]
                total[:tile_height, left : left + tile_width] += piece * ramp
                weight[:tile_height, left : left + tile_width] += ramp
            num_done += len(lefts)
            how.on_tile(num_done, len(rows) * len(cols))
        done = (rows[index + 1][0] if index + 1 < len(rows) else height) - top
        total[:done] /= weight[:done]
        for row in range(0, done, _QUANTIZED_ROWS):
            part = slice(row, min(row + _QUANTIZED_ROWS, done))
            restored[top + part.start : top + part.stop] = _quantized(total[part], image.dtype)
        for sums in (total, weight):
            kept = sums[done:].clone()
            sums.zero_()
            sums[: len(kept)] = kept
    return restored


def _batches(spans: list[tuple[int, int]], size: int) -> Iterator[tuple[list[int], int]]:
    """Starts of up to `size` consecutive spans of one length, and that length."""
    for length, same in groupby(spans, key=itemgetter(1)):
        starts = [start for start, _ in same]
        for first in range(0, len(starts), size):
            yield starts[first : first + size], length


def _ramp(length: int, start: int, total: int, overlap_px: int) -> Tensor:
    """Blend weights along one axis of a tile: rising from an inner edge, flat at the image's own edge."""
    position = torch.arange(length, dtype=torch.float32) + 0.5
    ramp = torch.ones(length)
    if start > 0 and overlap_px:
        ramp = torch.minimum(ramp, position / overlap_px)
    if start + length < total and overlap_px:
        ramp = torch.minimum(ramp, (length - position) / overlap_px)
    return ramp


def _run(model: NAFNet, images: NDArray[Any], autocast: bool) -> Tensor:
    """Run the network: (N, H, W, C) uint8 or uint16, full range → (N, H, W, C) fp32 on the CPU, about 0…1."""
    device = next(model.parameters()).device
    # torch has few kernels for uint16.
    integers = torch.from_numpy(images.astype(np.int32) if images.dtype == np.uint16 else images)
    if device.type == "cuda":
        integers = integers.pin_memory()
    lq = integers.to(device, non_blocking=True).float().div_(float(np.iinfo(images.dtype).max))
    lq_nchw = lq.permute(0, 3, 1, 2)
    height, width = lq_nchw.shape[-2:]
    stride = model.config.stride_px
    bottom, right = -height % stride, -width % stride
    mode = "reflect" if bottom < height and right < width else "replicate"
    padded = F.pad(lq_nchw, (0, right, 0, bottom), mode=mode)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        # Strips pay where maps outgrow the caches: not on a GPU, whose memory is as fast for all of them.
        restored = forward_in_strips(model, padded) if device.type == "cpu" else model(padded)
    return restored[..., :height, :width].permute(0, 2, 3, 1).float().cpu()


def _quantized(image: Tensor, dtype: np.dtype) -> NDArray:
    return image.clamp(0, 1).mul(float(np.iinfo(dtype).max)).round().numpy().astype(dtype)
