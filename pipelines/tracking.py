"""MLflow: one client, on the driver; rank 0's journal in the run's storage is what it sends.

A row counts as sent once the server took it, so a server that is away loses nothing: the next `pump` sends
what is left, in order. A restarted run goes on in the same MLflow run.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nafnet_core import CapabilityError, InputError
from pipelines.files import write_json
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

TRACKING = "tracking.json"
_MAX_PARAM_CHARS = 6000
_SQLITE_HEADER = b"SQLite format 3\x00"
_BUSY_TIMEOUT_S = 5.0
# Every MLflow data base has these tables, whatever its version.
_MLFLOW_TABLES = frozenset({"alembic_version", "experiments", "runs"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the journal."""

    time_s: float
    samples: int
    metrics: Mapping[str, float]
    event: str | None


def tracking_uri(workspace: Workspace, configured: str | None = None) -> str:
    """`configured`, else MLFLOW_TRACKING_URI, else the workspace's SQLite data base."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.database}"


def mlflow_client(workspace: Workspace, configured: str | None = None) -> MlflowClient:
    """A client on the tracking store, which is made and checked first.

    Raises:
        InputError: the SQLite file is no MLflow data base.
        CapabilityError: it is locked by another process, or a server does not answer.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = tracking_uri(workspace, configured)
    if uri.startswith("sqlite:///"):
        check_database(Path(uri.removeprefix("sqlite:///")))
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    _probe(client, uri)
    return client


@contextmanager
def fluent(client: MlflowClient) -> Iterator[None]:
    """Point MLflow's module-level functions at the client's store, inside the `with` block only.

    `set_tracking_uri` also sets MLFLOW_TRACKING_URI, which would outlive this workspace.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_registry_uri(client.tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def check_database(path: Path) -> None:
    """Refuse a SQLite file that is not MLflow's, before MLflow migrates it.

    Raises:
        InputError: another program's data base, or no data base.
        CapabilityError: locked by another process.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        if file.read(len(_SQLITE_HEADER)) != _SQLITE_HEADER:
            raise InputError("not an MLflow data base", file=path, expected="a SQLite file")
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)
        try:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        raise CapabilityError(
            "the MLflow data base is busy",
            file=path,
            got=error,
            fix="Wait for the other process, or use a server with MLFLOW_TRACKING_URI",
        ) from error
    except sqlite3.DatabaseError as error:
        raise InputError("damaged data base", file=path, got=error) from error
    if not _MLFLOW_TABLES <= tables:
        raise InputError(
            "this data base belongs to another program",
            file=path,
            expected="MLflow's tables",
            got=", ".join(sorted(tables)[:3]) or "none",
            fix="Choose another --workspace",
        )


def make_experiment(client: MlflowClient, name: str, workspace: Workspace) -> str:
    """ID of the experiment, made where it is not there yet; two drivers may race for it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # A server has its own place for files; SQLite would take ./mlruns of whoever came first.
        is_local = str(client.tracking_uri).startswith("sqlite:")
        location = (workspace.artifacts / name).as_uri() if is_local else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


class Tracker:
    """Sends one run's journal to MLflow and to TensorBoard event files."""

    def __init__(self, client: MlflowClient, run_dir: Path, journal: Path) -> None:
        from tensorboardX import SummaryWriter

        self._client, self._run_dir, self._journal = client, run_dir, journal
        state = _read_json(run_dir / TRACKING)
        self.run_id: str | None = state.get("run_id")
        self._sent, self._drawn = int(state.get("sent", 0)), int(state.get("drawn", 0))
        self._events = SummaryWriter(str(run_dir / "tensorboard"))

    def start(self, experiment_id: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Begin the MLflow run, or go on with the one of an earlier attempt; returns its ID."""
        if self.run_id is None:
            self.run_id = self._client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id
            self._save()
            for key, value in flattened(params).items():
                self._client.log_param(self.run_id, key, str(value)[:_MAX_PARAM_CHARS])
        else:
            self._client.update_run(self.run_id, status="RUNNING")
        return self.run_id

    def pump(self) -> list[Row]:
        """Draw and send what is new in the journal; returns the rows not seen by `pump` before."""
        if not self._journal.exists():
            return []
        rows, end = _read_from(self._journal, self._drawn)
        for row in rows:
            for name, value in row.metrics.items():
                self._events.add_scalar(name, value, row.samples, walltime=row.time_s)
        self._events.flush()
        self._drawn = end
        self._send()
        self._save()
        return rows

    def finish(self, status: str, files: Sequence[Path] = ()) -> None:
        """Send the rest and the given files, and close the run with `FINISHED`, `FAILED` or `KILLED`."""
        self.pump()
        assert self.run_id is not None
        for file in files:
            folder = "pictures" if file.suffix == ".png" else None
            self._client.log_artifact(self.run_id, str(file), artifact_path=folder)
        self._client.set_terminated(self.run_id, status=status)
        self._events.close()

    def read_all(self) -> list[Row]:
        """Every row of the journal, those of earlier attempts included."""
        return read_rows(self._journal)

    def _send(self) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        rows, end = _read_from(self._journal, self._sent)
        metrics = [
            Metric(name, value, int(row.time_s * 1000), row.samples)
            for row in rows
            for name, value in row.metrics.items()
        ]
        try:
            for start in range(0, len(metrics), 1000):  # the server's limit for one call
                self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
            self._sent = end
        except (MlflowException, OSError) as error:
            log.warning("the tracking server did not take the metrics, trying again later: %s", error)

    def _save(self) -> None:
        state = {"run_id": self.run_id, "sent": self._sent, "drawn": self._drawn}
        write_json(self._run_dir / TRACKING, state)


def read_rows(journal: Path) -> list[Row]:
    """Every whole row of a journal; none where there is no journal yet."""
    return _read_from(journal, 0)[0] if journal.exists() else []


def flattened(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys: `{"a": {"b": 1}}` → `{"a.b": 1}`; lists are numbered."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from; None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _read_from(journal: Path, offset: int) -> tuple[list[Row], int]:
    """Whole lines from `offset` on, and where they end."""
    with journal.open("rb") as file:
        file.seek(offset)
        content = file.read()
    end = content.rfind(b"\n") + 1
    lines = [json.loads(line) for line in content[:end].splitlines()]
    rows = [
        Row(time_s=line["time"], samples=line["samples"], metrics=line["metrics"], event=line.get("event"))
        for line in lines
    ]
    return rows, offset + end


def _probe(client: MlflowClient, uri: str) -> None:
    """One cheap call: makes the data base, and finds out early that a server does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise CapabilityError(
            "the tracking server or its data base does not answer",
            file=uri,
            got=str(error).splitlines()[0][:150],
            fix="Check MLFLOW_TRACKING_URI",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
