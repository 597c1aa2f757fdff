"""MLflow on a real SQLite data base: nothing lost, nothing twice, nobody else's data base touched."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from nafnet_core import CapabilityError, InputError
from pipelines import tracking
from pipelines.tracking import Tracker, check_database, flattened, make_experiment, mlflow_client
from pipelines.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


def _append(journal: Path, samples: int, **metrics: float) -> None:
    with journal.open("a") as file:
        file.write(json.dumps({"time": 1e9 + samples, "samples": samples, "metrics": metrics}) + "\n")


def test_a_restart_goes_on_in_the_same_run_and_sends_each_row_once(
    workspace: Workspace, tmp_path: Path
) -> None:
    client = mlflow_client(workspace)
    experiment = make_experiment(client, "tracking", workspace)
    journal = tmp_path / "metrics.jsonl"
    first = Tracker(client, tmp_path, journal)
    run_id = first.start(experiment, "run", {"a": {"b": 1}}, {"tag": "x"})
    _append(journal, 8, loss=1.0)
    assert [row.samples for row in first.pump()] == [8]
    # Half a line: its writer was killed or is not done yet.
    with journal.open("a") as file:
        file.write('{"time": 1000000016, "sam')
    assert first.pump() == []
    with journal.open("a") as file:
        file.write('ples": 16, "metrics": {"loss": 0.5}}\n')

    second = Tracker(client, tmp_path, journal)
    assert second.start(experiment, "run", {}, {}) == run_id
    assert [row.samples for row in second.pump()] == [16]
    second.finish("FINISHED")
    history = client.get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(8, 1.0), (16, 0.5)]
    run = client.get_run(run_id)
    assert run.data.params == {"a.b": "1"} and run.info.status == "FINISHED"


def test_a_server_that_is_away_loses_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mlflow_client(workspace)
    journal = tmp_path / "metrics.jsonl"
    tracker = Tracker(client, tmp_path, journal)
    run_id = tracker.start(make_experiment(client, "tracking", workspace), "away", {}, {})

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(client, "log_batch", refuse)
        for samples in (1, 2):
            _append(journal, samples, loss=float(samples))
            assert [row.samples for row in tracker.pump()] == [samples]
    _append(journal, 3, loss=3.0)
    tracker.finish("FINISHED")
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [1, 2, 3]


def test_tensorboard_gets_the_same_curve(workspace: Workspace, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    client = mlflow_client(workspace)
    tracker = Tracker(client, tmp_path, tmp_path / "metrics.jsonl")
    tracker.start(make_experiment(client, "tracking", workspace), "events", {}, {})
    for samples in (4, 8):
        _append(tmp_path / "metrics.jsonl", samples, loss=samples / 2)
    tracker.finish("FINISHED")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 2.0), (8, 4.0)]


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
    monkeypatch.setattr(tracking, "_BUSY_TIMEOUT_S", 0.1)
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
