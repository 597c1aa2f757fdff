"""Ray Tune's schedulers with our ledger: rungs, decisions, and what an earlier attempt had found."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from pipelines.tune.ledger import TrialLedger
from pipelines.tune.schedulers import METRIC, NUMBER, SAMPLES, STEP, scheduler_of, steps_of_budget
from tests.pipelines.tune import searches

_BUDGET = 160


@dataclass(eq=False)
class _Trial:
    trial_id: str
    status: str = "RUNNING"


class _Tuned:
    """A search without training: trials report made-up scores to the real scheduler."""

    def __init__(self, tmp_path: Path, **search: Any) -> None:
        self.search = searches.config(tmp_path, **search).search
        self.path, self.stopped = tmp_path / "trials.jsonl", []
        self.attempt = 0
        self.restart()

    def restart(self) -> None:
        """The driver was killed: all but the ledger is lost."""
        self.attempt += 1
        self.ledger = TrialLedger(self.path)
        self.scheduler = scheduler_of(self.search, self.ledger, self.stopped.append)
        self._trials: dict[int, _Trial] = {}

    def begin(self, number: int) -> None:
        self.ledger.begin(number, {})

    def tell(self, number: int, samples: int, psnr_db: float) -> bool:
        """Whether the trial goes on."""
        if number not in self._trials:
            self._trials[number] = _Trial(f"{self.attempt}-{number}")
            self.scheduler.on_trial_add(None, self._trials[number])  # type: ignore[arg-type]
        step = int(samples / _BUDGET * steps_of_budget(self.search) + 1e-6)
        result = {STEP: step, METRIC: psnr_db, SAMPLES: samples, NUMBER: number}
        decision = self.scheduler.on_trial_result(None, self._trials[number], result)  # type: ignore[arg-type]
        assert decision in (TrialScheduler.CONTINUE, TrialScheduler.STOP)
        return decision == TrialScheduler.CONTINUE


def _asha(tuned: _Tuned, order: list[int], quality: dict[int, float], *, kill_every: int = 0) -> set[int]:
    """Run all trials, one after the other, a rung at a time; who came to the end."""
    told, ended = 0, set()
    for number in order:
        tuned.begin(number)
        for share in tuned.search.rung_shares:
            told += 1
            if kill_every and told % kill_every == 0:
                tuned.restart()
            if not tuned.tell(number, round(share * _BUDGET), quality[number] + share):
                tuned.ledger.end(number, "stopped")
                break
        else:
            tuned.ledger.end(number, "finished")
            ended.add(number)
    return ended


def test_asha_stops_all_but_the_best_quarter_at_each_rung(tmp_path: Path) -> None:
    tuned = _Tuned(tmp_path, scheduler="asha", reduction_factor=4, rungs=3)
    quality = {number: random.Random(number).uniform(20, 30) for number in range(1, 41)}
    ended = _asha(tuned, list(quality), quality)
    scores = {trial.number: len(trial.scores) for trial in tuned.ledger.trials.values()}
    assert max(quality, key=quality.__getitem__) in ended
    assert sum(count == 1 for count in scores.values()) > 20  # a quarter goes on, and who came early
    assert len(ended) < 8
    assert set(tuned.stopped) == set(quality) - ended
    # The decision is in the ledger, before anything has followed from it.
    assert all(trial.scores[-1].goes_on == (trial.number in ended) for trial in tuned.ledger.trials.values())


@pytest.mark.parametrize("rungs", [2, 3, 5])
def test_rungs_are_where_the_shares_are(tmp_path: Path, rungs: int) -> None:
    """Ray counts them by a logarithm: of 3 to the fifth it is a hair too small."""
    tuned = _Tuned(tmp_path, scheduler="asha", reduction_factor=3, rungs=rungs)
    milestones = [milestone for milestone, _ in tuned.scheduler._brackets[0]._rungs]  # type: ignore[attr-defined]
    assert milestones == [3**power for power in reversed(range(rungs))]


def test_rungs_are_rebuilt_after_every_kill(tmp_path: Path) -> None:
    quality = {number: random.Random(number).uniform(20, 30) for number in range(1, 41)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = _Tuned(tmp_path / "a", scheduler="asha")
    killed = _Tuned(tmp_path / "b", scheduler="asha")
    assert _asha(whole, list(quality), quality) == _asha(killed, list(quality), quality, kill_every=1)
    assert [t.scores for t in whole.ledger.trials.values()] == [
        t.scores for t in killed.ledger.trials.values()
    ]


def test_the_last_rung_stops_nobody_who_is_at_the_end(tmp_path: Path) -> None:
    tuned = _Tuned(tmp_path, scheduler="asha", rungs=2)
    for number, psnr_db in ((1, 30.0), (2, 29.0)):
        tuned.begin(number)
        assert tuned.tell(number, _BUDGET, psnr_db)
    assert not tuned.stopped


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_what_was_told_before_is_not_written_again(tmp_path: Path, scheduler: str) -> None:
    """A trial whose actor was lost begins its journal anew."""
    tuned = _Tuned(tmp_path, scheduler=scheduler)
    tuned.begin(1)
    for samples in (10, 40, 10, 40):
        assert tuned.tell(1, samples, 25.0)
    assert [score.samples for score in tuned.ledger.trials[1].scores] == [10, 40]


def test_the_median_rule_stops_who_is_below_half_of_the_others(tmp_path: Path) -> None:
    tuned = _Tuned(tmp_path, scheduler="median", grace_share=0.2)
    for number in range(1, 5):
        tuned.begin(number)
        for samples in (16, 80, 160):
            assert tuned.tell(number, samples, 24.0 + number + samples / 160)
        tuned.ledger.end(number, "finished")
    tuned.begin(5)
    assert tuned.tell(5, 16, 20.0)  # in the time of grace
    tuned.restart()
    assert not tuned.tell(5, 80, 20.0)
    assert tuned.stopped == [5]
    tuned.begin(6)
    assert tuned.tell(6, 80, 29.0)


def test_a_resumed_trial_keeps_its_best_score_under_the_median_rule(tmp_path: Path) -> None:
    tuned = _Tuned(tmp_path, scheduler="median", grace_share=0.0)
    for number in range(1, 5):
        tuned.begin(number)
        assert tuned.tell(number, 160, 25.0)
        tuned.ledger.end(number, "finished")
    tuned.begin(5)
    assert tuned.tell(5, 16, 27.0)
    tuned.restart()
    assert tuned.tell(5, 80, 24.0)  # its 27.0 counts


def test_without_a_scheduler_all_go_on(tmp_path: Path) -> None:
    tuned = _Tuned(tmp_path, scheduler="none")
    for number in range(1, 9):
        tuned.begin(number)
        assert all(tuned.tell(number, samples, 30.0 - number) for samples in (10, 80, 160))
