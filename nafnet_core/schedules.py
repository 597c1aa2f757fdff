"""Learning rate as a pure function of the samples seen, so that resuming needs one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

ScheduleKind = Literal["cosine", "linear", "exponential", "step", "constant"]


def learning_rate(
    samples: int,
    *,
    total_samples: int,
    base: float,
    final: float,
    kind: ScheduleKind = "cosine",
    warmup_samples: int = 0,
    decay: float = 0.5,
    milestones: Sequence[float] = (),
    step_samples: float | None = None,
) -> float:
    """Learning rate of the step that starts after `samples` samples.

    Warm-up rises linearly from `base / warmup_samples` to `base`; the schedule then runs over what is left.

    Args:
        samples: samples seen before this step.
        total_samples: the run's whole budget.
        base: the peak rate.
        final: the rate at the end (`cosine`, `linear`, `exponential`); must be positive for `exponential`.
        kind: `cosine` follows Loshchilov & Hutter 2017 without restarts; `step` multiplies by `decay` at
            each milestone, and every `step_samples`.
        warmup_samples: length of the warm-up.
        decay: factor of `step`.
        milestones: fractions of the budget, for `step`.
        step_samples: distance between steps in samples, for `step`; None for none.

    Raises:
        ValueError: an unknown `kind`.
    """
    if samples < warmup_samples:
        return base * (samples + 1) / warmup_samples
    progress = (samples - warmup_samples) / max(1, total_samples - warmup_samples)
    progress = min(max(progress, 0.0), 1.0)
    match kind:
        case "cosine":
            return final + (base - final) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return base + (final - base) * progress
        case "exponential":
            return base * (final / base) ** progress
        case "step":
            steps = sum(samples >= m * total_samples for m in milestones)
            return base * decay ** (
                steps + (int(min(samples, total_samples) // step_samples) if step_samples else 0)
            )
        case "constant":
            return base
    raise ValueError(f"unknown schedule {kind!r}")
