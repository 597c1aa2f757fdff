"""Rank 0's log of metrics: JSON lines in the run's storage, which the driver sends on to the tracker.

A run that goes on after a kill takes up at a checkpoint, older than its last rows, and trains their samples
again. What is in the journal already is not written a second time, and the next row covers the samples from
there on: each curve has each sample once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from pipelines.ingest import Stopwatch
from pipelines.train.files import METRICS
from pipelines.train.trainer import StepResult, TrainContext, Trainer

log = logging.getLogger(__name__)

_BYTES_A_MAXRSS = 1 if sys.platform == "darwin" else 1024


class Journal:
    """Appends `{"time", "samples", "metrics", "event"?}` lines; on other ranks than 0 it writes nothing."""

    def __init__(self, context: TrainContext, every_s: float) -> None:
        self._device, self._every_s = context.device, every_s
        self._newest: dict[str, int] = {}  # metric → samples of its newest row
        self._file = None
        if context.rank == 0:
            path = context.run_dir / METRICS
            self._newest = _repaired(path)
            self._file = path.open("ab", buffering=0)
        self._unwritten: list[bytes] = []
        self._window: _Window | None = None

    def step(self, trainer: Trainer, result: StepResult, watch: Stopwatch) -> None:
        """Note a step; those of some seconds make a row."""
        if self._file is None or trainer.samples <= self._newest.get("train/loss", 0):
            return
        if self._window is None:
            # From after this step: the first one of all waits for readers to start.
            self._window = _Window(trainer.samples, watch)
        self._window.add(trainer, result, watch)
        if self._window.seconds >= self._every_s:
            self._end_window()

    def flush(self) -> None:
        """Write the row of the steps since the last one, and sync the file.

        Before a checkpoint: a run that goes on from there does not take these steps again.
        """
        self._end_window()
        self._write_out(sync=True)

    def write(self, samples: int, metrics: dict[str, float], event: str | None = None) -> None:
        """A row of its own, after that of the steps before it; metrics written already are left out."""
        self._end_window()
        self._append(samples, metrics, event)
        self.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._write_out(sync=True)
            self._file.close()

    def _end_window(self) -> None:
        if self._window is None or not self._window.steps:
            return
        self._append(self._window.samples, {**self._window.metrics(), **_memory(self._device)}, None)
        self._window = self._window.next()

    def _append(self, samples: int, metrics: dict[str, float], event: str | None) -> None:
        if self._file is None:
            return
        # `total_samples`, in no group, is no curve: each attempt says it.
        new = {
            name: value
            for name, value in metrics.items()
            if "/" not in name or samples > self._newest.get(name, -1)
        }
        if not new and event is None:
            return
        self._newest |= dict.fromkeys(new, samples)
        line = {"time": time.time(), "samples": samples, "metrics": new}
        if event:
            line["event"] = event
        self._unwritten.append(json.dumps(line).encode() + b"\n")
        self._write_out(sync=False)

    def _write_out(self, *, sync: bool) -> None:
        """Write what there is, whole lines; where the disk is full they are kept, and tried again."""
        if self._file is None:
            return
        content, start = b"".join(self._unwritten), self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(start)
            log.warning("the journal waits for the disk: %s", error.strerror)
        else:
            self._unwritten.clear()


class _Window:
    """The steps of one row."""

    def __init__(self, start: int, watch: Stopwatch) -> None:
        self._start, self._begin = start, time.monotonic()
        self._watch, self._seen_s, self._waited_s = watch, watch.waited_s, 0.0
        self.samples, self.seconds = start, 0.0
        self.steps: list[tuple[Tensor, Tensor]] = []

    def add(self, trainer: Trainer, result: StepResult, watch: Stopwatch) -> None:
        if watch is not self._watch:  # each span has its own
            self._watch, self._seen_s = watch, 0.0
        self._waited_s += watch.waited_s - self._seen_s
        self._seen_s = watch.waited_s
        self.steps.append((result.loss, result.psnr_db))
        self.samples, self.seconds = trainer.samples, time.monotonic() - self._begin
        self._last, self._skipped = result, trainer.skipped

    def metrics(self) -> dict[str, float]:
        losses, psnrs = (torch.stack(values).mean() for values in zip(*self.steps, strict=True))
        row = {
            "train/loss": float(losses),
            "train/psnr_db": float(psnrs),
            "train/lr": self._last.lr,
            "train/grad_norm": float(self._last.grad_norm),
            "train/skipped_steps": self._skipped,
        }
        if self.samples > self._start:
            row["train/samples_per_s"] = (self.samples - self._start) / self.seconds
            row["train/data_wait"] = self._waited_s / self.seconds
        return row

    def next(self) -> _Window:
        return _Window(self.samples, self._watch)


def _repaired(path: Path) -> dict[str, int]:
    """Cut off what a kill or a power cut left of a last line; metric → samples of its newest row."""
    if not path.exists():
        return {}
    newest: dict[str, int] = {}
    whole = position = 0
    with path.open("rb+") as file:
        for line in file:
            position += len(line)
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None:
                continue
            whole = position
            for name in row["metrics"]:
                newest[name] = max(row["samples"], newest.get(name, -1))
        file.truncate(whole)
    return newest


def _memory(device: torch.device) -> dict[str, float]:
    """The most that this process ever had in memory, and in its GPU's."""
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_A_MAXRSS
    found = {"system/peak_memory_mib": peak_bytes / 2**20}
    if device.type == "cuda":
        found["system/peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found
