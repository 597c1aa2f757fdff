"""How many samples fit into one forward and backward pass of a worker.

On a GPU that is found by trying; on a CPU, where a failed attempt would end the process, it is estimated from
what autograd keeps of a small patch. The result is pinned in the checkpoint: another grouping of the same
samples sums their gradients in another order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nafnet_core.losses import Loss
from nafnet_core.memory import free_memory_mib
from nafnet_core.model import NAFNet

log = logging.getLogger(__name__)

_PROBE_PX = 48
# A step's peak over what is counted here was 0.99 to 1.10, in fp32 and bf16, `mobile` and `width32`.
_PEAK_OVER_KEPT = 1.15
_CPU_SHARE = 0.7  # of free memory; the rest is for readers and the page cache
_GPU_SHARE = 0.92


def fitting_micro_batch(
    model: NAFNet, loss: Loss, patch_px: int, count: int, *, use_bf16: bool, num_workers: int
) -> int:
    """Largest number of samples, up to `count`, that one worker can take in one pass.

    Passes are made as equal as can be: of 10 samples where 8 would fit, 5 and 5.

    Args:
        model: on its device; its gradients are dropped.
        loss: as it is trained with.
        patch_px: side of the patches.
        count: samples of this worker in a global batch.
        use_bf16: whether autocast is on.
        num_workers: workers that may share this machine's memory; of GPUs each has its own.
    """
    device = next(model.parameters()).device

    def run(batch: int, side: int) -> None:
        patches = torch.rand(batch, 3, side, side, device=device).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            restored = model(patches)
        loss(restored, patches).sum().backward()

    try:
        if device.type == "cuda":
            fits = largest_that_fits(count, lambda batch: _fits_gpu(lambda: run(batch, patch_px), device))
        else:
            fixed, each = _linear(
                lambda side: kept_bytes(lambda: run(1, side)), model.config.stride_px, patch_px
            )
            room = free_memory_mib(device) * 2**20 * _CPU_SHARE / num_workers
            fits = int(min(count, max(1, (room - fixed) / (each * _PEAK_OVER_KEPT))))
    finally:
        model.zero_grad(set_to_none=True)
    micro = math.ceil(count / math.ceil(count / fits))
    if micro < count:
        log.info(
            "%d of %d samples of %d px fit into one pass: gradients are accumulated", micro, count, patch_px
        )
    return micro


def largest_that_fits(count: int, fits: Callable[[int], bool]) -> int:
    """Halve `count` until it fits; 1 where nothing does, which then fails with the device's own message."""
    while count > 1 and not fits(count):
        count = math.ceil(count / 2)
    return count


def kept_bytes(step: Callable[[], None]) -> int:
    """What autograd keeps between the forward and the backward pass of `step`, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(kept: Tensor) -> Tensor:
        if not kept.is_leaf or not kept.requires_grad:  # parameters are there anyway
            storage = kept.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        step()
    return sum(storages.values())


def _linear(bytes_of: Callable[[int], int], stride_px: int, patch_px: int) -> tuple[float, float]:
    """Bytes kept whatever the patch's size, copies of weights for one, and those of a patch of `patch_px`."""
    small = stride_px * max(1, _PROBE_PX // stride_px)
    areas = (small**2, (2 * small) ** 2)
    low, high = bytes_of(small), bytes_of(2 * small)
    slope = (high - low) / (areas[1] - areas[0])
    return max(0.0, low - slope * areas[0]), slope * patch_px**2


def _fits_gpu(step: Callable[[], None], device: torch.device) -> bool:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return (
        torch.cuda.max_memory_reserved(device)
        <= torch.cuda.get_device_properties(device).total_memory * _GPU_SHARE
    )
