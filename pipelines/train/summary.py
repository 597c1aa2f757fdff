"""What a run came to, from its journal and its ledger: the figures that `nafnet train` ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.checkpoint import Entry
from pipelines.tracking import Row

_BEGINNINGS = ("started", "resumed")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One validation during a run."""

    samples: int
    """Samples seen by the weights that were scored."""
    psnr_db: float
    gain_db: float | None
    """Over the blurred input."""
    ssim: float | None
    """None where the images are smaller than its window."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in figures, all its attempts together."""

    samples: int
    epochs: float
    minutes: float
    """Of the workers' time, from each attempt's first step to its last row; what lay between is not in it."""
    samples_per_s: float
    """Median over the journal of global samples a second."""
    data_wait: float
    """Share of the time that rank 0 waited for data, median."""
    skipped_steps: int
    attempts: int
    num_workers: int
    """Of the last attempt."""
    best: Score | None
    """Of the checkpoint that is used; None where there was no validation."""
    last: Score | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def summarize(rows: Sequence[Row], best: Entry | None, *, epoch_samples: int) -> Summary:
    """Put a journal's rows into figures.

    Args:
        rows: of all attempts, in order.
        best: the ledger's best checkpoint.
        epoch_samples: one pass over the run's crops.
    """
    scores = {row.samples: _score(row) for row in rows if "val/psnr_db" in row.metrics}
    samples = max((row.samples for row in rows), default=0)
    skipped = [row.metrics["train/skipped_steps"] for row in rows if "train/skipped_steps" in row.metrics]
    return Summary(
        samples=samples,
        epochs=samples / epoch_samples,
        minutes=_seconds(rows) / 60,
        samples_per_s=median(rows, "train/samples_per_s"),
        data_wait=median(rows, "train/data_wait"),
        skipped_steps=int(max(skipped, default=0)),
        attempts=sum(row.event in _BEGINNINGS for row in rows),
        num_workers=int([0, *(row.metrics["workers"] for row in rows if "workers" in row.metrics)][-1]),
        best=None if best is None or best.psnr_db is None else scores.get(best.samples),
        last=scores[max(scores)] if scores else None,
    )


def median(rows: Sequence[Row], name: str) -> float:
    """The median of a metric over a journal; 0 where there is none."""
    values = sorted(row.metrics[name] for row in rows if name in row.metrics)
    return values[len(values) // 2] if values else 0.0


def _score(row: Row) -> Score:
    metrics = row.metrics
    ssim = metrics.get("val/ssim", math.nan)
    return Score(
        samples=row.samples,
        psnr_db=metrics["val/psnr_db"],
        gain_db=metrics.get("val/gain_db"),
        ssim=None if math.isnan(ssim) else ssim,
    )


def _seconds(rows: Sequence[Row]) -> float:
    """Time of the attempts, without what lay between two."""
    steps = zip(rows, rows[1:], strict=False)
    return sum(
        max(0.0, after.time_s - before.time_s) for before, after in steps if after.event not in _BEGINNINGS
    )
