"""Ray Tune's schedulers, writing down what they decide, and told anew what an earlier attempt had found.

Their time axis is `step`, parts of the budget: so many that ASHA's first rung is at 1, or thousandths. The
rungs are then whole numbers, powers of the reduction factor, whatever the budget's samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from pipelines.config import SearchSection
from pipelines.tune.ledger import Score, Trial, TrialLedger

METRIC, STEP, SAMPLES, NUMBER = "psnr_db", "step", "samples", "trial_number"
_THOUSANDTHS = 1000


def steps_of_budget(search: SearchSection) -> int:
    """Steps of the schedulers' time axis in a whole budget."""
    return search.reduction_factor ** (search.rungs - 1) if search.scheduler == "asha" else _THOUSANDTHS


def scheduler_of(
    search: SearchSection, ledger: TrialLedger, on_stop: Callable[[int], None]
) -> TrialScheduler:
    """The scheduler that the recipe names, knowing all results in the ledger.

    Args:
        search: the recipe's section.
        ledger: earlier results, and where new ones are written.
        on_stop: called with the number of a trial that is to stop.
    """
    steps = steps_of_budget(search)
    match search.scheduler:
        case "asha":
            # A bit more than all steps: Ray counts rungs by a logarithm, which may come out a hair too small.
            scheduler = _Asha(
                time_attr=STEP, metric=METRIC, mode="max",
                max_t=steps + 0.5, grace_period=1, reduction_factor=search.reduction_factor,
            )  # fmt: skip
        case "median":
            # It would pause trials in favour of waiting ones, and a paused one keeps its workers.
            scheduler = _Median(
                time_attr=STEP, metric=METRIC, mode="max",
                grace_period=steps * search.grace_share, min_time_slice=math.inf,
            )  # fmt: skip
        case "none":
            scheduler = _Fifo()
    for trial in ledger.trials.values():
        scheduler.tell_anew(trial)
    scheduler.listen(ledger, steps, on_stop)
    return scheduler


@dataclass(eq=False)
class _Earlier:
    """Stands for a trial of an earlier attempt."""

    trial_id: str


class _Written:
    """Mixed into a scheduler: writes each score down with the decision, before anything follows from it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._earlier: dict[int, _Earlier] = {}

    def listen(self, ledger: TrialLedger, last_step: int, on_stop: Callable[[int], None]) -> None:
        """From now on results are new."""
        self._ledger, self._last_step, self._on_stop = ledger, last_step, on_stop

    def tell_anew(self, trial: Trial) -> None:
        """Results of an earlier attempt. What was decided then stands, so the answers are not asked for."""
        base: Any = super()
        stub = self._earlier[trial.number] = _Earlier(trial_id=f"earlier-{trial.number}")
        base.on_trial_add(None, stub)
        for score in trial.scores:
            base.on_trial_result(None, stub, _result(trial.number, score))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        base: Any = super()
        number = result[NUMBER]
        # A trial whose actor was lost tells again what it had told.
        if METRIC not in result or result[SAMPLES] <= self._ledger.trials[number].samples:
            return TrialScheduler.CONTINUE
        decision = base.on_trial_result(tune_controller, trial, result)
        # Who has used its budget up ends by itself.
        goes_on = decision != TrialScheduler.STOP or result[STEP] >= self._last_step
        score = Score(step=result[STEP], samples=result[SAMPLES], psnr_db=result[METRIC], goes_on=goes_on)
        self._ledger.score(number, score)
        if goes_on:
            return TrialScheduler.CONTINUE
        self._on_stop(number)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """All that it has to tell has been told."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nobody reads


class _Asha(_Written, ASHAScheduler):
    pass


class _Median(_Written, MedianStoppingRule):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """One that goes on is still the same trial: its mean and its best are of both attempts."""
        earlier = self._earlier.pop(result[NUMBER], None)
        if earlier in self._results:
            self._results[trial] = self._results.pop(earlier)
        return super().on_trial_result(tune_controller, trial, result)


class _Fifo(_Written, FIFOScheduler):
    pass


def _result(number: int, score: Score) -> dict[str, Any]:
    return {STEP: score.step, METRIC: score.psnr_db, SAMPLES: score.samples, NUMBER: number}
