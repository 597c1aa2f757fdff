"""The journal over kills: each curve has each sample once, and no line is half."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.ingest import Stopwatch
from pipelines.train import journal as journal_module
from pipelines.train.files import METRICS
from pipelines.train.journal import Journal
from pipelines.train.trainer import StepResult, TrainContext
from tests.pipelines.train import tiny

_BATCH, _END = 4, 96
_MARKS = (32, 64, 96)


class _Clock:
    """Time that passes as a test says."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


class _FakeTrainer:
    samples = 0
    skipped = 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(journal_module, "time", clock)
    # Hundreds of kills in some seconds.
    monkeypatch.setattr(journal_module.os, "fsync", lambda descriptor: None)
    return clock


def _context(run_dir: Path, rank: int = 0) -> TrainContext:
    return tiny.context(run_dir, rank=rank, world_size=2)


def _result(loss: float) -> StepResult:
    return StepResult(
        loss=torch.tensor(loss), psnr_db=torch.tensor(20.0), grad_norm=torch.tensor(1.0), lr=1e-3
    )


def _rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]


def _curves(run_dir: Path) -> dict[str, list[int]]:
    steps = defaultdict(list)
    for row in _rows(run_dir):
        for name in row["metrics"]:
            steps[name].append(row["samples"])
    return steps


def _attempt(run_dir: Path, clock: _Clock, start: int, stop: int, every_steps: int, save_every: int) -> int:
    """Steps of one attempt, as the loop takes them; returns its newest checkpoint."""
    journal = Journal(_context(run_dir), every_s=every_steps * 1.0)
    trainer, watch, saved = _FakeTrainer(), Stopwatch(), start
    journal.write(start, {"total_samples": _END}, event="resumed" if start else "started")
    for samples in range(start + _BATCH, stop + 1, _BATCH):
        clock.now += 1
        trainer.samples = samples
        # A step's loss is its own number, so a row's mean says which steps it covers.
        journal.step(trainer, _result(samples / _BATCH), watch)  # type: ignore[arg-type]
        if samples in _MARKS:
            journal.write(samples, {"val/psnr_db": 20.0, "val/ssim": 0.5})
            saved = samples
        elif samples // _BATCH % save_every == 0:
            journal.flush()
            saved = samples
    if stop >= _END:
        journal.write(_END, {}, event="finished")
    journal.close()
    return saved


_KILLS = st.lists(
    st.tuples(st.integers(1, _END // _BATCH), st.integers(0, 99)), max_size=6
)  # steps of the attempt, bytes of a line that its end left


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=_KILLS, every_steps=st.integers(1, 5), save_every=st.integers(2, 9))
def test_kills_anywhere_leave_each_sample_once(
    clock: _Clock, kills: list[tuple[int, int]], every_steps: int, save_every: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir, saved = Path(folder), 0
        for num_steps, num_bytes in kills:
            stop = min(saved + num_steps * _BATCH, _END - _BATCH)
            saved = _attempt(run_dir, clock, saved, stop, every_steps, save_every)
            half = '{"time": 1e9, "samples": 9999, "metrics": {"train/loss": 1}}'
            with (run_dir / METRICS).open("a") as file:
                file.write(half[:num_bytes])
        _attempt(run_dir, clock, saved, _END, every_steps, save_every)
        curves = _curves(run_dir)
        curves.pop("total_samples")
        for name, steps in curves.items():
            assert steps == sorted(set(steps)), name
        assert curves["val/psnr_db"] == curves["val/ssim"] == list(_MARKS)
        # No gap: each row's mean loss is that of all steps since the row before.
        before = 0
        for row in _rows(run_dir):
            if "train/loss" in row["metrics"]:
                steps = range(before // _BATCH + 1, row["samples"] // _BATCH + 1)
                assert row["metrics"]["train/loss"] == pytest.approx(sum(steps) / len(steps))
                before = row["samples"]
        assert before == _END


def test_a_row_has_every_curve(tmp_path: Path, clock: _Clock) -> None:
    _attempt(tmp_path, clock, 0, _END, every_steps=3, save_every=100)
    row = next(row["metrics"] for row in _rows(tmp_path)[2:] if "train/loss" in row["metrics"])
    assert set(row) == {
        "train/loss",
        "train/psnr_db",
        "train/lr",
        "train/grad_norm",
        "train/skipped_steps",
        "train/samples_per_s",
        "train/data_wait",
        "system/peak_memory_mib",
    }
    assert row["train/samples_per_s"] == pytest.approx(_BATCH)  # a step a second
    assert 100 < row["system/peak_memory_mib"] < 100_000


def test_waiting_is_counted_over_spans(tmp_path: Path, clock: _Clock) -> None:
    """Each span has a stopwatch of its own, which begins at 0."""
    journal, trainer = Journal(_context(tmp_path), every_s=1e9), _FakeTrainer()
    first, second = Stopwatch(), Stopwatch()
    for watch, waited_s in ((first, 2.0), (first, 3.0), (second, 0.5), (second, 1.0)):
        clock.now += 4
        trainer.samples += _BATCH
        watch.waited_s = waited_s
        journal.step(trainer, _result(1.0), watch)  # type: ignore[arg-type]
    journal.write(trainer.samples, {}, event="stopped")
    journal.close()
    # Of twelve seconds after the first step: one more in the first span, one in the second.
    assert _rows(tmp_path)[0]["metrics"]["train/data_wait"] == pytest.approx(2 / 12)


def test_a_stop_writes_the_steps_since_the_last_row(tmp_path: Path, clock: _Clock) -> None:
    journal, trainer = Journal(_context(tmp_path), every_s=1e9), _FakeTrainer()
    trainer.samples = 8
    journal.step(trainer, _result(3.0), Stopwatch())  # type: ignore[arg-type]
    journal.write(8, {"data/wait/rank0": 0.1}, event="stopped")
    journal.close()
    losses, stopped = _rows(tmp_path)
    assert losses["samples"] == 8 and losses["metrics"]["train/loss"] == 3.0
    assert stopped["event"] == "stopped" and stopped["metrics"] == {"data/wait/rank0": 0.1}


def test_half_a_line_and_a_line_of_zeros_are_cut_off(tmp_path: Path) -> None:
    whole = json.dumps({"time": 1.0, "samples": 4, "metrics": {"train/loss": 1.0}}) + "\n"
    # The second: what a power cut leaves of a line on some file systems.
    for rest in ('{"time": 2.0, "samp', "\0" * 40, "\0" * 40 + "\n", ""):
        (tmp_path / METRICS).write_text(whole + rest)
        journal = Journal(_context(tmp_path), every_s=1)
        journal.write(4, {"train/loss": 2.0, "val/ssim": 0.5})
        journal.close()
        assert [row["metrics"] for row in _rows(tmp_path)] == [{"train/loss": 1.0}, {"val/ssim": 0.5}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    journal = Journal(_context(tmp_path, rank=1), every_s=0)
    trainer = _FakeTrainer()
    for trainer.samples in (4, 8):
        journal.step(trainer, _result(1.0), Stopwatch())  # type: ignore[arg-type]
    journal.flush()
    journal.write(8, {"val/psnr_db": 1.0}, event="stopped")
    journal.close()
    assert list(tmp_path.iterdir()) == []
