"""How much memory a training step takes, told from what autograd keeps for two small patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nafnet_core.losses import Loss
from nafnet_core.model import NAFNet

_BYTES = 4  # parameters, gradients and moments are fp32 in any precision


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """An estimate: the process itself, batches on their way and the allocator's slack are not in it."""

    fixed_bytes: float
    """What does not depend on the patch: copies of weights, and where said weights, gradients and moments."""
    bytes_per_px: float
    """What is kept for each pixel of each sample."""

    def mib(self, patch_px: int, micro_batch: int) -> float:
        """Of a step on `micro_batch` patches."""
        return (self.fixed_bytes + self.bytes_per_px * micro_batch * patch_px**2) / 2**20


def step_memory(model: NAFNet, loss: Loss, *, use_bf16: bool, has_average: bool) -> StepMemory:
    """All that a training step holds."""
    kept = kept_for_backward(model, loss, use_bf16=use_bf16)
    copies = 4 + has_average
    return replace(kept, fixed_bytes=kept.fixed_bytes + copies * _BYTES * model.num_parameters)


def kept_for_backward(model: NAFNet, loss: Loss, *, use_bf16: bool) -> StepMemory:
    """What autograd keeps: `model` and `loss` are run forward on two small patches, and a line drawn.

    With activations checkpointed, the costliest block is added, which the backward pass computes again.
    """
    small_px = 2 * model.config.stride_px
    device = model.intro.weight.device

    def whole(side_px: int) -> None:
        image = torch.rand(1, 3, side_px, side_px, device=device)
        loss(model(image), image)

    def first_block(side_px: int) -> None:
        block = model.encoders[0][0]
        channels = model.config.width
        block(torch.rand(1, channels, side_px, side_px, device=device, requires_grad=True))

    works = [whole]
    if model.checkpoint_activations and len(model.encoders) and len(model.encoders[0]):
        works.append(first_block)
    fixed, per_px = 0.0, 0.0
    for work in works:
        small, large = (_kept_bytes(model, work, side, use_bf16) for side in (small_px, 2 * small_px))
        slope = (large - small) / (3 * small_px**2)
        per_px += slope
        fixed += small - slope * small_px**2
    return StepMemory(fixed_bytes=max(0.0, fixed), bytes_per_px=per_px)


def _kept_bytes(model: nn.Module, work: Callable[[int], None], side_px: int, use_bf16: bool) -> int:
    """Bytes that autograd keeps for the backward pass, the weights themselves left out."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []  # a storage that is given back would be met again as another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)
        return tensor

    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        work(side_px)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)
