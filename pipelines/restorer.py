"""A model that deblurs arrays, ready to be called from Python.

    from pipelines import Restorer
    restore = Restorer("models:/nafnet-deblur@champion")     # or a weights file, or a run
    restored = restore(rgb_hwc_u8)                           # (H, W, 3) uint8 in, the same out

`restore` and `serve` are built on it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nafnet_core import InputError
from nafnet_core.colour import colour_shift, with_colours_of
from nafnet_core.foreign import ForeignNetwork
from nafnet_core.reduced import merged, reduced
from nafnet_core.tiling import (
    MIN_OVERLAP_PX,
    Image,
    Network,
    TiledImage,
    TileOptions,
    restore_images,
)
from pipelines.models import LoadedModel, open_model
from pipelines.workspace import Workspace

_MIN_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class RestoreSettings:
    """What the pixels depend on beside the model. Raises `InputError` where that cannot be."""

    tile_px: int | None = None
    """Largest side of a tile; None takes the whole image, or the largest tile that fits into free memory."""
    tile_batch: int = 1
    """Equal tiles in one pass through the network, of one image or of several. More than one is for GPUs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bf16 where the processor or the GPU computes in it."""
    scale: float = 1.0
    """Below 1 a smaller image is restored, and what that gains is added to the large one: for blur larger
    than the model was trained on."""
    ensemble: bool = False
    """Mean over the eight flips and quarter turns: eight times the time."""
    keep_colour: bool = False
    """Give the output the low frequencies of the input."""

    def __post_init__(self) -> None:
        if self.tile_px is not None and self.tile_px <= 2 * MIN_OVERLAP_PX:
            raise InputError(
                "tiles too small", expected=f"more than {2 * MIN_OVERLAP_PX} px", got=self.tile_px
            )
        if self.tile_batch < 1:
            raise InputError("tiles at a time", expected="1 or more", got=self.tile_batch)
        if self.precision not in ("auto", "fp32", "bf16"):
            raise InputError("unknown precision", expected="auto, fp32, bf16", got=self.precision)
        if not _MIN_SCALE <= self.scale <= 1:
            raise InputError("the scale to restore at", expected=f"{_MIN_SCALE} to 1", got=self.scale)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Restoration:
    """One restored image, and what was done to it."""

    image: Image
    """The input's shape and dtype."""
    tile_px: int | None
    """What sides of tiles were limited to; None where the image was run whole."""
    num_tiles: int
    num_redone: int
    """Tiles that the network broke, and that came out sound without local statistics."""
    num_kept: int
    """Tiles that the network broke either way, where the input was kept."""
    colour_shift: tuple[float, float, float]
    """Mean of the network's output less mean of the input: red, green and blue, in levels of 8 bit. What
    `keep_colour` mended is told too."""
    seconds: float
    """In the network and around it, without reading and writing."""


class Restorer:
    """Deblurs arrays with one model. Not for several threads at once."""

    def __init__(
        self,
        model: str | LoadedModel | None = None,
        settings: RestoreSettings | None = None,
        *,
        workspace: Path | None = None,
        train_patch_px: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: a weights file, a run, `models:/NAME@ALIAS`, or what `open_model` returned; None takes the
                workspace's champion.
            settings: None takes the defaults.
            workspace: where runs and the registry are; None looks as the command line does.
            train_patch_px: patch side in training, instead of what the model says; 0 turns local statistics
                off.
            device: None takes the GPU if there is one.

        Raises:
            InputError: there is no such model.
        """
        if not isinstance(model, LoadedModel):
            model = open_model(model, Workspace.find(workspace), train_patch_px=train_patch_px)
        self.loaded, self.settings = model, settings or RestoreSettings()
        is_foreign = isinstance(model.model, ForeignNetwork)
        self.device = torch.device(
            "cpu" if is_foreign else device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        self._network = model.model.to(self.device)
        self.precision = _precision(model, self.settings.precision, self.device)
        self.options = TileOptions(
            train_patch_px=model.train_patch_px,
            tile_px=self.settings.tile_px or "auto",
            tile_batch=self.settings.tile_batch,
            autocast=self.precision == "bf16",
            ensemble=self.settings.ensemble,
            guard=True,
        )

    @property
    def network(self) -> Network:
        """The network, on the device, in eval mode."""
        return self._network

    def limit_tiles(self, tile_px: int) -> None:
        """Run no larger tiles than these: where other processes use the same memory."""
        self.options = replace(self.options, tile_px=tile_px)

    def __call__(self, rgb_hwc: Image) -> Image:
        """Restore one image.

        Args:
            rgb_hwc: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) gray, uint8 or uint16, full range. Alpha is
                passed through.

        Returns:
            The same shape and dtype.

        Raises:
            ValueError: another shape or dtype.
        """
        if rgb_hwc.ndim == 3 and rgb_hwc.shape[2] not in (3, 4) or rgb_hwc.ndim not in (2, 3):
            raise ValueError(f"expected (H, W, 3), (H, W, 4) or (H, W), got {rgb_hwc.shape}")
        if rgb_hwc.ndim == 2:
            (result,) = self.stream([np.repeat(rgb_hwc[..., None], 3, axis=2)])
            return result.image.mean(axis=2).round().astype(rgb_hwc.dtype)
        (result,) = self.stream([np.ascontiguousarray(rgb_hwc[..., :3])])
        return result.image if rgb_hwc.shape[2] == 3 else np.dstack([result.image, rgb_hwc[..., 3:]])

    def stream(
        self,
        images: Iterable[Image | None],
        *,
        on_tile: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[Restoration]:
        """Restore one image after the other; equal tiles of neighbours share a batch.

        Args:
            images: (H, W, 3) RGB, uint8 or uint16, full range; None runs the tiles that wait for a fuller
                batch.
            on_tile: called with the tiles done of an image, and all of its tiles.

        Yields:
            The results, in order.
        """
        scale = self.settings.scale
        sources: deque[tuple[Image, Image]] = deque()
        waited_s = 0.0

        def small() -> Iterator[Image | None]:
            nonlocal waited_s
            iterator = iter(images)
            while True:
                start = time.perf_counter()
                try:
                    image = next(iterator)
                except StopIteration:
                    return
                finally:
                    waited_s += time.perf_counter() - start
                if image is None:
                    yield None
                    continue
                sources.append((image, image if scale == 1 else reduced(image, scale)))
                yield sources[-1][1]

        start = time.perf_counter()
        for result in restore_images(self._network, small(), self.options, on_tile=on_tile):
            finished = self._finish(*sources.popleft(), result, start + waited_s)
            start, waited_s = time.perf_counter(), 0.0
            yield finished
            # What the consumer does with it is not our time.
            start = time.perf_counter()

    def _finish(self, image: Image, small: Image, result: TiledImage, start: float) -> Restoration:
        restored: Any = result.restored
        if small is not image:
            restored = merged(image, small, restored)
        shift = colour_shift(image, restored)
        if self.settings.keep_colour:
            restored = with_colours_of(image, restored)
        return Restoration(
            image=restored,
            tile_px=result.tile_px,
            num_tiles=result.num_tiles,
            num_redone=result.num_redone,
            num_kept=result.num_kept,
            colour_shift=shift,
            seconds=time.perf_counter() - start,
        )


def _precision(model: LoadedModel, wanted: str, device: torch.device) -> str:
    """What the network computes in. Raises `InputError` where that is fixed, and another."""
    if (fixed := model.fixed_precision) is not None:
        if wanted not in ("auto", fixed):
            raise InputError(
                "the precision of this model is fixed", file=model.weights, expected=fixed, got=wanted
            )
        return fixed
    if wanted == "auto":
        return "bf16" if computes_in_bf16(device) else "fp32"
    return wanted


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 is worth its rounding: on tensor cores, or processors with bf16 instructions.

    On a CPU `mobile` takes 0.8 and `width32` 0.65 times as long as in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
