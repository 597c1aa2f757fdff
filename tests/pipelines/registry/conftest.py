from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.store import PairStore
from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.pipelines.mlflow_servers import MlflowServer
from tests.pipelines.postgres import postgres
from tests.pipelines.registry.brighteners import dark_store


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry of a test is its workspace's, whatever the environment of the tests says."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """Four whole images, too dark. Shared: look, do not touch."""
    return dark_store(tmp_path_factory.mktemp("dark"))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's data base as it makes it, which takes seconds, with nothing in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        workspace = Workspace(tmp_path_factory.mktemp("empty"))
        mlflow_client(workspace)
    return workspace.database


@pytest.fixture
def workspace(empty_database: Path, tmp_path: Path) -> Workspace:
    """A new workspace, whose registry is a SQLite file."""
    workspace = Workspace(tmp_path / "workspace").make()
    shutil.copy(empty_database, workspace.database)
    return workspace


@pytest.fixture
def postgres_uri() -> Iterator[str]:
    """A new PostgreSQL."""
    with postgres() as uri:
        yield uri


@pytest.fixture
def postgres_server(postgres_uri: str, tmp_path: Path) -> Iterator[MlflowServer]:
    """`mlflow server` on PostgreSQL."""
    server = MlflowServer(tmp_path / "server", postgres_uri)
    try:
        server.start()
        yield server
    finally:
        server.stop()
