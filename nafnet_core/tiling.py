"""Restore images of any size: whole where they fit, else in overlapping tiles, blended.

    restored = restore_image(model, rgb_hwc_u8, train_patch_px=256)

Source and result stay in host memory; one batch of tiles at a time goes to the model's device.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nafnet_core.artefacts import is_broken
from nafnet_core.canvas import Canvas, Tile
from nafnet_core.foreign import ForeignNetwork
from nafnet_core.forward import Forward, ensemble, forward_of
from nafnet_core.local_stats import local_statistics
from nafnet_core.memory import free_memory_mib
from nafnet_core.model import NAFNet
from nafnet_core.strips import convolutions_in_bf16

log = logging.getLogger(__name__)

MIN_OVERLAP_PX = 64
# Beyond this a tile saves little overlap, and its maps cost page faults instead of staying in the caches.
MAX_TILE_PX = 1024
MIN_TILE_PX = 192  # The smallest multiple of 64 of which `MIN_OVERLAP_PX` is below half.
# Floats alive at once a pixel at full resolution, in units of `width`: on the CPU in strips (4.3 at most,
# read off allocations at several sizes and windows), elsewhere with every map of a block whole.
_LIVE_MAPS_IN_STRIPS, _LIVE_MAPS_WHOLE = 5, 22
_MEMORY_SHARE = 0.5  # of what is free: other processes want some too, and an overrun is the end of this one

Image = NDArray[np.uint8] | NDArray[np.uint16]
Network = NAFNet | ForeignNetwork


@dataclass(frozen=True, kw_only=True, slots=True)
class TileOptions:
    """How images are cut and run. Raises `ValueError` where that cannot be."""

    train_patch_px: int | None
    """Patch side in training, which sets the window of local statistics; None turns them off, and then tiles
    and whole image differ."""
    tile_px: int | Literal["auto"] | None = "auto"
    """Largest side of a tile; None runs whole images, `auto` whatever fits into half of the free memory, up
    to 1024 px."""
    overlap_px: int | None = None
    """How far neighbouring tiles overlap; None takes `default_overlap_px`."""
    tile_batch: int = 1
    """Tiles in one forward pass, where neighbours, of one image or of the next, are of one size. More than
    one is for GPUs. With another batch the result may differ by one level."""
    autocast: bool = False
    """Run in bf16."""
    ensemble: bool = False
    """Average over the eight flips and quarter turns, for eight times the time ("self-ensemble", Timofte et
    al., CVPR 2016, section 3.5)."""
    guard: bool = False
    """Look for tiles that the network broke (`artefacts.is_broken`): they are run again without local
    statistics, and keep the input where that is broken too."""

    def __post_init__(self) -> None:
        if self.tile_batch < 1:
            raise ValueError(f"tile_batch must be at least 1, got {self.tile_batch}")
        if self.train_patch_px is not None and self.train_patch_px < 1:
            raise ValueError(
                f"train_patch_px must be at least 1, or None for no statistics: got {self.train_patch_px}"
            )
        if self.tile_px not in ("auto", None) and self.tile_px < 1:
            raise ValueError(f"tile_px must be at least 1, got {self.tile_px}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledImage:
    """A restored image, and how it came about."""

    restored: Image
    num_tiles: int
    tile_px: int | None
    """What sides of tiles were limited to; None where the image was run whole."""
    num_redone: int
    """Tiles that were broken, and sound without local statistics."""
    num_kept: int
    """Tiles where the input was kept."""


def tile_px_for(model: Network, memory_mib: float) -> int:
    """Side of the largest tile up to `MAX_TILE_PX` whose forward pass fits into `memory_mib`, an estimate.

    A multiple of 64 px, and at least `MIN_TILE_PX`.
    """
    side = int((memory_mib * 2**20 / _bytes_per_px(model)) ** 0.5)
    return min(MAX_TILE_PX, max(MIN_TILE_PX, side // 64 * 64))


def _bytes_per_px(model: Network) -> int:
    in_strips = isinstance(model, NAFNet) and _device(model).type == "cpu"
    return 4 * model.config.width * (_LIVE_MAPS_IN_STRIPS if in_strips else _LIVE_MAPS_WHOLE)


def auto_tile_px(model: Network, tile_batch: int = 1) -> int:
    """Side of the largest tiles of which a batch fits into half of what is free on the network's device."""
    free_mib = free_memory_mib(_device(model))
    return tile_px_for(model, free_mib * _MEMORY_SHARE / tile_batch)


def default_overlap_px(train_patch_px: int | None, tile_px: int) -> int:
    """Overlap of tiles that leaves no seam to see: half a training patch, at least 64 px.

    The window of local statistics grows with the patch, and is cut at a tile's edge. Tiles of 1024 px against
    a whole photo of 1280×720, with `mobile`: at patch 96 69 dB with 64 px; at patch 256 54 dB with 64 px,
    58 dB with 128, and 66 dB with 192.
    """
    return min(max(MIN_OVERLAP_PX, (train_patch_px or 0) // 2), tile_px // 3)


def restore_image(
    model: Network,
    lq_hwc: Image,
    *,
    train_patch_px: int | None,
    tile_px: int | Literal["auto"] | None = "auto",
    overlap_px: int | None = None,
    tile_batch: int = 1,
    autocast: bool = False,
    on_tile: Callable[[int, int], None] = lambda done, total: None,
) -> Image:
    """Restore one image; see `restore_images` and `TileOptions`.

    Args:
        model: the network, in eval mode, on any device.
        lq_hwc: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) gray, uint8 or uint16, full range.
        train_patch_px, tile_px, overlap_px, tile_batch, autocast: as in `TileOptions`.
        on_tile: called after each batch with the tiles done and all tiles; not where the image is run whole.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: as `restore_images` and `TileOptions`.
    """
    options = TileOptions(
        train_patch_px=train_patch_px,
        tile_px=tile_px,
        overlap_px=overlap_px,
        tile_batch=tile_batch,
        autocast=autocast,
    )
    (result,) = restore_images(model, [lq_hwc], options, on_tile=on_tile)
    return result.restored


@torch.inference_mode()
def restore_images(
    model: Network,
    images: Iterable[Image | None],
    options: TileOptions,
    *,
    on_tile: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[TiledImage]:
    """Restore one image after the other, with equal tiles of neighbours in one batch.

    Where a GPU runs out of memory, batches are halved, then the sides of tiles, for the rest of the images
    as well.

    Args:
        model: the network, in eval mode, on any device; not to be used elsewhere meanwhile.
        images: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) gray, uint8 or uint16, full range. Alpha is passed
            through; gray is restored as RGB and averaged. Each is asked for when the tiles before it have
            been run or fill no batch; None has these run.
        options: how.
        on_tile: called after each batch with the tiles done of an image and all of its tiles; not where it is
            run whole.

    Yields:
        As many results, in order, of the inputs' shapes and dtypes.

    Raises:
        ValueError: another shape or dtype, an overlap that is not smaller than half a tile, or a tile that is
            too small for the network.
    """
    if isinstance(model, ForeignNetwork):
        options = replace(options, autocast=False)
    elif options.autocast and _device(model).type == "cpu":
        model = convolutions_in_bf16(model)
        options = replace(options, autocast=False)
    runner = _Runner(model, options, on_tile)
    waiting: deque[_Work] = deque()
    with local_statistics(model, options.train_patch_px):
        for image in images:
            if image is None:
                runner.flush()
            else:
                waiting.append(runner.begin(image))
                runner.add(waiting[-1])
            while waiting and waiting[0].canvas.is_whole:
                yield waiting.popleft().result()
        runner.flush()
        yield from (work.result() for work in waiting)


class _Work:
    """One image on its way."""

    def __init__(self, image: Image, channels: int) -> None:
        if image.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"expected uint8 or uint16, got {image.dtype}")
        self.source, self.is_gray = image, image.ndim == 2
        rgb: NDArray[Any] = np.repeat(image[..., None], channels, axis=2) if self.is_gray else image
        self.has_alpha = rgb.ndim == 3 and channels == 3 and rgb.shape[2] == 4
        self.rgb = rgb[..., :3] if self.has_alpha else rgb
        if self.rgb.ndim != 3 or self.rgb.shape[2] != channels or 0 in self.rgb.shape:
            raise ValueError(f"expected (H, W, {channels}) or (H, W), none of them 0, got {image.shape}")
        self.canvas: Canvas
        self.tile_px: int | None
        self.num_done = self.num_redone = self.num_kept = 0

    def cut(self, tile_px: int | None, options: TileOptions, stride_px: int) -> None:
        """Begin, or begin anew, in tiles of this side."""
        self.num_done = self.num_redone = self.num_kept = 0
        self.tile_px = tile_px
        if tile_px is None or max(self.rgb.shape[:2]) <= tile_px:
            self.tile_px = None
            self.canvas = Canvas(self.rgb, tile_px=None, overlap_px=0)
            return
        overlap_px = options.overlap_px
        if overlap_px is None:
            overlap_px = default_overlap_px(options.train_patch_px, tile_px)
        if not 0 <= 2 * overlap_px < tile_px:
            raise ValueError(f"overlap {overlap_px} px must be below half of the tile, {tile_px} px")
        if tile_px - overlap_px < stride_px:
            raise ValueError(
                f"tile {tile_px} px must exceed the overlap, {overlap_px} px, "
                f"by the network's stride, {stride_px} px"
            )
        self.canvas = Canvas(self.rgb, tile_px=tile_px, overlap_px=overlap_px, stride_px=stride_px)

    def result(self) -> TiledImage:
        restored: NDArray[Any] = self.canvas.restored
        if self.is_gray:
            restored = restored.mean(axis=2).round().astype(restored.dtype)
        if self.has_alpha:
            restored = np.concatenate([restored, self.source[..., 3:]], axis=2)
        return TiledImage(
            restored=restored,
            num_tiles=len(self.canvas.tiles),
            tile_px=self.tile_px,
            num_redone=self.num_redone,
            num_kept=self.num_kept,
        )


class _Runner:
    """Tiles in, a batch of equal ones at a time through the network, and back to their images."""

    def __init__(self, model: Network, options: TileOptions, on_tile: Callable[[int, int], None]) -> None:
        self._model, self._options, self._on_tile = model, options, on_tile
        self._forward = _forward_of(model, options)
        side = options.tile_px
        self._tile_px = auto_tile_px(model, options.tile_batch) if side == "auto" else side
        self._batch_size = options.tile_batch
        self._batch: list[tuple[_Work, Tile]] = []

    def begin(self, image: Image) -> _Work:
        config = self._model.config
        work = _Work(image, config.img_channel)
        work.cut(self._tile_px, self._options, config.stride_px)
        return work

    def add(self, work: _Work) -> None:
        """Run all tiles of an image but those that wait for a fuller batch."""
        canvas = work.canvas
        for tile in canvas.tiles:
            if self._batch and not _alike(self._batch[0], (work, tile)):
                self.flush()
            if work.canvas is canvas:  # else it did not fit, and was done in smaller tiles meanwhile
                self._batch.append((work, tile))
            if len(self._batch) >= self._batch_size:
                self.flush()

    def flush(self) -> None:
        """Run the tiles that wait."""
        batch, self._batch = self._batch, []
        while batch:
            part = batch[: self._batch_size]
            work, longest = part[0][0], max(part[0][0].rgb.shape[:2])
            side = longest if self._tile_px is None else min(self._tile_px, longest)
            try:
                self._run(part)
                batch = batch[len(part) :]
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1 and side <= MIN_TILE_PX:
                    raise
            # Not inside the handler, where the error keeps what it ran out of alive.
            torch.cuda.empty_cache()
            if len(part) > 1:
                self._batch_size = len(part) // 2
            else:
                self._tile_px = max(MIN_TILE_PX, side // 2 // 64 * 64)
                work.cut(self._tile_px, self._options, self._model.config.stride_px)
                batch = [*((work, tile) for tile in work.canvas.tiles), *_without(work, batch)]
            log.warning("out of GPU memory: going on with %d tiles of %s px", self._batch_size, self._tile_px)

    def _run(self, batch: list[tuple[_Work, Tile]]) -> None:
        images = np.stack([work.canvas.piece(tile) for work, tile in batch])
        pieces = _run(self._model, images, self._options, self._forward)
        redone, kept = self._mend(images, pieces) if self._options.guard else ([], [])
        for index, (work, tile) in enumerate(batch):
            work.canvas.put(tile, pieces[index])
            work.num_done += 1
            work.num_redone += index in redone
            work.num_kept += index in kept
        work = batch[-1][0]
        if len(work.canvas.tiles) > 1:
            self._on_tile(work.num_done, len(work.canvas.tiles))

    def _mend(self, images: NDArray[Any], pieces: Tensor) -> tuple[list[int], list[int]]:
        """Put sound ones in the place of broken pieces; returns which were run again, and which are input."""
        lq = torch.from_numpy(images.astype(np.float32)) / float(np.iinfo(images.dtype).max)
        broken = is_broken(lq, pieces).nonzero().flatten().tolist()
        redone: list[int] = []
        network = _in_torch(self._model)
        if broken and network is not None and self._options.train_patch_px is not None:
            forward = _forward_of(network, self._options)
            with local_statistics(network, None):
                for index in broken:
                    again = _run(network, images[index : index + 1], self._options, forward)
                    if not is_broken(lq[index : index + 1], again).item():
                        pieces[index] = again[0]
                        redone.append(index)
        kept = [index for index in broken if index not in redone]
        for index in kept:
            pieces[index] = lq[index]
        return redone, kept


def _in_torch(model: Network) -> NAFNet | None:
    if isinstance(model, ForeignNetwork):
        return None if model.in_torch is None else model.in_torch()
    return model


def _forward_of(model: Network, options: TileOptions) -> Forward:
    return forward_of(model, _device(model), autocast=options.autocast, bytes_per_px=_bytes_per_px(model))


def _device(model: Network) -> torch.device:
    return torch.device("cpu") if isinstance(model, ForeignNetwork) else next(model.parameters()).device


def _without(work: _Work, batch: list[tuple[_Work, Tile]]) -> Iterator[tuple[_Work, Tile]]:
    return ((other, tile) for other, tile in batch if other is not work)


def _alike(first: tuple[_Work, Tile], second: tuple[_Work, Tile]) -> bool:
    (work, tile), (other_work, other) = first, second
    same_size = (tile.height, tile.width) == (other.height, other.width)
    return same_size and work.rgb.dtype == other_work.rgb.dtype


def _run(model: Network, images: NDArray[Any], options: TileOptions, forward: Forward) -> Tensor:
    """Run the network: (N, H, W, C) uint8 or uint16, full range → (N, H, W, C) fp32 on the CPU, about 0…1."""
    device = _device(model)
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
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.autocast):
        restored = ensemble(forward, padded) if options.ensemble else forward(padded)
    return restored[..., :height, :width].permute(0, 2, 3, 1).float().cpu()
