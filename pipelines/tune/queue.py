"""Which trial begins next, and when: as many at a time as the cluster has room for, failed ones replaced."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from pipelines.config import SearchConfig
from pipelines.train.room import fitting_workers, no_room
from pipelines.tune.actor import ERROR, STATE
from pipelines.tune.ledger import Trial, TrialLedger
from pipelines.tune.proposals import propose
from pipelines.tune.schedulers import METRIC
from pipelines.tune.space import Space

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0


class TrialQueue(Searcher):
    """Ray Tune's searcher: asked for trials, told of their ends.

    Those that a killed search has left come first. A trial that fails does not count, and another takes its
    place, up to `max_failed` times. Tune asks again and again: None is "not now".
    """

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        ledger: TrialLedger,
        *,
        begin: Callable[[Trial], dict[str, Any]],
        capacity: Callable[[], int],
    ) -> None:
        """
        Args:
            config, space, ledger: of the search.
            begin: makes a trial ready; returns what its actor is told.
            capacity: trials that the cluster has room for, now.
        """
        super().__init__(metric=METRIC, mode="max")
        self._config, self._space, self._ledger = config, space, ledger
        self._begin, self._capacity = begin, capacity
        self._left = ledger.running()
        self._running: dict[str, int] = {}  # Tune's name of a trial → its number
        self._is_waiting = False
        self.is_closed = False
        """Set it, and no further trial begins."""
        self.failure: str | None = None
        """Why the search has given up."""

    def suggest(self, trial_id: str) -> Any:
        trial = self._next()
        if isinstance(trial, Trial):
            self._running[trial_id] = trial.number
            return self._begin(trial)
        return trial

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number = self._running.pop(trial_id, None)
        if number is None:
            return
        trial, result = self._ledger.trials[number], result or {}
        # A score that was refused by the scheduler is a trial's last result, and its end.
        if trial.scores and not trial.scores[-1].goes_on:
            self._ledger.end(number, "stopped")
        elif error or STATE not in result:
            self._ledger.end(number, "failed", "its process or node died again and again")
        elif result[STATE] != "interrupted":
            self._ledger.end(number, result[STATE], result[ERROR])
        if trial.outcome == "failed":
            log.warning("trial %d failed: %s", number, trial.error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nobody reads

    def _next(self) -> Trial | str | None:
        """A trial; None for not now; `FINISHED`."""
        failed, well = self._ledger.ended("failed"), self._ledger.ended("finished", "stopped")
        if len(failed) > self._config.search.max_failed:
            self.is_closed = True
            self.failure = f"{len(failed)} trials failed, the last: {failed[-1].error}"
        if self.is_closed or len(well) >= self._config.search.num_trials:
            return Searcher.FINISHED
        room = self._capacity()
        if room and self._is_waiting:
            self._is_waiting = False
        elif not room and not self._running and not self._is_waiting:
            log.warning("the cluster has no room for a trial now: waiting for nodes")
            self._is_waiting = True
        if len(self._running) >= room:
            return None
        if self._left:
            return self._left.pop(0)
        point = None
        if len(well) + len(self._running) < self._config.search.num_trials:
            point = propose(self._config.search.searcher, self._space, self._ledger, seed=self._config.seed)
        if point is None:  # a grid is through, or those that run will do
            return None if self._running else Searcher.FINISHED
        return self._ledger.begin(len(self._ledger.trials) + 1, point)


class Room:
    """How many trials the cluster has room for, looked up every few seconds: nodes come and go."""

    def __init__(self, config: SearchConfig) -> None:
        self._scaling, self._most = config.scaling, config.search.max_concurrent
        self._looked_at, self._found = -_LOOK_EVERY_S, 0

    def __call__(self) -> int:
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._found = self._count()
            self._looked_at = time.monotonic()
        return self._found if self._most is None else min(self._found, self._most)

    def check(self) -> None:
        """Raise `CapabilityError` where not even one has room: it would be waited for, for ever."""
        if self() == 0:
            raise no_room(self._scaling)

    def _count(self) -> int:
        """The workers of a trial may be on several nodes."""
        return fitting_workers(self._scaling) // self._scaling.least_workers
