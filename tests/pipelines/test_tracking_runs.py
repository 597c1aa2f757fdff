"""One run on MLflow's SQLite store: nothing lost, nothing twice, over restarts and a server that refuses."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nafnet_core import CapabilityError
from pipelines.tracking import TRACKING, DataSet, Opening, Tracker, make_experiment, mlflow_client
from pipelines.tracking import sender as sender_module
from pipelines.workspace import Workspace

_STORE = DataSet(name="gopro", digest="d" * 64, place="s3://bucket/gopro", context="training")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def client(workspace: Workspace) -> MlflowClient:
    return mlflow_client(workspace)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sender_module, "_EVERY_S", 0.02)
    monkeypatch.setattr(sender_module, "_LONGEST_PAUSE_S", 0.1)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "mlflow"]


def _opening(client: MlflowClient, workspace: Workspace, **changes: object) -> Opening:
    content = {"params": {"a.b": 1}, "tags": {"tag": "x"}, "data_sets": (_STORE,), **changes}
    make = lambda: make_experiment(client, "tracking", workspace)  # noqa: E731
    return Opening(experiment_id=make, name="run", **content)  # type: ignore[arg-type]


def _tracker(client: MlflowClient, workspace: Workspace, run_dir: Path, **changes: object) -> Tracker:
    tracker = Tracker(run_dir, run_dir / "metrics.jsonl")
    tracker.start(client, _opening(client, workspace, **changes))
    return tracker


def _append(run_dir: Path, samples: int, **metrics: float) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1e9 + samples, "samples": samples, "metrics": metrics}) + "\n")


def _picture(run_dir: Path, samples: int, value: int) -> None:
    (run_dir / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(run_dir / "pictures" / f"{samples:010d}.png")


def _steps(client: MlflowClient, tracker: Tracker, name: str) -> list[int]:
    assert tracker.run_id is not None
    return [metric.step for metric in client.get_metric_history(tracker.run_id, name)]


def _wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _events(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def _drawn(run_dir: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _events(run_dir).Scalars("loss")]


def _refuse(*args: object, **kwargs: object) -> None:
    raise MlflowException("connection refused")


def test_a_restart_goes_on_in_the_same_run_and_sends_each_row_once(
    client: MlflowClient, workspace: Workspace, tmp_path: Path
) -> None:
    first = _tracker(client, workspace, tmp_path)
    _append(tmp_path, 8, loss=1.0)
    assert [row.samples for row in first.pump()] == [8]
    # Half a line: its writer was killed or is not done yet.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1000000016, "sam')
    assert first.pump() == []
    first.finish("KILLED", wait_s=20)
    run = client.get_run(first.run_id)
    assert run.info.status == "KILLED" and first.unsent() is None
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('ples": 16, "metrics": {"loss": 0.5}}\n')

    # Another machine goes on, with other settings where these are free: parameters stay, tags follow.
    second = _tracker(client, workspace, tmp_path, params={"a.b": 2, "c": 3}, tags={"tag": "y"})
    assert second.run_id == first.run_id
    _wait_for(lambda: client.get_run(first.run_id).info.status == "RUNNING")
    assert [row.samples for row in second.pump()] == [16]
    second.finish("FINISHED", wait_s=20)
    history = client.get_metric_history(second.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(8, 1.0), (16, 0.5)]
    run = client.get_run(second.run_id)
    assert run.data.params == {"a.b": "1", "c": "3"} and run.data.tags["tag"] == "y"
    assert run.info.status == "FINISHED"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("gopro", "d" * 36)
    assert json.loads(data.dataset.profile) == {"digest": "d" * 64}
    assert json.loads(data.dataset.source) == {"uri": "s3://bucket/gopro"}
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]


def test_a_server_that_refuses_loses_nothing_and_is_told_once(
    client: MlflowClient,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = _tracker(client, workspace, tmp_path)
    _append(tmp_path, 1, loss=1.0)
    tracker.pump()
    _wait_for(lambda: _steps(client, tracker, "loss") == [1])
    with monkeypatch.context() as patch:
        patch.setattr(client, "log_batch", _refuse)
        for samples in range(2, 40):
            _append(tmp_path, samples, loss=float(samples))
            assert [row.samples for row in tracker.pump()] == [samples]
            time.sleep(0.01)
    _wait_for(lambda: len(_steps(client, tracker, "loss")) == 39)
    tracker.finish("FINISHED", wait_s=20)
    assert _steps(client, tracker, "loss") == list(range(1, 40))
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert "takes nothing (connection refused)" in told[0] and "is back" in told[1]


def test_what_a_run_could_not_send_at_its_end_is_sent_by_the_next(
    client: MlflowClient,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        for name in ("log_batch", "log_artifact", "set_terminated"):
            patch.setattr(client, name, _refuse)
        tracker = _tracker(client, workspace, tmp_path)
        for samples in (1, 2):
            _append(tmp_path, samples, loss=float(samples))
        _picture(tmp_path, 2, 255)
        begin = time.monotonic()
        tracker.finish("FINISHED", [tmp_path / "config.json"], wait_s=0.5)
        assert time.monotonic() - begin < 5
    left = "its parameters, 2 rows, 1 picture, its end"
    assert caplog.records[-1].message == (
        f"not sent to the tracking server yet: {left}. The same command again sends them"
    )
    _wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "mlflow"])

    again = Tracker(tmp_path, tmp_path / "metrics.jsonl")
    assert again.unsent() == left
    again.start(client, _opening(client, workspace))
    again.finish("FINISHED", [tmp_path / "config.json"], wait_s=20)
    assert again.unsent() is None and again.run_id == tracker.run_id
    assert _steps(client, again, "loss") == [1, 2]
    assert [file.path for file in client.list_artifacts(again.run_id)] == ["config.json", "pictures"]
    assert client.get_run(again.run_id).data.params == {"a.b": "1"}


def test_pictures_are_sent_once_each_as_they_appear(
    client: MlflowClient, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    log_artifact = client.log_artifact

    def note(run_id: str, path: str, artifact_path: str | None = None) -> None:
        log_artifact(run_id, path, artifact_path)
        sent.append(Path(path).name)

    monkeypatch.setattr(client, "log_artifact", note)
    tracker = _tracker(client, workspace, tmp_path)
    _picture(tmp_path, 8, 100)
    _wait_for(lambda: sent == ["0000000008.png"])
    tracker.pump()
    tracker.finish("KILLED", wait_s=20)
    _picture(tmp_path, 8, 100)  # validated again, after a kill
    _picture(tmp_path, 16, 200)
    (tmp_path / "pictures" / "curves.png").touch()
    again = _tracker(client, workspace, tmp_path)
    again.finish("FINISHED", wait_s=20)
    assert sent == ["0000000008.png", "0000000016.png"]
    stored = client.list_artifacts(again.run_id, "pictures")
    assert [Path(file.path).name for file in stored] == sent


def test_tensorboard_gets_the_same_curves_and_the_pictures_once(
    client: MlflowClient, workspace: Workspace, tmp_path: Path
) -> None:
    tracker = _tracker(client, workspace, tmp_path)
    for samples in (4, 8):
        _append(tmp_path, samples, loss=samples / 2)
    _picture(tmp_path, 8, 100)
    tracker.pump()
    # Whole in the file already: a kill now would leave no curve a point short.
    assert _drawn(tmp_path) == [(4, 2.0), (8, 4.0)]
    before = (tmp_path / TRACKING).read_text()
    _append(tmp_path, 12, loss=6.0)
    tracker.finish("KILLED", wait_s=20)
    # A kill just after the event was drawn, before that was noted.
    content = json.loads((tmp_path / TRACKING).read_text())
    (tmp_path / TRACKING).write_text(json.dumps({**content, "drawn": json.loads(before)["drawn"]}))
    time.sleep(1.1)  # files of events are named by the second
    again = _tracker(client, workspace, tmp_path)
    _append(tmp_path, 16, loss=8.0)
    _picture(tmp_path, 16, 200)
    again.finish("FINISHED", wait_s=20)
    assert _drawn(tmp_path) == [(4, 2.0), (8, 4.0), (12, 6.0), (16, 8.0)]
    pictures = _events(tmp_path).Images("val/before_after")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [(8, 6, 4), (16, 6, 4)]


def test_a_run_whose_making_was_not_answered_is_found_again(
    client: MlflowClient, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_run = client.create_run

    def lose_the_answer(*args: object, **kwargs: object) -> None:
        create_run(*args, **kwargs)  # type: ignore[arg-type]
        raise MlflowException("timed out")

    with monkeypatch.context() as patch:
        patch.setattr(client, "create_run", lose_the_answer)
        with pytest.raises(CapabilityError, match="made no run.*timed out"):
            _tracker(client, workspace, tmp_path)
    tracker = _tracker(client, workspace, tmp_path)
    tracker.finish("FINISHED", wait_s=20)
    key = json.loads((tmp_path / TRACKING).read_text())["key"]
    experiment = make_experiment(client, "tracking", workspace)
    assert len(client.search_runs([experiment], f"tags.`nafnet.run_key` = '{key}'")) == 1


@pytest.mark.parametrize("how", ["deleted", "unknown"])
def test_a_run_that_the_server_lost_is_sent_anew(
    client: MlflowClient, workspace: Workspace, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = _tracker(client, workspace, tmp_path)
    _append(tmp_path, 1, loss=1.0)
    first.finish("KILLED", wait_s=20)
    if how == "deleted":
        client.delete_run(first.run_id)
    else:  # another server, or a data base that was made anew
        content = json.loads((tmp_path / TRACKING).read_text())
        (tmp_path / TRACKING).write_text(json.dumps({**content, "run_id": "0" * 32}))
    _append(tmp_path, 2, loss=2.0)
    second = _tracker(client, workspace, tmp_path)
    second.finish("FINISHED", wait_s=20)
    assert second.run_id not in (first.run_id, "0" * 32)
    assert _steps(client, second, "loss") == [1, 2]
    assert "it is sent anew, whole" in caplog.text


def test_a_journal_that_lost_its_end_is_sent_again_from_its_start(
    client: MlflowClient, workspace: Workspace, tmp_path: Path
) -> None:
    first = _tracker(client, workspace, tmp_path)
    for samples in (1, 2, 3):
        _append(tmp_path, samples, loss=float(samples))
    first.finish("KILLED", wait_s=20)
    journal = tmp_path / "metrics.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:1]))
    _append(tmp_path, 4, loss=4.0)
    second = _tracker(client, workspace, tmp_path)
    second.finish("FINISHED", wait_s=20)
    assert _steps(client, second, "loss") == [1, 2, 3, 4]


def test_many_rows_go_in_calls_that_the_server_takes(
    client: MlflowClient, workspace: Workspace, tmp_path: Path
) -> None:
    for samples in range(300):
        _append(tmp_path, samples, **{f"m{number}": 1.0 for number in range(7)})
    # More in one row than one call takes: a thousand ranks.
    _append(tmp_path, 300, **{f"wait/rank{number}": 1.0 for number in range(1100)})
    many = {f"p{number}": "v" * 7000 for number in range(130)}
    tracker = _tracker(client, workspace, tmp_path, params=many)
    tracker.finish("FINISHED", wait_s=60)
    assert tracker.unsent() is None
    assert _steps(client, tracker, "m0") == list(range(300))
    run = client.get_run(tracker.run_id)
    assert len(run.data.metrics) == 7 + 1100 and len(run.data.params) == 130


def test_a_store_of_both_contexts_says_so(client: MlflowClient, workspace: Workspace, tmp_path: Path) -> None:
    validation = DataSet(name=_STORE.name, digest=_STORE.digest, place="/data/gopro", context="validation")
    tracker = _tracker(client, workspace, tmp_path, data_sets=(_STORE, _STORE, validation))
    tracker.finish("FINISHED", wait_s=20)
    (data,) = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert [tag.value for tag in data.tags] == ["training, validation"]
