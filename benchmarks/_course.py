"""The course of a training step in one process of one thread: when which gradients are ready."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._scaling_model import Step
from pipelines.config import RunConfig
from pipelines.ingest import PatchBatch
from pipelines.train.trainer import TrainContext, Trainer

_NUM_WARM_UPS = 2
_TOTAL_SAMPLES = 10**9


def random_batch(patch_px: int, batch: int, seed: int = 0) -> PatchBatch:
    """Noise: a step takes the same time on it as on photos."""
    shape = (2, batch, patch_px, patch_px, 3)
    lq, gt = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return PatchBatch(samples=np.arange(batch), lq=lq, gt=gt)


def bare_context(run_dir: Path, rank: int, world_size: int) -> TrainContext:
    """A worker on the CPU whose batches are given to it by hand."""
    return TrainContext(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        run_dir=run_dir,
        batches=lambda span: iter(()),  # type: ignore[arg-type, return-value]  # never called
        epoch_samples=1,
        store_digests=(),
    )


def course(config: RunConfig, patch_px: int, batch: int, rounds: int = 7) -> Step:
    """A step put together from the shortest time between one gradient and the next: others only add to it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = Trainer(config, bare_context(Path(run_dir), 0, 1))
    sizes: list[int] = []
    times: list[float] = []

    def note(gradient_of: Tensor) -> None:
        sizes.append(gradient_of.numel() * gradient_of.element_size())
        times.append(time.perf_counter())

    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    trainer.loss = _marking(trainer.loss, times)
    patches, intervals = random_batch(patch_px, batch), []
    for _ in range(_NUM_WARM_UPS + rounds):
        sizes.clear()
        times.clear()
        start = time.perf_counter()
        trainer.step(patches, batch, _TOTAL_SAMPLES)
        intervals.append(np.diff([start, *times, time.perf_counter()]))
    forward_s, *of_backward, rest_s = np.min(intervals[_NUM_WARM_UPS:], axis=0).tolist()
    ready_s = np.cumsum(of_backward).tolist()
    return Step(
        forward_s=forward_s,
        backward_s=ready_s[-1],
        rest_s=rest_s,
        sizes_bytes=tuple(sizes),
        ready_s=tuple(ready_s),
    )


def _marking(loss: Any, times: list[float]) -> Any:
    """`loss`, noting when it was taken: there the backward pass begins."""

    def marked(*images: Tensor) -> Tensor:
        value = loss(*images)
        times.append(time.perf_counter())
        return value

    return marked
