"""What a run would do, tried on made-up pairs in seconds: without Ray, data, MLflow or a run's folder.

    nafnet train --config gopro_width64 --dry-run

Two optimiser steps of every stage in this process, by the same `Trainer` that workers run, and a checkpoint
written and read back. Patches and batches shrink to what a laptop does in a second; all else is the recipe's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nafnet_core import InputError
from nafnet_core.model import NAFNet
from pipelines.config import RunConfig, StageSection
from pipelines.ingest import PatchBatch, Span, plan_for
from pipelines.train.checks import check_data, check_numbers, check_precision, warn
from pipelines.train.initial import InitialWeights, write_initial
from pipelines.train.loop import spans
from pipelines.train.step_memory import step_memory
from pipelines.train.trainer import TrainContext, Trainer
from pipelines.workspace import Workspace

STEPS = 2
"""Optimiser steps of each stage."""
RATE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Parts of the budget whose learning rate is told."""
# Of one sample's forward pass. Width 64 then runs on patches of 32 px: seconds on two cores.
_MAX_MACS = {"cpu": 1_100_000_000, "cuda": 100_000_000_000}
_MAX_BATCH = 2
# Where a budget has no number of samples yet: schedules are a function of the part of it that is used.
_NOMINAL_SAMPLES = 1_000_000
_SHOWN_PX = 256  # the image that papers count multiply-accumulates on


@dataclass(frozen=True, kw_only=True)
class StageTrial:
    """One stage: what it would be, and what was tried of it."""

    share: float
    patch_px: int
    batch: int
    """Global."""
    num_workers: int
    accumulation: int
    """Forward passes of a worker before an optimiser step."""
    micro_batch: int
    """Samples in one of them, at most."""
    num_steps: int | None
    """Optimiser steps; None where the budget has no number of samples yet."""
    memory_mib: float
    """Estimated: weights, gradients, moments, average and activations of a worker."""
    tried_patch_px: int
    tried_batch: int
    losses: tuple[float, ...]
    """Of each step tried."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would do."""

    device: str
    num_parameters: int
    macs: int
    """Multiply-accumulates for one image of 256×256."""
    samples: int | None
    """The budget; None where the data are needed to know, or a clock is."""
    epochs: float | None
    rates: tuple[float, ...] | None
    """Learning rate at `RATE_SHARES`; None where steps depend on the data."""
    init: InitialWeights | None
    stages: tuple[StageTrial, ...]
    checkpoint_mib: float
    seconds: float
    has_data: bool

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def dry_run(config: RunConfig, workspace: Workspace) -> DryRun:
    """Try a run. Nothing is left behind.

    Args:
        config: the whole run; its stores are checked where it names some.
        workspace: where `model.init` is looked for.

    Raises:
        InputError: the recipe, the data or the initial weights cannot be used; or a step diverged.
        CapabilityError: the GPU here has not the precision.
    """
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_numbers(config)
    check_data(config)
    check_precision(config, device)
    warn(config)
    has_data = bool(config.data.train)
    epoch_samples = plan_for(config.data, seed=config.seed).epoch_samples if has_data else None
    total = _total_samples(config, epoch_samples)
    with tempfile.TemporaryDirectory(prefix="nafnet-dry-run-") as folder:
        context = TrainContext(
            rank=0,
            world_size=1,
            device=device,
            run_dir=Path(folder),
            batches=_made_up_batches,
            epoch_samples=epoch_samples or _NOMINAL_SAMPLES,
            store_digests=(),
        )
        init = None if config.model.init is None else write_initial(config, workspace, context.run_dir)
        trainer = Trainer(_small(config), context)
        rates = _rates(trainer, total, epoch_samples)
        stages = _tried_stages(trainer, config, total)
        _write_and_read_back(trainer)
        written = sum(file.stat().st_size for file in trainer.saver.ledger.folder.rglob("*.safetensors"))
    return DryRun(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        num_parameters=trainer.model.num_parameters,
        macs=trainer.model.config.num_macs(_SHOWN_PX, _SHOWN_PX),
        samples=total,
        epochs=config.budget.epochs or (total / epoch_samples if total and epoch_samples else None),
        rates=rates,
        init=init,
        stages=stages,
        checkpoint_mib=written / 2**20,
        seconds=time.perf_counter() - begin,
        has_data=has_data,
    )


def _total_samples(config: RunConfig, epoch_samples: int | None) -> int | None:
    budget = config.budget
    if budget.epochs is not None and epoch_samples is not None:
        return round(budget.epochs * epoch_samples)
    return budget.samples


def _small(config: RunConfig) -> RunConfig:
    """`config` for this one process; the micro-batch is set a stage."""
    scaling = config.scaling.model_copy(
        update={"num_workers": 1, "use_gpu": False, "compile": False, "cuda_graphs": False}
    )
    return config.model_copy(update={"scaling": scaling})


def _rates(trainer: Trainer, total: int | None, epoch_samples: int | None) -> tuple[float, ...] | None:
    """Learning rates at `RATE_SHARES`, where they are known."""
    budget, schedule = trainer.config.budget, trainer.config.schedule
    if total is None:
        in_epochs = budget.epochs is not None
        if schedule.step_samples or (schedule.step_epochs and not in_epochs):
            return None
        total = round((budget.epochs or 1) * _NOMINAL_SAMPLES)
    elif schedule.step_epochs and epoch_samples is None:
        return None
    rates = []
    for share in RATE_SHARES:
        # The last step begins a batch before the end.
        trainer.samples = min(round(share * total), total - trainer.config.stages[-1].batch)
        rates.append(trainer._learning_rate(total))
    trainer.samples = 0
    return tuple(rates)


def _tried_stages(trainer: Trainer, config: RunConfig, total: int | None) -> tuple[StageTrial, ...]:
    shown = total or _NOMINAL_SAMPLES
    memory = step_memory(
        trainer.model,
        trainer.loss,
        use_bf16=config.precision == "bf16",
        has_average=trainer.ema is not None,
    )
    trials = []
    for stage, span in zip(config.stages, spans(config, shown, 0), strict=True):
        slice_samples = -(-stage.batch // config.scaling.most_workers)
        micro = min(config.scaling.micro_batch or slice_samples, slice_samples)
        accumulation = -(-slice_samples // micro)
        patch_px = _small_patch(trainer.model, stage, trainer.context.device)
        batch = min(_MAX_BATCH, stage.batch)
        # With accumulation in the run there is some here as well.
        scaling = trainer.config.scaling.model_copy(update={"micro_batch": 1 if accumulation > 1 else None})
        trainer.config = trainer.config.model_copy(update={"scaling": scaling})
        trainer.samples = span.start
        small = Span(start=span.start, num_batches=STEPS, batch=batch, patch_px=patch_px)
        losses = tuple(
            float(trainer.step(drawn, batch, shown).loss) for drawn in trainer.context.batches(small)
        )
        if trainer.skipped:
            raise InputError(
                "a step gave no finite gradient", got=f"losses {losses} at patch {patch_px} px",
                fix="Lower optim.lr, or use precision fp32",
            )  # fmt: skip
        trials.append(
            StageTrial(
                share=stage.share,
                patch_px=stage.patch_px,
                batch=stage.batch,
                num_workers=config.scaling.most_workers,
                accumulation=accumulation,
                micro_batch=micro,
                num_steps=None if total is None else span.num_batches,
                memory_mib=memory.mib(stage.patch_px, micro),
                tried_patch_px=patch_px,
                tried_batch=batch,
                losses=losses,
            )
        )
    return tuple(trials)


def _small_patch(model: NAFNet, stage: StageSection, device: torch.device) -> int:
    """The largest patch up to the stage's that is quickly done; a multiple of what the network needs."""
    stride = model.config.stride_px
    sides = range(stage.patch_px, stride, -stride)
    return next(
        (side for side in sides if model.config.num_macs(side, side) <= _MAX_MACS[device.type]), stride
    )


def _made_up_batches(span: Span) -> Iterator[PatchBatch]:
    """Coloured tiles, and the same moved by some pixels and averaged: edges that a motion has blurred."""
    for number in range(span.num_batches):
        samples = span.start + number * span.batch + np.arange(span.batch)
        rng = np.random.default_rng(samples[0])
        num_tiles = -(-span.patch_px // 8)
        tiles = rng.integers(0, 256, (span.batch, num_tiles, num_tiles, 3), np.uint8)
        gt = tiles.repeat(8, axis=1).repeat(8, axis=2)[:, : span.patch_px, : span.patch_px]
        lq = np.mean([np.roll(gt, shift, axis=2) for shift in range(5)], axis=0).astype(np.uint8)
        yield PatchBatch(samples=samples, lq=lq, gt=np.ascontiguousarray(gt))


def _write_and_read_back(trainer: Trainer) -> None:
    """A checkpoint there and back, over weights that were cleared meanwhile."""
    trainer.save()
    trainer.saver.wait()
    written = {name: value.clone() for name, value in trainer.weights.state_dict().items()}
    with torch.no_grad():
        for value in trainer.weights.parameters():
            value.zero_()
    assert trainer.resume(), "a checkpoint has just been written"
    read = trainer.weights.state_dict()
    assert all(torch.equal(value, read[name]) for name, value in written.items()), "other weights came back"
