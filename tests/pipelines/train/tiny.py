"""A tiny run for tests: its recipe, and patches that depend on the sample's number alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from nafnet_core.weights import load_model
from pipelines.checkpoint import CheckpointLedger
from pipelines.config import RunConfig, parse_config
from pipelines.ingest import PatchBatch, Span
from pipelines.plan import rank_slice
from pipelines.train.trainer import TrainContext

SIDE_PX = 16


def config(**changes: object) -> RunConfig:
    content = {
        "name": "tiny",
        "model": {"width": 4, "enc_blk_nums": [1], "middle_blk_num": 1, "dec_blk_nums": [1]},
        "budget": {"samples": 48},
        "stages": [{"share": 1.0, "patch_px": SIDE_PX, "batch": 4}],
        "optim": {"lr": 5e-3, "clip_norm": 1.0, "residual_scale": 0.3},
        "checkpoint": {"every_minutes": 60},
        "tracking": {"log_every_s": 0.001},
        **changes,
    }
    return parse_config(content, file="test")


def batch(span: Span, number: int, rank: int = 0, world_size: int = 1) -> PatchBatch:
    """Patches that depend on the sample's number alone, as the plan's do: a ramp, and noise on it."""
    samples = span.start + number * span.batch + np.arange(*rank_slice(span.batch, rank, world_size))
    gt, lq = [], []
    for sample in samples:
        rng = np.random.default_rng(sample)
        ramp = np.linspace(40, 200, span.patch_px)[None, :, None] * rng.uniform(0.5, 1, 3)
        sharp = np.broadcast_to(ramp, (span.patch_px, span.patch_px, 3))
        gt.append(sharp.astype(np.uint8))
        lq.append((sharp + rng.normal(0, 12, sharp.shape)).clip(0, 255).astype(np.uint8))
    return PatchBatch(samples=samples, lq=np.stack(lq), gt=np.stack(gt))


def batches(span: Span, rank: int = 0, world_size: int = 1) -> Iterator[PatchBatch]:
    for number in range(span.num_batches):
        yield batch(span, number, rank, world_size)


def context(
    run_dir: Path,
    *,
    batches: Callable[[Span], Iterator[PatchBatch]] = lambda span: iter(()),
    rank: int = 0,
    world_size: int = 1,
    epoch_samples: int = 100,
    digests: tuple[str, ...] = ("data",),
    device: str = "cpu",
) -> TrainContext:
    """A worker without Ray."""
    return TrainContext(
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
        run_dir=run_dir,
        batches=batches,  # type: ignore[arg-type]  # or a plain iterator, where nothing is closed
        epoch_samples=epoch_samples,
        store_digests=digests,
    )


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    ledger = CheckpointLedger(run_dir)
    model, _ = load_model(ledger.folder / ledger.entries()[-1].folder / "model.safetensors")
    return model.state_dict()
