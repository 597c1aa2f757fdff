"""Forward and backward pass on a GPU as one CUDA graph, launched as a whole and not kernel by kernel.

A pass is thousands of small kernels, and Python launches them more slowly than a GPU is done with them.
Gradients of all parameters lie in one buffer, where a graph, which writes to fixed addresses, adds to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from nafnet_core.recording import recorded, warm_up

Pass = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""lq and gt, (N, P, P, 3) uint8 on the device, and the size of the global batch → loss and PSNR of this part.

It adds to the gradients of the parameters, and waits for nothing on the device.
"""

_Key = tuple[torch.Size, int]  # shape of the images, and the size of the global batch
_WARMUP_PASSES = 3  # as many as torch's notes on CUDA graphs take


@dataclass(frozen=True, kw_only=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    lq: Tensor
    gt: Tensor
    results: tuple[Tensor, Tensor]


class GraphedPasses:
    """A pass, recorded once for each shape of its batches, and the gradients it adds to.

    Args:
        parameters: of the network, on a GPU.
        run: what is recorded.
    """

    def __init__(self, parameters: list[nn.Parameter], run: Pass) -> None:
        self._parameters, self._run = parameters, run
        self._graphs: dict[_Key, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        ends = np.cumsum([p.numel() for p in parameters]).tolist()
        # In each parameter's own layout, which the optimiser's fused step wants.
        self._gradients = [
            self._flat.as_strided(p.shape, p.stride(), end - p.numel())
            for p, end in zip(parameters, ends, strict=True)
        ]

    def begin(self) -> None:
        """Gradients of zero, before the passes of a step."""
        self._flat.zero_()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def __call__(
        self, lq: NDArray[np.uint8], gt: NDArray[np.uint8], global_batch: int
    ) -> tuple[Tensor, Tensor]:
        """One pass over (N, P, P, 3) uint8; the next one may overwrite the results."""
        lq, gt = (torch.from_numpy(np.ascontiguousarray(image)).pin_memory() for image in (lq, gt))
        key = (lq.shape, global_batch)
        if key not in self._graphs:
            self._record(key, lq, gt)
        graph = self._graphs[key]
        graph.lq.copy_(lq, non_blocking=True)
        graph.gt.copy_(gt, non_blocking=True)
        graph.graph.replay()
        return graph.results

    def sum_over_workers(self, *, in_bf16: bool) -> None:
        """Gradients of the whole batch on every worker, behind the last pass of a step."""
        sent = self._flat.bfloat16() if in_bf16 else self._flat
        dist.all_reduce(sent)
        if in_bf16:
            self._flat.copy_(sent)

    def release(self) -> None:
        """Give back the memory of the passes, which are recorded anew when they come again."""
        torch.cuda.synchronize(self._flat.device)
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def _record(self, key: _Key, lq: Tensor, gt: Tensor) -> None:
        before = self._flat.clone()  # passes of this step may have been; those that warm up must not count
        # Parts of the same step are kept, but recorded again: to warm up takes the memory that they hold.
        parts = {
            other: (graph.lq, graph.gt)
            for other, graph in self._graphs.items()
            if (other[0][1:], other[1]) == (key[0][1:], key[1])
        }
        self.release()
        lq, gt = parts[key] = lq.to(self._flat.device), gt.to(self._flat.device)
        warm_up(partial(self._run, lq, gt, key[1]), passes=_WARMUP_PASSES)
        for part, (lq, gt) in parts.items():
            graph, results = recorded(partial(self._run, lq, gt, part[1]), pool=self._pool)
            self._graphs[part] = _Graph(graph=graph, lq=lq, gt=gt, results=results)
        self._flat.copy_(before)
