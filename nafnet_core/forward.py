"""How a batch goes through a network: in strips on a CPU, on a GPU as a CUDA graph where that pays.

A graph is launched as a whole: of a pass of thousands of small kernels, launching them one by one takes
longer than running them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nafnet_core.model import NAFNet
from nafnet_core.recording import recorded, warm_up
from nafnet_core.strips import forward_in_strips

Forward = Callable[[Tensor], Tensor]
"""(N, C, H, W) → the same shape; the next call may overwrite what it returned."""

_MOST_SHAPES = 8
_LAUNCHED_FIRST = 8  # passes of a shape before it is recorded, which takes as long as some four
_WARMUP_PASSES = 2


def forward_of(model: nn.Module, device: torch.device, *, autocast: bool, bytes_per_px: int) -> Forward:
    """The way for a network on this device; for the arguments see `RecordedForward`."""
    if not isinstance(model, NAFNet):
        return model
    # Strips pay where maps outgrow the caches: not on a GPU, whose memory is as fast for all of them.
    if device.type == "cpu":
        return partial(forward_in_strips, model)
    if not model.is_recordable:
        return model
    return RecordedForward(model, autocast=autocast, bytes_per_px=bytes_per_px)


def ensemble(forward: Forward, lq: Tensor) -> Tensor:
    """Mean over the eight symmetries of the square, each undone after the network."""
    total = torch.zeros_like(lq)
    for turns in range(4):
        for is_flipped in (False, True):
            turned = lq.rot90(turns, (2, 3))
            turned = turned.flip(3) if is_flipped else turned
            restored = forward(turned).float()
            restored = restored.flip(3) if is_flipped else restored
            total += restored.rot90(-turns, (2, 3))
    return total / 8


class RecordedForward:
    """Records the shapes that come again and again: tiles, frames, photos of one camera.

    Args:
        forward: (N, C, H, W) on a GPU → a batch; it waits for nothing on the device.
        autocast: whether it runs under autocast to bf16.
        bytes_per_px: memory of a pass for a pixel of its input. Without room for two none is recorded.
    """

    def __init__(self, forward: Forward, *, autocast: bool, bytes_per_px: int) -> None:
        self._forward, self._autocast, self._bytes_per_px = forward, autocast, bytes_per_px
        self._times_seen: Counter[torch.Size] = Counter()
        self._pool: Any = None
        self._graphs: OrderedDict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()

    def __call__(self, lq: Tensor) -> Tensor:
        """What `forward` returns; the next call may overwrite it."""
        with torch.cuda.device(lq.device):
            try:
                return self._replayed(lq) if self._is_recorded(lq) else self._run(lq)
            except torch.OutOfMemoryError:
                pass
            # Once more without graphs. Not inside the handler, where the error keeps what it ran out of.
            self._graphs.clear()
            self._times_seen.clear()
            self._pool = None
            torch.cuda.empty_cache()
            return self._run(lq)

    def _is_recorded(self, lq: Tensor) -> bool:
        if lq.shape in self._graphs:
            return True
        self._times_seen[lq.shape] += 1
        if self._times_seen[lq.shape] <= _LAUNCHED_FIRST or not self._has_room(lq):
            return False
        if len(self._graphs) == _MOST_SHAPES:
            dropped, _ = self._graphs.popitem(last=False)
            del self._times_seen[dropped]
        self._graphs[lq.shape] = self._record(lq)
        return True

    def _has_room(self, lq: Tensor) -> bool:
        needed = lq.numel() // lq.shape[1] * self._bytes_per_px
        return torch.cuda.mem_get_info(lq.device)[0] > 2 * needed

    def _replayed(self, lq: Tensor) -> Tensor:
        self._graphs.move_to_end(lq.shape)
        graph, source, result = self._graphs[lq.shape]
        source.copy_(lq)
        graph.replay()
        return result

    def _record(self, lq: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        source = lq.clone()
        warm_up(lambda: self._run(source), passes=_WARMUP_PASSES)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, result = recorded(lambda: self._run(source), pool=self._pool)
        return graph, source, result

    def _run(self, lq: Tensor) -> Tensor:
        # Weights that were rounded before would not be in the graph, and gone when it is replayed.
        with torch.autocast(
            lq.device.type, dtype=torch.bfloat16, enabled=self._autocast, cache_enabled=False
        ):
            return self._forward(lq)
