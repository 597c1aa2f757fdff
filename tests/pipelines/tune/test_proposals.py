"""What is tried next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.tune.ledger import Score, TrialLedger
from pipelines.tune.proposals import propose
from pipelines.tune.space import Space, same
from tests.pipelines.tune import searches

_SPACE = {
    "optim.lr": {"loguniform": [1e-4, 1e-1]},
    "schedule": {"choice": [{"kind": "cosine"}, {"kind": "linear"}]},
}


def _searched(tmp_path: Path, searcher: str, number: int, *, restart: bool = False) -> list[dict[str, Any]]:
    """Points of so many trials, whose scores are best at a rate of 1e-3 and a cosine."""
    space = Space(searches.config(tmp_path, space=_SPACE, searcher=searcher, trials=number))
    path = tmp_path / f"{searcher}-{restart}.jsonl"
    ledger = TrialLedger(path)
    points = []
    for trial in range(1, number + 1):
        if restart:
            ledger = TrialLedger(path)
        point = propose(searcher, space, ledger, seed=3)
        if point is None:
            break
        points.append(point)
        ledger.begin(trial, point)
        if trial % 5 == 0:
            ledger.end(trial, "failed", "diverged")
            continue
        from math import log10

        psnr_db = 30 - abs(log10(point["optim.lr"]) + 3) - (point["schedule"]["kind"] != "cosine")
        ledger.score(trial, Score(step=1, samples=8, psnr_db=psnr_db, goes_on=True))
        if trial % 7:  # others are under way
            ledger.end(trial, "finished")
    return points


@pytest.mark.parametrize("searcher", ["random", "grid", "optuna"])
def test_a_search_that_is_killed_between_any_two_trials_goes_on_as_it_would_have(
    tmp_path: Path, searcher: str
) -> None:
    points = _searched(tmp_path, searcher, 24)
    assert same(points, _searched(tmp_path, searcher, 24, restart=True))
    # A grid of four rates and two schedules is through after eight.
    assert len(points) == (8 if searcher == "grid" else 24)
    assert len({str(point) for point in points}) == len(points)


def test_the_estimator_looks_where_scores_are_good(tmp_path: Path) -> None:
    def near(points: list[dict[str, Any]]) -> float:
        late = points[30:]
        return sum(3e-4 < p["optim.lr"] < 3e-3 and p["schedule"]["kind"] == "cosine" for p in late) / len(
            late
        )

    blind, guided = near(_searched(tmp_path, "random", 80)), near(_searched(tmp_path, "optuna", 80))
    assert blind < 0.35  # a sixth of the space
    assert guided > 0.5
