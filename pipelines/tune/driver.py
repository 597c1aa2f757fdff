"""The driver of a search: Ray Tune on a thread, the records of all trials here, Ctrl-C, and the winner."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import connect
from nafnet_core import CapabilityError, InputError, NAFNetError, StoppedError
from pipelines.config import RunConfig, SearchConfig
from pipelines.files import make_folder, write_json
from pipelines.ingest import plan_for
from pipelines.tracking import Row, Tracker, flattened, mlflow_client
from pipelines.train.checks import check, check_resources, warn
from pipelines.train.files import CONFIG, METRICS
from pipelines.train.loop import spans
from pipelines.train.stopping import stop_requests
from pipelines.tune import drawing
from pipelines.tune.ledger import Trial, TrialLedger
from pipelines.tune.record import SearchJournal, opening, write_recipe, write_table
from pipelines.tune.space import Space, short
from pipelines.tune.trial import TrialRun, folder_of, trial_name
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipelines.registry import Version

log = logging.getLogger(__name__)

LEDGER, RECIPE, TABLE, RESULT = "trials.jsonl", "best.yaml", "trials.csv", "search.json"
PARALLEL, HISTORY = "parallel_coordinates.png", "optimisation_history.png"

_LOOK_EVERY_S = 0.5
_WAIT_S, _WAIT_STOPPED_S = 60.0, 8.0
# Times that a trial's lost actor is replaced; it goes on from its checkpoint. Its workers have their own.
_MAX_ACTOR_FAILURES = 3
_FREE_SECTIONS = {"scaling", "checkpoint", "tracking"}
_FREE_KEYS = {"search.trials", "search.max_concurrent", "search.max_failed", "search.register_winner"}
_TUNE_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's end comes without a score
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """A finished search."""

    search_dir: Path
    mlflow_run_id: str
    trials: Sequence[Trial]
    best: Trial
    run: str
    """Name of the winner's run: the best trial's, or that of its training at full length."""
    weights: Path
    psnr_db: float
    """The winner's best validation."""
    recipe: Path
    samples: int
    """Trained on by all trials together."""
    full_samples: int
    """What all of them would have taken, none stopped."""
    pictures: tuple[Path, ...]
    version: Version | None
    """The registered candidate, if the recipe wanted that."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a search is, for whoever shows it."""

    trials: Sequence[Trial]
    num_wanted: int
    samples: int


def run(
    config: SearchConfig,
    workspace: Workspace,
    *,
    address: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> TuneResult:
    """Search, or go on with the search of this name where it stopped.

    Args:
        config: the whole search.
        workspace: where the trials' runs and the registry are.
        address: a Ray cluster; None for this machine.
        on_progress: called twice a second.
        on_row: called with each journal row of the last training, where the recipe wants one.

    Raises:
        InputError: the configuration, the data or an earlier search of this name does not allow it.
        CapabilityError: no trial could ever start here, or too many have failed.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
    """
    space = Space(config)
    check_search(config, space)
    warn(config.base)
    workspace.make()
    search = _Search(config, space, workspace)
    with ExitStack() as stack:
        client = mlflow_client(workspace, config.tracking.uri, must_answer=search.tracker.run_id is None)
        stack.enter_context(connect(address))
        request = stack.enter_context(stop_requests(search.folder / "stop"))
        check_resources(config.base)
        search.open(client)
        try:
            search.trials(lambda: request.exit_code is not None, on_progress)
            if request.exit_code is None:
                return search.conclude(address, on_row)
        except BaseException as error:
            search.close("KILLED" if isinstance(error, StoppedError) else "FAILED", wait_s=_WAIT_STOPPED_S)
            raise
        search.close("KILLED", wait_s=_WAIT_STOPPED_S)
        raise StoppedError(
            f"stopped; {len(search.ledger.trials)} trials are saved in {search.folder}",
            exit_code=request.exit_code,
            fix="The same command goes on from there",
        )


def check_search(config: SearchConfig, space: Space) -> None:
    """Everything that can be known before any time is spent. Raises `InputError`."""
    if config.data.val is None:
        raise InputError("trials are compared on a validation store", fix="Name one with --val STORE")
    if not config.validation.shares:
        raise InputError("trials are compared by their validations", fix="Set validation.times above 0")
    check(config.base)
    space.check()
    total = total_samples(config)
    first, batch = min(trial_config_shares(config)), max(stage.batch for stage in config.stages)
    if total * first < batch:
        raise InputError(
            "the budget is too short for the first rung",
            expected=f"at least a batch of {batch} samples in the first {first:.2%}",
            got=f"{total * first:.0f} of {total}",
            fix="Give a larger budget, or fewer search.rungs",
        )


def total_samples(config: RunConfig) -> int:
    """Samples of one trial that is not stopped."""
    epoch_samples = plan_for(config.data, seed=config.seed).epoch_samples
    wanted = config.budget.samples or round((config.budget.epochs or 0) * epoch_samples)
    last = spans(config, wanted, 0)[-1]
    return last.start + last.num_batches * last.batch


def trial_config_shares(config: SearchConfig) -> tuple[float, ...]:
    """Parts of the budget after which a trial is scored: ASHA's rungs, or as the recipe says."""
    return config.search.rung_shares if config.search.scheduler == "asha" else config.validation.shares


class _Search:
    """One search: its files, its trials, its records."""

    def __init__(self, config: SearchConfig, space: Space, workspace: Workspace) -> None:
        self._config, self._space, self._workspace = config, space, workspace
        self.folder = make_folder(workspace.run_dir(config.name))
        self._claim()
        self.ledger = TrialLedger(self.folder / LEDGER)
        self.tracker = Tracker(self.folder, self.folder / METRICS)
        if not self.ledger.trials:
            self._refuse_others()
        for trial in self.ledger.running():  # killed between a decision and what follows from it
            if trial.scores and not trial.scores[-1].goes_on:
                self.ledger.end(trial.number, "stopped")
        self._runs: dict[int, TrialRun] = {}
        self._journal = SearchJournal(self.folder / METRICS)

    def open(self, client: MlflowClient) -> None:
        """Begin the records. Raises `CapabilityError` where the server makes no run."""
        self._client = client
        write_json(self.folder / CONFIG, self._config.model_dump(mode="json"))
        self.tracker.start(client, opening(self._config, client, self._workspace))

    @property
    def _run_id(self) -> str:
        assert self.tracker.run_id is not None
        return self.tracker.run_id

    def trials(self, wants_stop: Callable[[], bool], on_progress: Callable[[Progress], None]) -> None:
        """Run trials until there are enough, or somebody asks to stop.

        Raises:
            CapabilityError: too many have failed.
        """
        if self._config.search.num_trials <= len(self.ledger.ended("finished", "stopped")):
            return
        from pipelines.tune.queue import Room, TrialQueue

        queue = TrialQueue(
            self._config, self._space, self.ledger, begin=self._begin, capacity=Room(self._config)
        )
        failures: list[BaseException] = []
        # Not on the main thread: there Ray Tune takes SIGINT for itself.
        thread = threading.Thread(target=self._tune, args=(queue, failures), name="ray-tune", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_EVERY_S)
            if wants_stop() and not queue.is_closed:
                queue.is_closed = True
                for trial in self.ledger.running():
                    if trial.number in self._runs:
                        self._runs[trial.number].stop()
            self._pump()
            on_progress(self._progress())
        self._pump()
        if failures:
            raise _explained(failures[0])
        if queue.failure is not None:
            raise CapabilityError(
                "the search gives up", file=self.folder, got=queue.failure,
                fix="Raise search.max_failed, or leave out of the space what cannot be trained",
            )  # fmt: skip

    def conclude(self, address: str | None, on_row: Callable[[Row], None]) -> TuneResult:
        """Write down the best, train it once more and register it, as the recipe wants."""
        best = self.ledger.best()
        if best is None:
            raise CapabilityError("no trial came to a score", file=self.folder)
        search, name = self._config.search, f"{self._config.name}-best"
        recipe = self._space.recipe(best.point, name=name)
        if search.retrain is not None:
            recipe = recipe.model_copy(update={"budget": search.retrain})
        path = write_recipe(self.folder / RECIPE, recipe, comment=self._told_of(best))
        winner, weights, psnr_db = self._winner(best, recipe, address, on_row)
        version = None
        if search.register_winner:
            version = self._registered(winner)
        pictures = self._draw()
        self.close("FINISHED", wait_s=_WAIT_S, files=[path])
        result = TuneResult(
            search_dir=self.folder,
            mlflow_run_id=self._run_id,
            trials=tuple(self.ledger.trials.values()),
            best=best,
            run=winner,
            weights=weights,
            psnr_db=psnr_db,
            recipe=path,
            samples=self.ledger.samples,
            full_samples=len(self.ledger.ended("finished", "stopped")) * total_samples(self._config),
            pictures=pictures,
            version=version,
        )
        write_json(
            self.folder / RESULT,
            {"run": winner, "psnr_db": psnr_db, "version": None if version is None else version.version},
        )
        return result

    def close(self, status: str, *, wait_s: float, files: Sequence[Path] = ()) -> None:
        """Send all that is left, for so long at most."""
        end = time.monotonic() + wait_s
        for run in self._runs.values():
            run.close(wait_s=max(1.0, end - time.monotonic()))
        for run in self._every_run():
            run.send_rest(self._client, self._run_id, wait_s=max(1.0, end - time.monotonic()))
        self._journal.catch_up(self.ledger)
        table = write_table(self.folder / TABLE, list(self.ledger.trials.values()))
        self.tracker.finish(status, [table, *self._draw(), *files], wait_s=max(1.0, end - time.monotonic()))

    def _tune(self, queue: Any, failures: list[BaseException]) -> None:
        from ray import tune

        from pipelines.tune.actor import ACTOR_CPUS, TrialActor
        from pipelines.tune.schedulers import scheduler_of

        attempts = make_folder(self.folder / "ray")
        for name, value in _TUNE_QUIET.items():
            os.environ.setdefault(name, value)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures of trials are told in a line each
        try:
            tune.Tuner(
                tune.with_resources(TrialActor, {"cpu": ACTOR_CPUS}),
                tune_config=tune.TuneConfig(
                    num_samples=-1,  # the queue says when it is enough
                    search_alg=queue,
                    scheduler=scheduler_of(
                        self._config.search, self.ledger, lambda number: self._runs[number].stop()
                    ),
                    reuse_actors=True,
                    trial_name_creator=lambda trial: trial.trial_id,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    # Each attempt its own: what goes on is in our ledger, not in Ray's snapshots.
                    name=f"attempt-{sum(1 for _ in attempts.iterdir()):03d}",
                    storage_path=str(attempts),
                    failure_config=tune.FailureConfig(max_failures=_MAX_ACTOR_FAILURES),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs have their own
                    verbose=0,
                ),
            ).fit()
        except BaseException as error:  # carried over to the driver's own thread
            failures.append(error)

    def _begin(self, trial: Trial) -> dict[str, Any]:
        """Make a trial ready, for the queue."""
        from pipelines.tune.schedulers import steps_of_budget

        run = TrialRun(trial, self._trial_config(trial), self._workspace)
        run.prepare()
        self._runs[trial.number] = run
        log.info("trial %d begins: %s", trial.number, short(trial.point))
        return run.told_to_actor(steps_of_budget(self._config.search))

    def _trial_config(self, trial: Trial) -> RunConfig:
        """The recipe of a trial: scored at the scheduler's rungs, with threads that leave others theirs."""
        config = self._space.recipe(trial.point, name=trial_name(self._config.name, trial.number))
        scaling = config.scaling
        threads = scaling.threads_per_worker or max(1, round(scaling.cpus_per_worker))
        return config.model_copy(
            update={
                "validation": config.validation.model_copy(
                    update={"at": trial_config_shares(self._config), "beside": False}
                ),
                "scaling": scaling.model_copy(
                    update={"threads_per_worker": threads, "num_workers": scaling.least_workers}
                ),
            }
        )

    def _pump(self) -> None:
        for run in list(self._runs.values()):
            run.pump(self._client, self._run_id)
        self._journal.catch_up(self.ledger)
        self.tracker.pump()

    def _every_run(self) -> list[TrialRun]:
        """Also those of earlier attempts, which a server that was away may have missed."""
        return [
            self._runs.get(trial.number) or TrialRun(trial, self._trial_config(trial), self._workspace)
            for trial in self.ledger.trials.values()
        ]

    def _progress(self) -> Progress:
        return Progress(
            trials=tuple(self.ledger.trials.values()),
            num_wanted=self._config.search.num_trials,
            samples=self.ledger.samples,
        )

    def _winner(
        self, best: Trial, recipe: RunConfig, address: str | None, on_row: Callable[[Row], None]
    ) -> tuple[str, Path, float]:
        """Name, weights and score of the run that has won."""
        from pipelines import train
        from pipelines.checkpoint import CheckpointLedger

        if self._config.search.retrain is None:
            run = self._runs.get(best.number) or TrialRun(best, self._trial_config(best), self._workspace)
            if run.mirror is not None:
                run.mirror.pull_checkpoints()
            ledger = CheckpointLedger(run.run_dir)
        else:
            run_dir = self._workspace.run_dir(recipe.name)
            if not (run_dir / "result.json").exists():
                train.run(recipe, self._workspace, address=address, on_row=on_row)
            ledger = CheckpointLedger(run_dir)
        entry = ledger.best()
        assert entry is not None and entry.psnr_db is not None, "a scored trial has a scored checkpoint"
        name = (
            recipe.name
            if self._config.search.retrain is not None
            else trial_name(self._config.name, best.number)
        )
        return name, ledger.weights(entry), entry.psnr_db

    def _registered(self, winner: str) -> Version | None:
        """Register the winner, once: a search that is told to conclude again finds its version."""
        from pipelines import registry

        earlier = self.folder / RESULT
        if earlier.exists() and (number := json.loads(earlier.read_text())["version"]) is not None:
            return next((v for v in registry.versions(self._workspace) if v.version == number), None)
        return registry.register(winner, self._workspace, on=self._config.data.val)

    def _draw(self) -> tuple[Path, ...]:
        title, trials = self._config.name, list(self.ledger.trials.values())
        pictures = (
            drawing.parallel_coordinates(self.folder / PARALLEL, self._space, trials, title=title),
            drawing.history(self.folder / HISTORY, self.ledger, title=title),
        )
        return tuple(picture for picture in pictures if picture is not None)

    def _told_of(self, best: Trial) -> str:
        values = ", ".join(f"{key} {value}" for key, value in short(best.point).items())
        score = f"{best.psnr_db:.2f} dB after {best.samples} samples"
        return f"The best of search {self._config.name}, its trial {best.number}: {score}, with {values}."

    def _claim(self) -> None:
        """Refuse to go on with a search of this name that was started with other values."""
        path = self.folder / CONFIG
        if not path.exists():
            if (self.folder / METRICS).exists():
                raise InputError("a run has this name", file=self.folder, fix="Give another with --name")
            return
        earlier = json.loads(path.read_text())
        if "search" not in earlier:
            raise InputError("a training run has this name", file=self.folder, fix="Give another with --name")
        if not (self.folder / LEDGER).exists():
            return
        was, now = flattened(earlier), flattened(self._config.model_dump(mode="json"))
        changed = [
            key
            for key in sorted(now.keys() | was.keys())
            if key.partition(".")[0] not in _FREE_SECTIONS
            and key not in _FREE_KEYS
            and now.get(key) != was.get(key)
        ]
        if changed:
            raise InputError(
                "a search of this name was started with other values",
                file=path,
                expected=", ".join(f"{key}={was.get(key)}" for key in changed[:4]),
                got=", ".join(f"{key}={now.get(key)}" for key in changed[:4]),
                fix="Give the new search another name with --name",
            )

    def _refuse_others(self) -> None:
        """A new search: runs that have its trials' names are somebody else's."""
        first = folder_of(self._workspace, self._config.name, 1)
        if first.exists() and any(first.iterdir()):
            raise InputError(
                "a run has the name of this search's first trial", file=first,
                fix="Give the search another name with --name",
            )  # fmt: skip


def _explained(error: BaseException) -> BaseException:
    """The user's error inside what Ray Tune wraps it in, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NAFNetError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error
