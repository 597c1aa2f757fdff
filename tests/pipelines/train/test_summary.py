"""A run in figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipelines.checkpoint import Entry
from pipelines.pictures import _as_one, training_curves
from pipelines.tracking import Row
from pipelines.train.summary import summarize


def _row(time_s: float, samples: int, event: str | None = None, **metrics: float) -> Row:
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return Row(time_s=time_s, samples=samples, metrics=named, event=event, end=0)


# Killed after 40 samples, an hour away, resumed from a checkpoint at 20.
_ROWS = [
    _row(0, 0, "started"),
    _row(30, 20, train_samples_per_s=2.0, train_data_wait=0.1, train_skipped_steps=0),
    _row(60, 20, val_psnr_db=25.0, val_gain_db=1.5, val_ssim=0.7),
    _row(90, 40, train_samples_per_s=4.0, train_data_wait=0.2, train_skipped_steps=2),
    _row(3690, 20, "resumed"),
    _row(3750, 60, train_samples_per_s=3.0, train_data_wait=0.3, train_skipped_steps=1),
    _row(3780, 60, val_psnr_db=24.0, val_gain_db=0.5, val_ssim=math.nan),
]


def test_best_and_last_are_told_apart() -> None:
    best = Entry(samples=20, folder="20", psnr_db=25.0, digests={})
    summary = summarize(_ROWS, best, epoch_samples=40)
    assert (summary.samples, summary.epochs, summary.attempts) == (60, 1.5, 2)
    assert summary.minutes == pytest.approx(3.0)  # the hour between is not the run's
    assert (summary.samples_per_s, summary.data_wait, summary.skipped_steps) == (3.0, 0.2, 2)
    assert summary.best is not None and summary.last is not None
    assert (summary.best.samples, summary.best.psnr_db, summary.best.gain_db) == (20, 25.0, 1.5)
    assert summary.best.ssim == 0.7
    assert (summary.last.samples, summary.last.psnr_db, summary.last.ssim) == (60, 24.0, None)


def test_a_run_without_validation_has_no_score() -> None:
    entry = Entry(samples=60, folder="60", psnr_db=None, digests={})
    rows = [row for row in _ROWS if "val/psnr_db" not in row.metrics]
    summary = summarize(rows, entry, epoch_samples=40)
    assert summary.best is None and summary.last is None
    assert summarize([], None, epoch_samples=40).samples == 0


def test_steps_taken_again_are_drawn_once(tmp_path: Path) -> None:
    rows, marks = _as_one(_ROWS)
    assert [row.samples for row in rows if "train/samples_per_s" in row.metrics] == [20, 60]
    assert marks == [20]
    assert training_curves(tmp_path / "none.png", [_row(0, 0, "started")], title="nothing") is None
    one = [_row(0, 8, train_psnr_db=25.0)]
    assert (training_curves(tmp_path / "one.png", one, title="one") or tmp_path).stat().st_size > 1000
