"""Ray Tune's schedulers, writing down what they decide, and told anew what an earlier attempt had found.

A score stands on the axis `step`: the number of ASHA's rungs that it reaches, as powers of the reduction
factor, or thousandths of the budget. So the shares of a budget, whatever its samples, meet the rungs exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray.tune.schedulers as ray_schedulers

from pipelines.config import SearchSection
from pipelines.tune.ledger import Score, Trial, TrialLedger

METRIC, STEP, SAMPLES, NUMBER = "psnr_db", "step", "samples", "trial_number"
_THOUSANDTHS = 1000


def step_of(search: SearchSection, share: float) -> int:
    """Place on the axis of a score after this part of the budget."""
    if search.scheduler == "asha":
        return round(share * search.reduction_factor ** (search.rungs - 1))
    return round(share * _THOUSANDTHS)


def scheduler_of(
    search: SearchSection, ledger: TrialLedger, on_stop: Callable[[int], None]
) -> ray_schedulers.TrialScheduler:
    """The scheduler that the recipe names, knowing all results in the ledger.

    Args:
        search: the recipe's section.
        ledger: earlier results, and where new ones are written.
        on_stop: called with the number of a trial that is to stop.
    """
    match search.scheduler:
        case "asha":
            scheduler = _Asha(
                time_attr=STEP,
                metric=METRIC,
                mode="max",
                max_t=step_of(search, 1.0),
                grace_period=1,
                reduction_factor=search.reduction_factor,
            )
        case "median":
            scheduler = _Median(
                time_attr=STEP,
                metric=METRIC,
                mode="max",
                grace_period=step_of(search, search.grace_share),
                # It would pause trials in favour of waiting ones: a paused one keeps its workers.
                min_time_slice=float("inf"),  # type: ignore[arg-type]
            )
        case "none":
            scheduler = _First()
    for trial in ledger.trials.values():
        scheduler.tell_anew(trial)
    scheduler.listen(ledger, on_stop)
    return scheduler


class _Written:
    """Mixed into a scheduler: writes each score down with the decision, before anything follows from it."""

    _ledger: TrialLedger | None = None
    _on_stop: Callable[[int], None]

    def listen(self, ledger: TrialLedger, on_stop: Callable[[int], None]) -> None:
        """From now on results are new."""
        self._ledger, self._on_stop = ledger, on_stop

    def tell_anew(self, trial: Trial) -> None:
        """Results of an earlier attempt; what it decided stands, so the answers are not asked for."""
        stub: Any = _stub(trial.number)
        base: Any = super()
        base.on_trial_add(None, stub)
        for score in trial.scores:
            base.on_trial_result(None, stub, _result(trial.number, score))
        if trial.scores and trial.outcome == "finished":
            base.on_trial_complete(None, stub, _result(trial.number, trial.scores[-1]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        base: Any = super()
        if METRIC not in result:  # a trial's end, that came with no score
            return ray_schedulers.TrialScheduler.CONTINUE
        decision = base.on_trial_result(tune_controller, trial, result)
        number = result[NUMBER]
        stops = decision == ray_schedulers.TrialScheduler.STOP
        assert self._ledger is not None
        score = Score(
            step=result[STEP], samples=result[SAMPLES], psnr_db=result[METRIC], goes_on=not stops
        )
        self._ledger.score(number, score)
        if stops:
            self._on_stop(number)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        base: Any = super()
        if METRIC in result:  # the median rule takes the result for one with a score
            base.on_trial_complete(tune_controller, trial, result)


class _Asha(_Written, ray_schedulers.ASHAScheduler):
    """Whoever reaches the last rung is at the end of its budget, and needs no stopping."""

    def __init__(self, *, max_t: int, **options: Any) -> None:
        # A step more: at `max_t` itself Ray stops a trial, unasked, that is about to end by itself.
        super().__init__(max_t=max_t + 1, **options)


class _Median(_Written, ray_schedulers.MedianStoppingRule):
    pass


class _First(_Written, ray_schedulers.FIFOScheduler):
    pass


def _stub(number: int) -> Any:
    return SimpleNamespace(trial_id=f"earlier-{number}", status="TERMINATED")


def _result(number: int, score: Score) -> dict[str, Any]:
    return {STEP: score.step, METRIC: score.psnr_db, SAMPLES: score.samples, NUMBER: number}
