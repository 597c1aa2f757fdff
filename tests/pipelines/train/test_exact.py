"""What is promised of weights, with real process groups: resume is exact, other numbers of workers are near.

python -m tests.pipelines.train.test_exact RUNS GROUP      # what each of a group of workers does
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pipelines.checkpoint import CheckpointLedger
from pipelines.ingest import PatchBatch, Span
from pipelines.train.loop import train
from pipelines.train.trainer import TrainContext, Trainer
from tests.pipelines.train import tiny

_ROOT = Path(__file__).resolve().parents[3]
_SAMPLES, _BATCH = 200, 10  # shared out as 10, as 5 and 5, as 4, 3 and 3
_DIES_AT = (70, 130, 200)
_CONFIG = {
    "budget": {"samples": _SAMPLES},
    # Stages, and a checkpoint at each look: resuming must not depend on where it begins.
    "stages": [
        {"share": 0.5, "patch_px": 16, "batch": _BATCH},
        {"share": 0.5, "patch_px": 32, "batch": _BATCH},
    ],
    "checkpoint": {"every_minutes": 1e-9},
    "precision": "fp32",
}


# Number of workers, and how they are tied together.
_GROUPS = {
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "2bf16": (2, {"gradient_compression": "bf16", "bucket_mib": 1}),
}


class _DeadError(Exception):
    pass


def _context(run_dir: Path, rank: int, world_size: int, dies_at: int | None = None) -> TrainContext:
    def batches(span: Span) -> Iterator[PatchBatch]:
        for number, batch in enumerate(tiny.batches(span, rank, world_size)):
            if span.start + number * span.batch == dies_at:
                raise _DeadError
            yield batch

    return tiny.context(run_dir, batches=batches, rank=rank, world_size=world_size)


def _work(runs: Path, rank: int, group: str) -> None:
    """One worker: a run as a whole, then one that dies again and again, at the same steps on all ranks."""
    torch.set_num_threads(1)
    world_size, scaling = _GROUPS[group]
    if world_size > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    config = tiny.config(**_CONFIG, scaling=scaling)
    first = Trainer(config, _context(runs / f"whole{group}", rank, world_size))
    span = Span(start=0, num_batches=1, batch=_BATCH, patch_px=16)
    first.accumulate(tiny.batch(span, 0, rank, world_size), _BATCH)
    if rank == 0:
        gradients = {name: p.grad.contiguous() for name, p in first.model.named_parameters()}
        save_file(gradients, runs / f"gradients{group}.safetensors")
    train(config, _context(runs / f"whole{group}", rank, world_size))
    for dies_at in _DIES_AT:
        try:
            train(config, _context(runs / f"parts{group}", rank, world_size, dies_at))
        except _DeadError:
            if world_size > 1:
                dist.barrier()
    train(config, _context(runs / f"parts{group}", rank, world_size))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    for number, (group, (world_size, _)) in enumerate(_GROUPS.items()):
        for kind in ("whole", "parts"):
            (root / f"{kind}{group}").mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(29700 + os.getpid() % 200 + number),
            "WORLD_SIZE": str(world_size),
        }
        command = [sys.executable, "-m", "tests.pipelines.train.test_exact", str(root), group]
        workers = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE)
            for rank in range(world_size)
        ]
        for worker in workers:
            _, errors = worker.communicate(timeout=240)
            assert worker.returncode == 0, errors.decode()
    return root


@pytest.mark.parametrize("group", _GROUPS)
def test_a_run_that_died_three_times_has_the_same_weights_to_the_last_bit(runs: Path, group: str) -> None:
    whole, parts = (tiny.final_weights(runs / f"{kind}{group}") for kind in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    entries = CheckpointLedger(runs / f"parts{group}").entries()
    assert entries[-1].samples == _SAMPLES
    states = [
        {name: digest for name, digest in run.entries()[-1].digests.items() if name != "state.json"}
        for run in (CheckpointLedger(runs / f"{kind}{group}") for kind in ("whole", "parts"))
    ]
    # The averaged weights and the optimiser's state as well.
    assert states[0] == states[1] and len(states[0]) == 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_another_number_of_workers_takes_the_same_twenty_steps(runs: Path, world_size: int) -> None:
    alone, shared = (load_file(runs / f"gradients{count}.safetensors") for count in (1, world_size))
    assert max(float(value.abs().max()) for value in alone.values()) > 0.1
    for name, value in alone.items():
        assert (shared[name] - value).norm() <= 1e-5 * value.norm(), name
    alone, shared = tiny.final_weights(runs / "whole1"), tiny.final_weights(runs / f"whole{world_size}")
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2])
