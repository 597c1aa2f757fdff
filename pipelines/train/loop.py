"""The training loop of one worker, with or without Ray: resume, budget, stages, validation, stop."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.config import RunConfig, StageSection
from pipelines.files import write_json
from pipelines.ingest import Span, Stopwatch
from pipelines.train.files import BUDGET, RESULT, STOP
from pipelines.train.journal import Journal
from pipelines.train.trainer import TrainContext, Trainer
from pipelines.train.validation import validate

_WARMUP_STEPS, _TIMED_STEPS = 2, 8
_MIN_TRAINING_SHARE = 0.3  # of a budget in minutes, however long validating takes
# Requests to stop are looked for at the same step on all ranks, so this counts steps and not seconds.
_PEEK_EVERY_STEPS = 5


def spans(config: RunConfig, total_samples: int, start: int) -> list[Span]:
    """What is left of a run from sample `start` on: one span a stage.

    A stage begins where the one before ended, so batch *k* is a known range of samples. Every stage is
    rounded to whole batches, and has at least one.
    """
    left, position = [], 0
    for stage in config.stages:
        num_batches = max(1, round(total_samples * stage.share / stage.batch))
        done = min(max(0, start - position) // stage.batch, num_batches)
        if done < num_batches:
            first = position + done * stage.batch
            left.append(
                Span(start=first, num_batches=num_batches - done, batch=stage.batch, patch_px=stage.patch_px)
            )
        position += num_batches * stage.batch
    return left


def train(config: RunConfig, context: TrainContext) -> None:
    """Train until the budget is used, or until somebody asks to stop; see `Trainer`.

    Leaves checkpoints, `metrics.jsonl` and, at the end, `result.json` in the run's storage.

    Raises:
        InputError: the run has diverged, its data changed, or a shard is damaged.
    """
    trainer = Trainer(config, context)
    resumed = trainer.resume()
    stage = config.stages[0]
    trainer.warm_up(min(64, stage.patch_px), context.world_size, _WARMUP_STEPS)
    total = _total_samples(trainer)
    left = spans(config, total, trainer.samples)
    end = left[-1].start + left[-1].num_batches * left[-1].batch if left else trainer.samples
    with contextlib.closing(Journal(context, config.tracking.log_every_s)) as journal:
        _run(trainer, journal, left, end, resumed=resumed)


def _run(trainer: Trainer, journal: Journal, left: list[Span], end: int, *, resumed: bool) -> None:
    """Take the steps that are left, up to sample `end`, or up to a request to stop."""
    config, context = trainer.config, trainer.context
    journal.write(trainer.samples, {"total_samples": end}, event="resumed" if resumed else "started")
    marks = [round(end * (i + 1) / config.validation.times) for i in range(config.validation.times)]
    if config.data.val is None:
        marks = []
    saved_at = time.monotonic()
    for span in left:
        watch = Stopwatch()
        for batch in watch.over(context.batches(span)):
            result = trainer.step(batch, span.batch, end)
            journal.step(trainer, result, watch)
            if any(trainer.samples - span.batch < mark <= trainer.samples for mark in marks):
                trainer.save(_validate(trainer, journal))
                saved_at = time.monotonic()
            if trainer.steps % _PEEK_EVERY_STEPS == 0 and trainer.samples < end:
                wants_stop, wants_save = _agree(context, config, saved_at)
                if wants_save or wants_stop:
                    journal.flush()
                    trainer.save()
                    saved_at = time.monotonic()
                if wants_stop:
                    journal.write(trainer.samples, _waiting(context, watch), event="stopped")
                    return
        journal.write(trainer.samples, _waiting(context, watch))
    if not any(entry.samples == trainer.samples for entry in trainer.ledger.entries()):
        trainer.save()
    if context.rank == 0:
        write_json(context.run_dir / RESULT, {"samples": trainer.samples, "skipped": trainer.skipped})
    journal.write(trainer.samples, {}, event="finished")


def _total_samples(trainer: Trainer) -> int:
    """The budget in samples; minutes are timed once and the result is kept with the run."""
    config, context = trainer.config, trainer.context
    budget = config.budget
    if budget.samples is not None:
        return budget.samples
    if budget.epochs is not None:
        return round(budget.epochs * context.epoch_samples)
    path = context.run_dir / BUDGET
    if not path.exists():
        assert budget.minutes is not None
        validations = _validation_seconds(trainer) * config.validation.times
        seconds = max(budget.minutes * 60 - validations, budget.minutes * 60 * _MIN_TRAINING_SHARE)
        total = sum(seconds * stage.share / _seconds_a_sample(trainer, stage) for stage in config.stages)
        if context.rank == 0:
            write_json(path, {"minutes": budget.minutes, "samples": round(total)})
        _barrier(context)
    return json.loads(path.read_text())["samples"]


def _seconds_a_sample(trainer: Trainer, stage: StageSection) -> float:
    """Time a few batches of a stage as the run will meet them, readers at work beside."""
    num_batches = _WARMUP_STEPS + _TIMED_STEPS
    span = Span(start=0, num_batches=num_batches, batch=stage.batch, patch_px=stage.patch_px)
    seconds = trainer.rehearse(trainer.context.batches(span), stage.batch, untimed=_WARMUP_STEPS)
    return _slowest(seconds, trainer.context) / stage.batch


def _validation_seconds(trainer: Trainer) -> float:
    if trainer.config.data.val is None or not trainer.config.validation.times:
        return 0.0
    start = time.perf_counter()
    _scores(trainer, None)
    return _slowest(time.perf_counter() - start, trainer.context)


def _validate(trainer: Trainer, journal: Journal) -> float:
    scores = _scores(trainer, trainer.context.run_dir / "pictures" / f"{trainer.samples:010d}.png")
    journal.write(trainer.samples, scores)
    return scores["val/psnr_db"]


def _scores(trainer: Trainer, picture: Path | None) -> dict[str, float]:
    config, context = trainer.config, trainer.context
    assert config.data.val is not None
    return validate(
        trainer.weights,
        config.data.val,
        train_patch_px=trainer.train_patch_px,
        autocast=config.precision == "bf16",
        max_images=config.validation.max_images,
        rank=context.rank,
        world_size=context.world_size,
        picture=picture,
    )


def _agree(context: TrainContext, config: RunConfig, saved_at: float) -> tuple[bool, bool]:
    """What rank 0 sees, told to all: somebody asked to stop; a checkpoint is due."""
    wishes = torch.zeros(2)
    if context.rank == 0:
        wishes[0] = (context.run_dir / STOP).exists()
        wishes[1] = time.monotonic() - saved_at > config.checkpoint.every_minutes * 60
    if context.world_size > 1:
        wishes = wishes.to(context.device)
        dist.broadcast(wishes, src=0)
    stop, save = wishes.tolist()
    return bool(stop), bool(save)


def _waiting(context: TrainContext, watch: Stopwatch) -> dict[str, float]:
    """How long each rank waited for its first batch of a span, and what part of its time for later ones."""
    own = torch.tensor([watch.first_s, watch.share], device=context.device)
    of_ranks = [torch.empty_like(own) for _ in range(context.world_size)]
    if context.world_size > 1:
        dist.all_gather(of_ranks, own)
    else:
        of_ranks = [own]
    names = ("data/first_batch_s", "data/wait")
    return {
        f"{name}/rank{rank}": value
        for rank, values in enumerate(of_ranks)
        for name, value in zip(names, values.tolist(), strict=True)
    }


def _slowest(seconds: float, context: TrainContext) -> float:
    if context.world_size == 1:
        return seconds
    value = torch.tensor([seconds], device=context.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _barrier(context: TrainContext) -> None:
    if context.world_size > 1:
        dist.barrier()


def set_threads(num_threads: int) -> None:
    """CPU threads of this worker. Ray sets OMP_NUM_THREADS from the CPUs reserved, which may be below one."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
