"""The driver's side of one trial: its run's folder, and its MLflow run below that of the search."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nafnet_core import CapabilityError
from pipelines.config import RunConfig
from pipelines.files import make_folder
from pipelines.tracking import Tracker
from pipelines.train.attempt import begin, clear, storage_of
from pipelines.train.checks import claim
from pipelines.train.files import METRICS, STOP
from pipelines.train.initial import with_initial_weights
from pipelines.train.pump import Pump
from pipelines.train.record import opening
from pipelines.tune.ledger import Trial
from pipelines.tune.record import SOURCE
from pipelines.tune.space import short
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipelines.tracking import Row

log = logging.getLogger(__name__)

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", None: "KILLED"}
# For the last lines of a trial that is over: its workers are still saving.
_PATIENCE_S = 60.0


class TrialRun:
    """A trial's run, as long as its journal has something new."""

    def __init__(self, trial: Trial, config: RunConfig, workspace: Workspace) -> None:
        self.trial, self.config, self._workspace = trial, config, workspace
        self.run_dir = make_folder(workspace.run_dir(config.name))
        self._storage, self.mirror = storage_of(config, self.run_dir)
        self._tracker = Tracker(self.run_dir, self.run_dir / METRICS)
        self._pump: Pump | None = None
        self._has_ended = False  # its workers have said so
        self._over_since: float | None = None
        self.is_closed = False
        """Nothing is sent any more."""

    def prepare(self) -> None:
        """Make the folder ready for workers. Raises `InputError` where another run has it."""
        if self.mirror is not None:
            self.mirror.pull()
        claim(self.config, self.run_dir)
        self.config = with_initial_weights(self.config, self._workspace, self.run_dir)
        clear(self.run_dir, self._storage)
        begin(self.config, self.run_dir, self.mirror)

    def told_to_actor(self, steps: int) -> dict[str, Any]:
        """What its actor needs; see `TrialActor`."""
        return {
            "number": self.trial.number,
            "recipe": self.config.model_dump_json(),
            "run_dir": str(self.run_dir),
            "steps": steps,
            "told": self.trial.samples,
        }

    def stop(self) -> None:
        """Have its workers save and end."""
        (self.run_dir / STOP).touch()
        if self.mirror is not None:
            self.mirror.ask_to_stop()

    def pump(self, client: MlflowClient, parent_run_id: str) -> None:
        """Send what is new, and its end once it is over."""
        if self.is_closed:
            return
        if self._pump is None and not self._start(client, parent_run_id):
            return
        assert self._pump is not None
        self._pump()
        if self.trial.outcome is None:
            return
        self._over_since = self._over_since or time.monotonic()
        waited_s = time.monotonic() - self._over_since
        if self._has_ended or self.trial.outcome == "failed" or waited_s > _PATIENCE_S:
            self.close(wait_s=1.0)

    def close(self, *, wait_s: float) -> None:
        """Tell how it ended, or that it is to be gone on with."""
        if self._pump is not None and not self.is_closed:
            self._pump()
            self._tracker.finish(_STATUS[self.trial.outcome], wait_s=wait_s)
            self.is_closed = True

    def send_rest(self, client: MlflowClient, parent_run_id: str, *, wait_s: float) -> str | None:
        """What the server had not got when it was closed is sent again; returns what is left."""
        if self._tracker.unsent() is None:
            return None
        self._tracker = Tracker(self.run_dir, self.run_dir / METRICS)
        if self._start(client, parent_run_id):
            self._tracker.finish(_STATUS[self.trial.outcome], wait_s=wait_s)
        return self._tracker.unsent()

    def _start(self, client: MlflowClient, parent_run_id: str) -> bool:
        own = opening(self.config, client, self._workspace)
        params = {f"searched.{key}": value for key, value in short(self.trial.point).items()}
        tags = {"mlflow.parentRunId": parent_run_id, "nafnet.trial": str(self.trial.number)}
        try:
            self._tracker.start(
                client,
                dataclasses.replace(
                    own, params={**own.params, **params}, tags={**own.tags, **SOURCE, **tags}
                ),
            )
        except CapabilityError as error:  # a server that is away: at the next turn
            log.info("trial %d has no MLflow run yet: %s", self.trial.number, error)
            return False
        label = f"trial {self.trial.number}: "
        self._pump = Pump(self.run_dir, self.mirror, self._tracker, self._on_row, label=label)
        return True

    def _on_row(self, row: Row) -> None:
        self._has_ended |= row.event in ("finished", "stopped")


def trial_name(search: str, number: int) -> str:
    """Name of a trial's run, which every command takes."""
    return f"{search}-{number:04d}"


def folder_of(workspace: Workspace, search: str, number: int) -> Path:
    """Folder of a trial's run."""
    return workspace.run_dir(trial_name(search, number))
