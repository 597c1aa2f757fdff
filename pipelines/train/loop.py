"""The training loop of one worker, with or without Ray: resume, budget, stages, validation, stop."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from dataclasses import replace
from itertools import cycle, islice, zip_longest

import torch
import torch.distributed as dist

from nafnet_core import CapabilityError
from pipelines.checkpoint import CheckpointLedger
from pipelines.config import RunConfig, StageSection
from pipelines.files import write_json
from pipelines.ingest import Begun, Span, Stopwatch
from pipelines.store import PairStore
from pipelines.train.files import NOT_WRITTEN, RESULT, STOP
from pipelines.train.journal import Journal
from pipelines.train.peers import Peers
from pipelines.train.trainer import TrainContext, Trainer
from pipelines.train.validation import chosen_images, mean_scores, score_images

_WARMUP_STEPS = 2
_REHEARSED_STEPS = 8
# Of a budget in minutes, and at most.
_REHEARSED_SHARE, _REHEARSED_S = 0.05, 15.0
_ENDLESS = 2**40  # batches, until it is known how many there will be
_MIN_TRAINING_SHARE = 0.3  # of a budget in minutes, however long validating takes
# Requests to stop are looked for at the same step on all ranks, so this counts steps and not seconds.
_PEEK_EVERY_STEPS = 5
_AHEAD_BATCHES = 64


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
        CapabilityError: the last checkpoint could not be written.
        PeerLostError: another worker is gone or stuck.
    """
    begun = _begun(config, context)
    trainer = Trainer(config, context)
    resumed = trainer.resume()
    if trainer.total_samples is None:
        trainer.total_samples = _samples_of(config, context)
    elif begun is None and (rest := spans(config, trainer.total_samples, trainer.samples)):
        begun = context.begin(rest[0])
    for stage in config.stages:
        trainer.pin_micro_batch(stage.patch_px, stage.batch)
    trainer.warm_up(min(64, config.stages[0].patch_px), context.world_size, _WARMUP_STEPS)
    if trainer.total_samples is None:
        assert begun is not None
        trainer.total_samples = _timed_samples(trainer, begun)
    left = spans(config, trainer.total_samples, trainer.samples)
    if begun is not None and not (left and begun.span.starts_like(left[0])):
        begun.close()  # the newest checkpoint was damaged
        begun = None
    end = left[-1].start + left[-1].num_batches * left[-1].batch if left else trainer.samples
    with contextlib.closing(Journal(context, config.tracking.log_every_s)) as journal:
        run = _Run(trainer, journal, end)
        first = {"total_samples": end, "workers": context.world_size}
        journal.write(trainer.samples, first, event="resumed" if resumed else "started")
        if not resumed:
            trainer.save()  # pins what was measured, before anything depends on it
        try:
            with Peers().named(first=run.rescue):
                run.over(left, begun)
        except OSError as error:  # a full disk
            raise CapabilityError(
                error.strerror or str(error), file=error.filename, fix="The same command goes on from there"
            ) from error
        finally:
            trainer.saver.wait()
        trainer.saver.close()


class _Run:
    """The steps that are left of a run, and what happens between them."""

    def __init__(self, trainer: Trainer, journal: Journal, end: int) -> None:
        self._trainer, self._journal, self._end = trainer, journal, end
        self._config, self._context = trainer.config, trainer.context
        shares = self._config.validation.shares if self._config.data.val is not None else ()
        self._marks = [max(1, round(end * share)) for share in shares]
        self._saved_at, self._saved_samples = time.monotonic(), trainer.samples

    def over(self, left: list[Span], begun: Begun | None) -> None:
        """Take these steps, the first ones on `begun`, up to the run's end or a request to stop."""
        trainer, context = self._trainer, self._context
        self._score_what_was_missed()
        for span, following in zip_longest(left, left[1:]):
            watch = Stopwatch()
            batches, begun = begun or context.begin(span), None
            next_at = span.start + max(1, span.num_batches - _AHEAD_BATCHES) * span.batch
            for batch in watch.over(islice(batches, span.num_batches)):
                num_skipped = trainer.skipped
                result = trainer.step(batch, span.batch, self._end)
                if following is not None and trainer.samples == next_at:
                    begun = context.begin(following)
                if trainer.skipped > num_skipped:
                    numbers = f"samples {trainer.samples - span.batch} to {trainer.samples - 1}"
                    self._journal.write(trainer.samples, {}, event=f"step skipped, not finite: {numbers}")
                self._journal.step(trainer, result, watch)
                if any(trainer.samples - span.batch < mark <= trainer.samples for mark in self._marks):
                    self._validate()
                if trainer.steps % _PEEK_EVERY_STEPS == 0 and trainer.samples < self._end and self._peek():
                    self._journal.write(trainer.samples, _waiting(context, watch), event="stopped")
                    self._take_scores(wait=True)
                    return
            assert trainer.samples == span.start + span.num_batches * span.batch, (
                f"{trainer.samples} of {span}"
            )
            batches.close()
            self._journal.write(trainer.samples, _waiting(context, watch))
        if self._saved_samples != trainer.samples or not trainer.saver.ledger.entries():
            self._save()
        self._take_scores(wait=True)
        trainer.saver.close()  # before the run counts as finished
        if context.rank == 0:
            write_json(context.run_dir / RESULT, {"samples": trainer.samples, "skipped": trainer.skipped})
        self._journal.write(trainer.samples, {}, event="finished")

    def rescue(self) -> None:
        """Keep the steps that are done, another worker being lost: after each all have the same weights."""
        if self._saved_samples != self._trainer.samples:
            self._journal.flush()
            self._trainer.save()
            self._trainer.saver.wait()

    def _peek(self) -> bool:
        """Look for what is due; whether to stop."""
        wants_stop, wants_save = _agree(self._context, self._config, self._saved_at)
        if wants_save or wants_stop:
            self._save()
        self._take_scores(wait=False)
        return wants_stop

    def _save(self, psnr_db: float | None = None) -> None:
        saver = self._trainer.saver
        self._journal.flush()
        self._trainer.save(psnr_db)
        self._saved_at, self._saved_samples = time.monotonic(), self._trainer.samples
        self._journal.write(self._trainer.samples, {"checkpoint/stopped_s": saver.stopped_s})
        if saver.failure is not None:  # of the one before
            self._journal.write(self._trainer.samples, {}, event=f"{NOT_WRITTEN}: {saver.failure}")

    def _validate(self) -> None:
        """Score the averaged weights, beside the training where there is room; keep them as a checkpoint."""
        trainer, context = self._trainer, self._context
        if not context.validates_beside:
            scores = _scores(trainer, draw=True)
            self._journal.write(trainer.samples, scores)
            self._save(scores["val/psnr_db"])
            return
        self._save()
        if context.beside is not None:
            context.beside.start(trainer.samples, trainer.weights)

    def _score_what_was_missed(self) -> None:
        """A run that was killed while its newest checkpoint was being scored."""
        newest = self._trainer.saver.ledger.newest()
        if newest is None or newest.samples != self._trainer.samples or newest.psnr_db is not None:
            return
        largest = max(stage.batch for stage in self._config.stages)
        is_marked = any(mark <= newest.samples < mark + largest for mark in self._marks)
        if is_marked and self._context.beside is not None:
            self._context.beside.start(newest.samples, self._trainer.weights)

    def _take_scores(self, *, wait: bool) -> None:
        """Enter what validation beside the training has found by now."""
        if self._context.beside is None:
            return
        for samples, scores in self._context.beside.finished(wait=wait):
            if scores is not None:
                self._journal.write(samples, scores)
                self._trainer.saver.score(samples, scores["val/psnr_db"])


def _begun(config: RunConfig, context: TrainContext) -> Begun | None:
    """Batches of what the ledger says comes first; readers take seconds, in which there is enough to do."""
    ledger = CheckpointLedger(context.run_dir)
    newest, total = ledger.newest(), _samples_of(config, context)
    if newest is not None:
        left = [] if total is None else spans(config, total, newest.samples)
        return context.begin(left[0]) if left else None
    if total is not None:
        return context.begin(spans(config, total, 0)[0])
    return context.begin(replace(_first_span(config.stages[0]), num_batches=_ENDLESS))


def _samples_of(config: RunConfig, context: TrainContext) -> int | None:
    """The budget in samples; None of one in minutes."""
    if config.budget.epochs is not None:
        return round(config.budget.epochs * context.epoch_samples)
    return config.budget.samples


def _timed_samples(trainer: Trainer, begun: Begun) -> int:
    """A budget in minutes in samples, by timing a few batches of each stage; `begun` are the first's."""
    config, minutes = trainer.config, trainer.config.budget.minutes
    assert minutes is not None
    validations = _validation_seconds(trainer) * len(config.validation.shares)
    seconds = max(minutes * 60 - validations, minutes * 60 * _MIN_TRAINING_SHARE)
    samples = 0.0
    for number, stage in enumerate(config.stages):
        batches = begun if number == 0 else trainer.context.begin(_first_span(stage))
        samples += seconds * stage.share / _seconds_a_sample(trainer, stage, batches)
    return round(samples)


def _first_span(stage: StageSection) -> Span:
    return Span(start=0, num_batches=_REHEARSED_STEPS, batch=stage.batch, patch_px=stage.patch_px)


def _seconds_a_sample(trainer: Trainer, stage: StageSection, batches: Begun) -> float:
    """Time steps of a stage, a few batches taken again and again: in the first seconds Ray still starts.

    The median, so that what else a machine does now and then is left out.
    """
    context, minutes = trainer.context, trainer.config.budget.minutes
    assert minutes is not None
    few = list(batches.rehearsed(_REHEARSED_STEPS))
    rough_s = _slowest(statistics.median(trainer.rehearse(few, stage.batch)), context)
    seconds = min(_REHEARSED_S, _REHEARSED_SHARE * minutes * 60) * stage.share
    more = trainer.rehearse(islice(cycle(few), 1 + math.ceil(seconds / rough_s)), stage.batch)
    return _slowest(statistics.median(more[len(more) // 2 :]), context) / stage.batch


def _validation_seconds(trainer: Trainer) -> float:
    config, context = trainer.config, trainer.context
    if config.data.val is None or not config.validation.shares or context.validates_beside:
        return 0.0
    start = time.perf_counter()
    _scores(trainer, draw=False)
    return _slowest(time.perf_counter() - start, context)


def _scores(trainer: Trainer, *, draw: bool) -> dict[str, float]:
    """Each worker scores its share of the images; all get the same means."""
    config, context = trainer.config, trainer.context
    assert config.data.val is not None
    trainer.release_memory()  # whole images want it
    store = PairStore(config.data.val, cache_gib=config.data.cache_gib)
    picture = context.run_dir / "pictures" / f"{trainer.samples:010d}.png"
    scores = score_images(
        trainer.weights,
        store,
        chosen_images(len(store), config.validation.max_images)[context.rank :: context.world_size],
        train_patch_px=trainer.train_patch_px,
        autocast=config.precision == "bf16",
        picture=picture if draw and context.rank == 0 else None,
    )
    return mean_scores(scores, across_workers=context.world_size > 1)


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


def set_threads(num_threads: int) -> None:
    """CPU threads of this worker. Ray sets OMP_NUM_THREADS from the CPUs reserved, which may be below one."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
