"""Passes recorded as CUDA graphs against those launched kernel by kernel; alone, and of two workers on a GPU.

python -m tests.pipelines.train.test_graphed FOLDER      # what each of two workers does
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
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.ingest import Span
from pipelines.train.trainer import Trainer
from tests.pipelines.train import tiny

pytestmark = pytest.mark.gpu

_ROOT = Path(__file__).resolve().parents[3]
_BATCH, _NUM_STEPS = 5, 4
_SPAN = Span(start=0, num_batches=_NUM_STEPS, batch=_BATCH, patch_px=tiny.SIDE_PX)
_WAYS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "accumulated": {"scaling": {"micro_batch": 2}},  # 2, 2 and 1: two graphs, one recorded between passes
    "checkpointed": {"scaling": {"checkpoint_activations": True}},
    "mixed loss": {"loss": {"l1": 1.0, "fft": 0.1, "edge": 0.1}},
}


def _config(way: str, *, graphs: bool) -> RunConfig:
    changes = dict(_WAYS[way])
    changes["scaling"] = {**changes.pop("scaling", {}), "cuda_graphs": graphs}
    return tiny.config(**changes)


def _gradients(trainer: Trainer) -> list[Tensor]:
    trainer.accumulate(tiny.batch(_SPAN, 0), _BATCH)
    found = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def _deviation(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = list(zip(ours, theirs, strict=True))
    assert all(expected.norm() > 0 for _, expected in pairs)
    return max(float((got - expected).norm() / expected.norm()) for got, expected in pairs)


@pytest.mark.parametrize("way", _WAYS)
def test_recorded_passes_give_the_gradients_of_launched_ones(tmp_path: Path, way: str) -> None:
    recorded, launched = (
        Trainer(_config(way, graphs=graphs), tiny.context(tmp_path, device="cuda"))
        for graphs in (True, False)
    )
    assert recorded._graphed is not None and launched._graphed is None
    bound = 1e-2 if way == "bf16" else 1e-4
    for _ in range(2):  # recorded in the first, replayed in the second
        assert _deviation(_gradients(recorded), _gradients(launched)) < bound
    assert len(recorded._graphed._graphs) == (2 if way == "accumulated" else 1)
    results = [
        [trainer.step(tiny.batch(_SPAN, n), _BATCH, _NUM_STEPS * _BATCH) for n in range(_NUM_STEPS)]
        for trainer in (recorded, launched)
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=bound, atol=bound)
        torch.testing.assert_close(ours.psnr_db, theirs.psnr_db, rtol=bound, atol=bound)
    assert float(results[0][0].loss) != float(results[0][-1].loss)


def test_another_patch_size_is_recorded_anew(tmp_path: Path) -> None:
    recorded, launched = (
        Trainer(_config("fp32", graphs=graphs), tiny.context(tmp_path, device="cuda"))
        for graphs in (True, False)
    )
    for side in (16, 32, 16):
        span = Span(start=0, num_batches=1, batch=3, patch_px=side)
        losses = [trainer.step(tiny.batch(span, 0), 3, 9).loss for trainer in (recorded, launched)]
        recorded.release_memory()  # as before a validation
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_gradient_of_two_workers_is_that_of_one(tmp_path: Path, compression: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29910 + os.getpid() % 40),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "tests.pipelines.train.test_graphed", str(tmp_path), compression]
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors.decode()
    finally:
        for worker in workers:
            worker.kill()
    first, second = (torch.load(tmp_path / f"gradients{rank}.pt") for rank in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    alone = Trainer(_config("fp32", graphs=False), tiny.context(tmp_path, device="cuda"))
    assert _deviation(first, _gradients(alone)) < (1e-2 if compression == "bf16" else 1e-4)


def _work(folder: Path, compression: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))  # NCCL wants a GPU each
    config = tiny.config(scaling={"cuda_graphs": True, "gradient_compression": compression})
    trainer = Trainer(config, tiny.context(folder, rank=rank, world_size=2, device="cuda"))
    trainer.accumulate(tiny.batch(_SPAN, 0, rank, 2), _BATCH)
    torch.save([p.grad for p in trainer.model.parameters()], folder / f"gradients{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2])
