"""A client on MLflow's store: which one, whether it answers, and nobody else's data base touched."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nafnet_core import CapabilityError, InputError
from pipelines.urls import holds_credentials, public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE_HEADER = b"SQLite format 3\x00"
_BUSY_TIMEOUT_S = 5.0
# Every MLflow data base has these tables, whatever its version.
_MLFLOW_TABLES = frozenset({"alembic_version", "experiments", "runs"})
# MLflow's own are 120 s and seven retries with back-off, minutes for one call. It reads them in the
# environment at each call, and nowhere else can they be given.
_QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the address whole, password and all
}
_SERVERS = ("http", "databricks")
_DATABASE_SERVERS = ("postgresql", "mysql", "mssql")
_SET_BY_MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_WRAPPING = "'\"()"
_quick_lock = threading.Lock()
_quick_holders = 0
_quick_set: list[str] = []


def tracking_uri(workspace: Workspace, configured: str | None = None) -> str:
    """`configured`, else MLFLOW_TRACKING_URI, else the workspace's SQLite data base."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.database}"


def mlflow_client(
    workspace: Workspace, configured: str | None = None, *, must_answer: bool = True
) -> MlflowClient:
    """A client on the tracking store, which is made and checked first.

    Args:
        workspace: where the SQLite data base is, if no other store is named.
        configured: a store's URI, as recipes name it.
        must_answer: else a server may be away for now.

    Raises:
        InputError: the SQLite file is no MLflow data base, or `configured` holds a password.
        CapabilityError: it is locked by another process, or a server does not answer.
    """
    if configured and holds_credentials(configured):
        raise InputError(
            "a password in tracking.uri would be written into checkpoints and the run's record",
            got=public(configured),
            fix="Set MLFLOW_TRACKING_URI in the environment, or MLFLOW_TRACKING_USERNAME and _PASSWORD",
        )
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Its bars, one for each file, would stand between ours.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = tracking_uri(workspace, configured)
    if uri.startswith("sqlite:///"):
        check_database(Path(uri.removeprefix("sqlite:///")))
    elif uri.startswith(_DATABASE_SERVERS):
        _check_connection(uri)
    import mlflow

    # MLflow's and urllib3's own lines about each call, which say in ten lines what we say in one.
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # This one logs the traceback of what it raises as well, a data base that is locked for a moment.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    if must_answer or not uri.startswith("http"):
        _probe(client, uri)
    return client


@contextmanager
def quick_requests() -> Iterator[None]:
    """Have MLflow give a call up after seconds, where the user's environment says nothing else.

    The environment is the process': it is put back when the last of those inside has left.
    """
    global _quick_holders
    with _quick_lock:
        _quick_holders += 1
        if _quick_holders == 1:
            _quick_set[:] = [name for name in _QUICK if name not in os.environ]
            os.environ.update({name: _QUICK[name] for name in _quick_set})
    try:
        yield
    finally:
        with _quick_lock:
            _quick_holders -= 1
            if not _quick_holders:
                for name in _quick_set:
                    os.environ.pop(name, None)


def reason(error: BaseException, uri: str) -> str:
    """An error of MLflow's in one line, without what the store's address must not show."""
    address = uri.rstrip("/")
    if "Caused by" in str(error):  # urllib3's: what happened stands at its end
        return str(error).strip().splitlines()[-1].rpartition(": ")[2].strip(_WRAPPING)
    lines = str(error).replace(address, public(address)).strip().splitlines() or [type(error).__name__]
    return lines[0][:150]


@contextmanager
def fluent(client: MlflowClient) -> Iterator[None]:
    """Point MLflow's module-level functions at the client's store, inside the `with` block only.

    MLflow also sets them in the environment, where they would outlive this workspace.
    """
    import mlflow

    before = {name: os.environ.get(name) for name in _SET_BY_MLFLOW}
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_registry_uri(client.tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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
        # A server has its own place for files; a data base would take ./mlruns of whoever came first.
        has_server = str(client.tracking_uri).startswith(_SERVERS)
        location = None if has_server else (workspace.artifacts / name).as_uri()
        try:
            # Else MLflow's page opens it among traces and prompts.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(name, artifact_location=location, tags=kind)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _check_connection(uri: str) -> None:
    """Connect once to a data base's server: MLflow would try for two minutes, and then raise anything."""
    import sqlalchemy

    failed = (sqlalchemy.exc.SQLAlchemyError, ImportError)
    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
        with engine.connect():
            pass
    except failed as error:
        is_import = isinstance(error, ImportError)
        raise CapabilityError(
            "no driver for this data base" if is_import else "the data base does not answer",
            file=public(uri),
            got=reason(error, uri),
            fix="Install it, or name another one, as in postgresql+psycopg2://"
            if is_import
            else "Check MLFLOW_TRACKING_URI",
        ) from error


def _probe(client: MlflowClient, uri: str) -> None:
    """One cheap call: makes the data base, and finds out early that a server does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        with quick_requests():
            client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise CapabilityError(
            "the tracking server or its data base does not answer",
            file=public(uri),
            got=reason(error, uri),
            fix="Check MLFLOW_TRACKING_URI",
        ) from error
