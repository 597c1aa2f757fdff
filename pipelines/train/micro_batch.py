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

from nafnet_core.losses import Loss
from nafnet_core.memory import free_memory_mib
from nafnet_core.model import NAFNet
from pipelines.train.step_memory import kept_for_backward

log = logging.getLogger(__name__)

# A step's peak over what is kept: 1.1 to 1.2 with `mobile` and `width32` in both precisions, 1.9 to 2.1
# checkpointed.
_PEAK_OVER_KEPT, _PEAK_CHECKPOINTED = 1.25, 2.2
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

    def run(batch: int) -> None:
        patches = torch.rand(batch, 3, patch_px, patch_px, device=device).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            restored = model(patches)
        loss(restored, patches).sum().backward()

    try:
        if device.type == "cuda":
            fits = largest_that_fits(count, lambda batch: _fits_gpu(lambda: run(batch), device))
        else:
            kept = kept_for_backward(model, loss, use_bf16=use_bf16)
            room = free_memory_mib(device) * 2**20 * _CPU_SHARE / num_workers - kept.fixed_bytes
            peak_over_kept = _PEAK_CHECKPOINTED if model.checkpoint_activations else _PEAK_OVER_KEPT
            fits = int(min(count, max(1, room / (kept.bytes_per_px * patch_px**2 * peak_over_kept))))
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
