"""All trials of a search: Ray Tune on a thread, and what each trial's run has to tell on the driver's own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nafnet_core import CapabilityError, NAFNetError
from pipelines.config import RunConfig, SearchConfig
from pipelines.tune.checks import scored_shares
from pipelines.tune.ledger import Trial, TrialLedger
from pipelines.tune.space import Space, short
from pipelines.tune.trial import TrialRun, trial_name
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipelines.tune.queue import TrialQueue

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


class Trials:
    """The trials, and their MLflow runs below the search's."""

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        workspace: Workspace,
        ledger: TrialLedger,
        client: MlflowClient,
        parent_run_id: str,
    ) -> None:
        self._config, self._space, self._workspace, self._ledger = config, space, workspace, ledger
        self._client, self._parent_run_id = client, parent_run_id
        self._runs: dict[int, TrialRun] = {}

    def run(self, folder: Path, *, wants_stop: Callable[[], bool], meanwhile: Callable[[], None]) -> None:
        """Have trials run until there are enough, or somebody asks to stop.

        Args:
            folder: of the search.
            wants_stop: whether somebody does.
            meanwhile: called twice a second.

        Raises:
            NAFNetError: none has room, one could not be made ready, or too many have failed.
        """
        for trial in self._ledger.running():  # killed between a decision and what follows from it
            if trial.scores and not trial.scores[-1].goes_on:
                self._ledger.end(trial.number, "stopped")
        if len(self._ledger.ended("finished", "stopped")) >= self._config.search.num_trials:
            return
        from pipelines.tune.queue import Room, TrialQueue

        room = Room(self._config)
        room.check()
        queue = TrialQueue(self._config, self._space, self._ledger, begin=self._begin, capacity=room)
        failures: list[BaseException] = []
        # Not on the main thread: there Ray Tune takes SIGINT for itself.
        thread = threading.Thread(
            target=self._tune, args=(queue, folder, failures), name="ray-tune", daemon=True
        )
        thread.start()
        is_stopping = False
        while thread.is_alive():
            thread.join(_LOOK_EVERY_S)
            if not is_stopping and (wants_stop() or queue.failure is not None):
                is_stopping = queue.is_closed = True
                for trial in self._ledger.running():
                    if trial.number in self._runs:
                        self._runs[trial.number].stop()
            for run in list(self._runs.values()):
                run.pump(self._client, self._parent_run_id)
            meanwhile()
        if failures:
            raise _explained(failures[0])
        if queue.failure is not None:
            raise CapabilityError(
                "the search gives up", file=folder, got=queue.failure,
                fix="Raise search.max_failed, or leave out of the space what cannot be trained",
            )  # fmt: skip

    def run_of(self, trial: Trial) -> TrialRun:
        """A trial's run, also of an earlier attempt."""
        known = self._runs.get(trial.number)
        return known or TrialRun(trial, self._recipe(trial), self._workspace)

    def close(self, *, wait_s: float) -> None:
        """Send what is left of all trials, what a server that was away has missed included."""
        end = time.monotonic() + wait_s
        for run in self._runs.values():
            run.close(wait_s=max(1.0, end - time.monotonic()))
        for trial in self._ledger.trials.values():
            run = self.run_of(trial)
            run.send_rest(self._client, self._parent_run_id, wait_s=max(1.0, end - time.monotonic()))

    def _tune(self, queue: TrialQueue, folder: Path, failures: list[BaseException]) -> None:
        from pipelines.tune.actor import TrialActor
        from pipelines.tune.schedulers import scheduler_of
        from pipelines.tune.tuner import tuned

        try:
            scheduler = scheduler_of(
                self._config.search, self._ledger, lambda number: self._runs[number].stop()
            )
            tuned(TrialActor, queue, scheduler, folder)
        except BaseException as error:  # carried over to the driver's own thread
            failures.append(error)

    def _begin(self, trial: Trial) -> dict[str, Any]:
        """Make a trial ready, for the queue."""
        from pipelines.tune.schedulers import steps_of_budget

        run = TrialRun(trial, self._recipe(trial), self._workspace)
        run.prepare()
        self._runs[trial.number] = run
        log.info("trial %d begins: %s", trial.number, short(trial.point))
        return run.told_to_actor(steps_of_budget(self._config.search))

    def _recipe(self, trial: Trial) -> RunConfig:
        """The recipe of a trial: scored at the scheduler's rungs, on threads that leave others theirs."""
        config = self._space.recipe(trial.point, name=trial_name(self._config.name, trial.number))
        scaling, validation = config.scaling, config.validation
        threads = scaling.threads_per_worker or max(1, round(scaling.cpus_per_worker))
        shares = scored_shares(self._config)
        return config.model_copy(
            update={
                "validation": validation.model_copy(update={"at": shares, "beside": False}),
                "scaling": scaling.model_copy(
                    update={"threads_per_worker": threads, "num_workers": scaling.least_workers}
                ),
            }
        )


def _explained(error: BaseException) -> BaseException:
    """The user's error inside what Ray Tune wraps it in, if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, NAFNetError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
