"""The driver of a search: what is told of it as a whole, Ctrl-C, and the winner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.connect import connect
from nafnet_core import CapabilityError, InputError, StoppedError
from pipelines.config import SearchConfig
from pipelines.files import locked, make_folder, write_json
from pipelines.preflight import in_brief
from pipelines.tracking import Row, Tracker, mlflow_client
from pipelines.train.attempt import storage_of
from pipelines.train.checks import check_resources, warn
from pipelines.train.files import CONFIG, METRICS, STOP
from pipelines.train.room import wait_for_room
from pipelines.train.stopping import stop_requests
from pipelines.tune import drawing
from pipelines.tune.checks import check_search, claim, scored_shares, total_samples
from pipelines.tune.files import HISTORY, LEDGER, LOCK, PARALLEL, TABLE, WINNER
from pipelines.tune.ledger import Trial, TrialLedger
from pipelines.tune.record import SearchJournal, opening, write_table
from pipelines.tune.space import Space
from pipelines.tune.trials import Trials
from pipelines.tune.winner import Winner, registered, winner_of, write_best
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipelines.registry import Version

_WAIT_S, _WAIT_STOPPED_S = 60.0, 8.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a search is, for whoever shows it."""

    trials: Sequence[Trial]
    num_wanted: int
    num_rungs: int
    """Scores of a trial that goes to the end."""
    samples: int
    """Trained on by all trials together."""


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """A finished search."""

    search_dir: Path
    mlflow_run_id: str
    progress: Progress
    best: Trial
    winner: Winner
    recipe: Path
    full_samples: int
    """What all of them would have taken, none stopped."""
    pictures: tuple[Path, ...]
    version: Version | None
    """The registered candidate, if the recipe wanted that."""


def run(
    config: SearchConfig,
    workspace: Workspace,
    *,
    address: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_row: Callable[[Row], None] = lambda row: None,
    on_scored: Callable[[int, int], None] = lambda done, total: None,
) -> TuneResult:
    """Search, or go on with the search of this name where it stopped.

    Args:
        config: the whole search.
        workspace: where the trials' runs and the registry are.
        address: a Ray cluster; None for this machine.
        on_progress: called twice a second.
        on_row: called with each journal row of the winner's training at full length, if there is one.
        on_scored: images scored for the registry.

    Raises:
        InputError: the configuration, the data or an earlier search of this name does not allow it.
        CapabilityError: no trial could ever start here, or too many have failed.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
    """
    space = Space(config)
    check_search(config, space)
    warn(config.base)
    workspace.make()
    claim(config, workspace)
    folder = make_folder(workspace.run_dir(config.name))
    with locked(folder / LOCK, held=folder, option="--name"):
        search = _Search(config, space, workspace, folder)
        client = mlflow_client(workspace, config.tracking.uri, must_answer=search.tracker.run_id is None)
        with connect(address), stop_requests(folder / STOP) as request:
            if address is None:
                check_resources(config.base)
            else:
                wait_for_room(
                    config.base.scaling,
                    num_groups=config.search.max_concurrent or 1,
                    exit_code=lambda: request.exit_code,
                )
            in_brief(config.base, storage_of(config.base, folder)[0])
            trials = search.open(client)

            def meanwhile() -> None:
                search.pump()
                on_progress(search.progress())

            try:
                trials.run(folder, wants_stop=lambda: request.exit_code is not None, meanwhile=meanwhile)
                if request.exit_code is not None:
                    raise StoppedError(
                        f"stopped; {len(search.ledger.trials)} trials are saved in {folder}",
                        exit_code=request.exit_code,
                        fix="The same command goes on from there",
                    )
                return search.conclude(trials, address, on_row, on_scored)
            except BaseException as error:
                status = "KILLED" if isinstance(error, StoppedError) else "FAILED"
                trials.close(wait_s=_WAIT_STOPPED_S)
                search.close(status, wait_s=_WAIT_STOPPED_S)
                raise


class _Search:
    """One search: its files, and its MLflow run."""

    def __init__(self, config: SearchConfig, space: Space, workspace: Workspace, folder: Path) -> None:
        self._config, self._space, self._workspace = config, space, workspace
        self.folder = folder
        self.ledger = TrialLedger(self.folder / LEDGER)
        self.tracker = Tracker(self.folder, self.folder / METRICS)
        self._journal = SearchJournal(self.folder / METRICS)
        num_ended = len(self.ledger.ended("finished", "stopped"))
        if (self.folder / WINNER).exists() and num_ended >= config.search.num_trials:
            raise InputError(
                "this search is finished already",
                file=self.folder,
                fix="Raise search.trials to go on with it, or give another name with --name",
            )

    def open(self, client: MlflowClient) -> Trials:
        """Begin the records. Raises `CapabilityError` where the server makes no run."""
        write_json(self.folder / CONFIG, self._config.model_dump(mode="json"))
        self.tracker.start(client, opening(self._config, client, self._workspace))
        assert self.tracker.run_id is not None
        return Trials(self._config, self._space, self._workspace, self.ledger, client, self.tracker.run_id)

    def pump(self) -> None:
        """Send what is new."""
        self._journal.catch_up(self.ledger)
        self.tracker.pump()

    def progress(self) -> Progress:
        """How far it is."""
        return Progress(
            trials=tuple(self.ledger.trials.values()),
            num_wanted=self._config.search.num_trials,
            num_rungs=len(scored_shares(self._config)),
            samples=self.ledger.samples,
        )

    def conclude(
        self,
        trials: Trials,
        address: str | None,
        on_row: Callable[[Row], None],
        on_scored: Callable[[int, int], None],
    ) -> TuneResult:
        """Write down the best, train it once more and register it, as the recipe wants."""
        best = self.ledger.best()
        if best is None:
            raise CapabilityError("no trial came to a score", file=self.folder)
        recipe, path = write_best(self._config, self._space, best, self.folder)
        trials.close(wait_s=_WAIT_S)
        winner = winner_of(
            recipe,
            trials.run_of(best),
            self._workspace,
            retrain=self._config.search.retrain is not None,
            address=address,
            on_row=on_row,
        )
        version = registered(winner, self._config, self._workspace, self.folder, on_scored)
        pictures = self.close("FINISHED", wait_s=_WAIT_S, files=[path])
        assert self.tracker.run_id is not None
        num_ended = len(self.ledger.ended("finished", "stopped"))
        return TuneResult(
            search_dir=self.folder,
            mlflow_run_id=self.tracker.run_id,
            progress=self.progress(),
            best=best,
            winner=winner,
            recipe=path,
            full_samples=num_ended * total_samples(self._config),
            pictures=pictures,
            version=version,
        )

    def close(self, status: str, *, wait_s: float, files: Sequence[Path] = ()) -> tuple[Path, ...]:
        """Send the rest, the table and the pictures; returns these."""
        self._journal.catch_up(self.ledger)
        title, trials = self._config.name, list(self.ledger.trials.values())
        table = write_table(self.folder / TABLE, trials)
        drawn = (
            drawing.parallel_coordinates(self.folder / PARALLEL, self._space, trials, title=title),
            drawing.history(self.folder / HISTORY, self.ledger, title=title),
        )
        pictures = tuple(picture for picture in drawn if picture is not None)
        self.tracker.finish(status, [table, *pictures, *files], wait_s=wait_s)
        return pictures
