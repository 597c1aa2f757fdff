"""A client on MLflow's store: others' data bases left alone, no password shown, no setting left behind."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest

from nafnet_core import CapabilityError, InputError
from pipelines.tracking import check_database, client, flattened, fluent, machine_tags, mlflow_client
from pipelines.tracking.client import quick_requests, reason
from pipelines.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match="belongs to another program"):
        mlflow_client(Workspace(tmp_path))
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("hello")
    with pytest.raises(InputError, match="not an MLflow data base"):
        mlflow_client(Workspace(tmp_path))


def test_a_locked_database_is_told(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_client(workspace)
    monkeypatch.setattr(client, "_BUSY_TIMEOUT_S", 0.1)
    holder = sqlite3.connect(workspace.database)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(CapabilityError, match="busy"):
            check_database(workspace.database)
    finally:
        holder.rollback()
        holder.close()
    check_database(workspace.database)


def test_flattened_keys_are_dotted_and_lists_numbered() -> None:
    content = {"a": {"b": 1, "c": [1, 2]}, "stages": [{"patch_px": 128}, {"patch_px": 256}]}
    assert flattened(content) == {
        "a.b": 1,
        "a.c": [1, 2],
        "stages.0.patch_px": 128,
        "stages.1.patch_px": 256,
    }


def test_a_server_that_is_not_there_is_told_soon_and_without_its_password(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9/")
    begin = time.monotonic()
    with pytest.raises(CapabilityError, match=r"does not answer: 'http://me@127\.0\.0\.1:9/'") as told:
        mlflow_client(workspace)
    assert time.monotonic() - begin < 20
    assert "secret" not in str(told.value) and "Connection refused" in str(told.value)
    # A run that goes on can wait for it.
    mlflow_client(workspace, must_answer=False)
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_a_password_in_the_recipe_is_refused(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="password in tracking.uri") as told:
        mlflow_client(workspace, "postgresql://me:secret@host/mlflow")
    assert "secret" not in str(told.value)


def test_a_library_s_error_shows_no_password() -> None:
    uri = "http://me:secret@host:5000/"
    error = ConnectionError("API request to http://me:secret@host:5000/api/2.0 failed\nmore")
    assert reason(error, uri) == "API request to http://me@host:5000/api/2.0 failed"
    assert reason(TimeoutError(), uri) == "TimeoutError"


def test_short_calls_are_for_those_inside_and_the_users_own_setting_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    with quick_requests():
        with quick_requests():
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"


@pytest.mark.parametrize("own", [None, "sqlite:///elsewhere.db"])
def test_mlflow_is_pointed_at_our_store_no_longer_than_needed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    """MLflow writes both addresses into the environment, which commands of this process would inherit."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if own is not None:
            monkeypatch.setenv(name, own)
    ours = mlflow_client(workspace, f"sqlite:///{workspace.database}")
    with fluent(ours):
        assert {os.environ[name] for name in names} == {ours.tracking_uri}
    assert [os.environ.get(name) for name in names] == [own, own]


def test_the_machine_is_told_in_words_that_say_something() -> None:
    tags = machine_tags()
    assert all(tags.values())
    assert tags["nafnet.processor"] not in ("x86_64", "aarch64")
    assert int(tags["nafnet.cores"]) >= 1 and float(tags["nafnet.ram_gib"]) > 0.1
    assert {"nafnet.torch", "nafnet.ray", "nafnet.mlflow", "nafnet.python", "nafnet.gpus"} <= set(tags)
    assert tags["mlflow.user"] and tags["mlflow.source.name"] == "nafnet train"
    if "mlflow.source.git.commit" in tags:  # not in a wheel
        assert len(tags["mlflow.source.git.commit"]) == 40
        assert tags["mlflow.source.git.dirty"] in ("true", "false")
