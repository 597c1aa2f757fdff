"""Rank 0's log of metrics: JSON lines in the run's storage, which the driver sends on to the tracker."""

from __future__ import annotations

import json
import time

import torch
from torch import Tensor

from pipelines.ingest import Stopwatch
from pipelines.train.files import METRICS
from pipelines.train.trainer import StepResult, TrainContext, Trainer


class Journal:
    """Appends `{"time", "samples", "metrics", "event"?}` lines; on other ranks than 0 it writes nothing."""

    def __init__(self, context: TrainContext, every_s: float) -> None:
        self._file = (context.run_dir / METRICS).open("a") if context.rank == 0 else None
        self._every_s, self._last = every_s, time.monotonic()
        self._samples, self._waited_s = 0, 0.0
        self._steps: list[tuple[Tensor, Tensor]] = []

    def step(self, trainer: Trainer, result: StepResult, watch: Stopwatch) -> None:
        now = time.monotonic()
        self._steps.append((result.loss, result.psnr_db))
        if self._samples == 0:
            self._samples = trainer.samples
            self._last, self._waited_s = now, watch.waited_s
        if now - self._last < self._every_s:
            return
        elapsed = now - self._last
        losses, psnrs = (torch.stack(values).mean() for values in zip(*self._steps, strict=True))
        row = {
            "train/loss": float(losses),
            "train/psnr_db": float(psnrs),
            "train/lr": result.lr,
            "train/grad_norm": float(result.grad_norm),
            "train/samples_per_s": (trainer.samples - self._samples) / elapsed,
            "train/data_wait": max(0.0, watch.waited_s - self._waited_s) / elapsed,
            "train/skipped_steps": trainer.skipped,
        }
        self.write(trainer.samples, row)
        self._steps.clear()
        self._last, self._samples, self._waited_s = now, trainer.samples, watch.waited_s

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def write(self, samples: int, metrics: dict[str, float], event: str | None = None) -> None:
        if self._file is None:
            return
        line = {"time": time.time(), "samples": samples, "metrics": metrics}
        if event:
            line["event"] = event
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
