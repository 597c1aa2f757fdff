"""The network of one worker among others: how its gradients become those of the whole batch."""

# Without `from __future__ import annotations`: DDP compares a hook's annotations with its classes.

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pipelines.config.sections import ScalingSection


def replicated(network: nn.Module, scaling: ScalingSection, device: torch.device) -> DistributedDataParallel:
    """`network`, its gradients averaged over all workers during each backward pass."""
    replica = DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        bucket_cap_mb=scaling.bucket_mib,
        gradient_as_bucket_view=True,
    )
    if scaling.gradient_compression == "bf16":
        replica.register_comm_hook(None, _mean_in_bf16)
    return replica


def _mean_in_bf16(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> Future[Tensor]:
    """Sum a bucket in bf16, which has the range of fp32: what is not finite stays so, on all ranks.

    As torch's `bf16_compress_hook`, which DDP refuses without NCCL, and which rounds a second time where the
    number of workers is no power of two.
    """
    gradient = bucket.buffer()
    small = torch.empty_like(gradient, dtype=torch.bfloat16)
    torch.div(gradient, dist.get_world_size(group), out=small)
    summed = dist.all_reduce(small, group=group, async_op=True).get_future()
    return summed.then(lambda future: gradient.copy_(future.value()[0]))
