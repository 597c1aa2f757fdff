"""How gradients of two workers become one, in each of the ways that a recipe may ask for; real groups.

python -m tests.pipelines.train.test_replica FOLDER      # what each worker does
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.ingest import PatchBatch, Span
from pipelines.train.trainer import Trainer
from tests.pipelines.train import tiny

_ROOT = Path(__file__).resolve().parents[3]
_NUM_WORKERS = 2
_BATCH = 5  # shared out as 3 and 2
_NUM_STEPS = 3
_SPAN = Span(start=0, num_batches=_NUM_STEPS, batch=_BATCH, patch_px=tiny.SIDE_PX)
# 3.2 MiB of gradients: in several buckets each way but one.
_MODEL = {"width": 64, "enc_blk_nums": [1], "middle_blk_num": 6, "dec_blk_nums": [1]}
_WAYS = {
    "plain": {},
    "bucket": {"bucket_mib": 1},
    "bf16": {"gradient_compression": "bf16"},
    "bf16_bucket": {"gradient_compression": "bf16", "bucket_mib": 1},
    "bf16_accumulated": {"gradient_compression": "bf16", "micro_batch": 1},
    "bf16_checkpointed": {"gradient_compression": "bf16", "checkpoint_activations": True},
    "one_bucket": {"bucket_mib": 1000},
}
_UNIT_BF16 = 2.0**-8  # largest relative error of rounding to 8 binary digits


def _work(folder: Path) -> None:
    """The gradient of a batch, some steps, and one whose gradient is not finite on one rank, each way."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for way, scaling in _WAYS.items():
        config = tiny.config(model=_MODEL, scaling=scaling)
        trainer = Trainer(config, tiny.context(folder, rank=rank, world_size=_NUM_WORKERS))
        trainer.warm_up(tiny.SIDE_PX, _NUM_WORKERS, steps=2)
        batches = [tiny.batch(_SPAN, number, rank, _NUM_WORKERS) for number in range(_NUM_STEPS)]
        trainer.accumulate(batches[0], _BATCH)
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        _save(gradients, folder / f"{way}_gradients{rank}")
        trainer.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            trainer.step(batch, _BATCH, _NUM_STEPS * _BATCH)
        _save(trainer.model.state_dict(), folder / f"{way}_weights{rank}")
        _spoil(trainer, batches[0], only=rank == 1)
        _save(trainer.model.state_dict(), folder / f"{way}_after{rank}")
        assert trainer.skipped == 1, way
    dist.destroy_process_group()


def _spoil(trainer: Trainer, batch: PatchBatch, *, only: bool) -> None:
    """A step in which one rank's loss is infinite."""
    loss = trainer.loss
    if only:
        trainer.loss = lambda restored, gt: loss(restored, gt) * float("inf")
    trainer.step(batch, _BATCH, _NUM_STEPS * _BATCH)
    trainer.loss = loss


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replica")
    environment = {
        **os.environ,
        "PYTHONPATH": str(_ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29950 + os.getpid() % 40),
        "WORLD_SIZE": str(_NUM_WORKERS),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.train.test_replica", str(folder)],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(_NUM_WORKERS)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors.decode()
    return folder


@pytest.mark.parametrize("way", _WAYS)
def test_all_workers_have_the_same_to_the_last_bit(told: Path, way: str) -> None:
    for what in ("gradients", "weights", "after"):
        first, second = (load_file(told / f"{way}_{what}{rank}") for rank in range(_NUM_WORKERS))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", _WAYS)
def test_gradient_is_that_of_one_worker_with_the_whole_batch(told: Path, tmp_path: Path, way: str) -> None:
    alone = Trainer(tiny.config(model=_MODEL), tiny.context(tmp_path))
    alone.accumulate(tiny.batch(_SPAN, 0), _BATCH)
    shared = load_file(told / f"{way}_gradients0")
    # Rounded on each of two workers, and their sum again; by parts that may cancel each other.
    bound = 1.5 * _UNIT_BF16 if "bf16" in way else 1e-5
    deviations = {}
    for name, parameter in alone.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
        deviations[name] = float((shared[name] - parameter.grad).norm() / parameter.grad.norm())
    assert max(deviations.values()) <= bound, deviations
    if "bf16" in way:
        assert max(deviations.values()) > 1e-5  # it did travel in bf16


@pytest.mark.parametrize("way", ["bucket", "one_bucket"])
def test_size_of_the_buckets_changes_rounding_alone(told: Path, way: str) -> None:
    plain, other = (load_file(told / f"{name}_weights0") for name in ("plain", way))
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", _WAYS)
def test_gradient_that_is_infinite_on_one_worker_is_skipped_by_all(told: Path, way: str) -> None:
    before, after = (load_file(told / f"{way}_{what}0") for what in ("weights", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
