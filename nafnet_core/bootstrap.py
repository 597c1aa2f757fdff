"""How sure a mean difference is: a paired bootstrap, over scenes where images of a scene are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_BLOCK = 2**22  # draws held at a time


def bootstrap_interval(
    differences: Sequence[float] | NDArray[np.float64],
    groups: Sequence[object] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Interval of a mean difference of pairs, by resampling.

    The percentile bootstrap (Efron 1979), its percentiles moved outwards as by Hesterberg 2015 (section 5.3,
    "expanded percentile"), since of few units it is too narrow: of 12 scenes it
    covers 90 % instead of 95, of 6 scenes 86 %.

    Args:
        differences: one a pair, as B − A of an image.
        groups: the unit that is resampled, one a pair, such as the image's scene; all of its pairs go with
            it. None: each pair by itself.
        confidence: of the interval, above 0 and below 1.
        resamples: how many.
        seed: the same numbers give the same interval.

    Returns:
        Low and high; None of a single unit, which tells nothing of others.

    Raises:
        ValueError: no differences, or groups of another length.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected some differences, got shape {values.shape}")
    if groups is None:
        sums, counts = values, np.ones(len(values))
    else:
        if len(groups) != len(values):
            raise ValueError(f"{len(values)} differences and {len(groups)} groups")
        numbers: dict[object, int] = {}
        units = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
        sums, counts = np.bincount(units, weights=values), np.bincount(units).astype(np.float64)
    num_units = len(sums)
    if num_units < 2:
        return None
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK // num_units)
    for start in range(0, resamples, block):
        drawn = generator.integers(num_units, size=(min(block, resamples - start), num_units))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = _expanded(1 - confidence, num_units)
    low, high = np.quantile(means, [tail, 1 - tail]).tolist()
    return low, high


def _expanded(outside: float, num_units: int) -> float:
    """The share to cut off at each end so that about `outside` lies outside of both."""
    freedom = num_units - 1
    return NormalDist().cdf(-math.sqrt(num_units / freedom) * _student_quantile(1 - outside / 2, freedom))


def _student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t, above the median, by halving: the integral of its density to 1e-6."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)

    def below(limit: float) -> float:
        # With x = tan(a)·√ν the density becomes cos(a)^(ν−1), which is smooth and has an end.
        angles, step = np.linspace(0, math.atan(limit / math.sqrt(freedom)), 2001, retstep=True)
        heights = np.cos(angles) ** (freedom - 1)
        area = (heights.sum() - (heights[0] + heights[-1]) / 2) * step
        return 0.5 + scale * math.sqrt(freedom) * float(area)

    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return (low + high) / 2
