"""A real `mlflow server` that dies, or hangs, while rows keep coming: at the end each is there once."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipelines.tracking import DataSet, Opening, Tracker, make_experiment, mlflow_client
from pipelines.workspace import Workspace
from tests.pipelines.mlflow_servers import MlflowServer

_STORE = DataSet(name="store", digest="d" * 64, place="/data/store", context="training")


class _Run:
    """Rows that come whatever the server does, each with two metrics; some with a picture."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.samples = folder, 0
        self.longest_pump_s = 0.0
        (folder / "pictures").mkdir(parents=True)

    def go_on(self, tracker: Tracker, num_rows: int, every_s: float) -> None:
        for _ in range(num_rows):
            self.samples += 4
            line = {"time": time.time(), "samples": self.samples, "metrics": {}}
            line["metrics"] = {"train/loss": 1 / self.samples, "train/lr": 1e-3}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if self.samples % 80 == 0:
                picture = Image.new("RGB", (8, 8), (self.samples % 256, 0, 0))
                picture.save(self.folder / "pictures" / f"{self.samples:010d}.png")
            begin = time.monotonic()
            tracker.pump()
            self.longest_pump_s = max(self.longest_pump_s, time.monotonic() - begin)
            time.sleep(every_s)

    def tracker(self, server: MlflowServer) -> Tracker:
        workspace = Workspace(self.folder)
        client = mlflow_client(workspace, server.uri, must_answer=False)
        tracker = Tracker(self.folder, self.folder / "metrics.jsonl")
        tracker.start(
            client,
            Opening(
                experiment_id=lambda: make_experiment(client, "nafnet", workspace),
                name="run",
                params={"optim.lr": 1e-3},
                tags={"nafnet.host": "here"},
                data_sets=(_STORE,),
            ),
        )
        return tracker

    def check(self, tracker: Tracker, server: MlflowServer, status: str) -> None:
        client = mlflow_client(Workspace(self.folder), server.uri)
        assert tracker.run_id is not None
        for name in ("train/loss", "train/lr"):
            history = client.get_metric_history(tracker.run_id, name)
            # In the order in which the server keeps them: that is how they came.
            assert [metric.step for metric in history] == list(range(4, self.samples + 1, 4))
            assert [m.timestamp for m in history] == sorted(m.timestamp for m in history)
        pictures = [file.path for file in client.list_artifacts(tracker.run_id, "pictures")]
        assert pictures == [f"pictures/{n:010d}.png" for n in range(80, self.samples + 1, 80)]
        run = client.get_run(tracker.run_id)
        assert run.info.status == status and run.data.params == {"optim.lr": "0.001"}
        assert len(run.inputs.dataset_inputs) == 1
        assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    server = MlflowServer(tmp_path / "server")
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_a_server_that_hangs_holds_nothing_up_and_misses_nothing(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _Run(tmp_path / "run")
    tracker = run.tracker(server)
    run.go_on(tracker, 30, every_s=0.05)
    server.send(signal.SIGSTOP)
    run.go_on(tracker, 60, every_s=0.09)
    assert "the tracking server takes nothing" in caplog.text
    assert run.longest_pump_s < 2.5
    server.send(signal.SIGCONT)
    run.go_on(tracker, 20, every_s=0.02)
    tracker.finish("FINISHED", wait_s=30)
    assert tracker.unsent() is None and caplog.text.count("the tracking server is back") == 1
    run.check(tracker, server, "FINISHED")


@pytest.mark.slow
def test_a_killed_server_and_a_killed_driver_lose_nothing(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _Run(tmp_path / "run")
    first = run.tracker(server)
    run.go_on(first, 50, every_s=0.03)
    server.send(signal.SIGKILL)
    run.go_on(first, 100, every_s=0.04)
    assert caplog.text.count("takes nothing") == 1 and run.longest_pump_s < 2.5
    server.start()
    run.go_on(first, 50, every_s=0.03)
    # In the middle of whatever it does; what the first driver knows of it is lost with it.
    server.send(signal.SIGSTOP)
    run.go_on(first, 20, every_s=0.02)
    server.send(signal.SIGKILL)
    begin = time.monotonic()
    first.finish("KILLED", wait_s=1)
    assert time.monotonic() - begin < 5 and "The same command again sends them" in caplog.text

    # The next driver begins, trains and ends while the server is away all the time.
    second = run.tracker(server)
    run.go_on(second, 40, every_s=0.02)
    second.finish("FINISHED", wait_s=1)
    assert (second.unsent() or "").endswith("its end")
    server.start()
    third = run.tracker(server)
    third.finish("FINISHED", wait_s=60)
    assert third.unsent() is None
    run.check(third, server, "FINISHED")


@pytest.mark.slow
def test_a_server_that_comes_and_goes_gets_each_row_once(server: MlflowServer, tmp_path: Path) -> None:
    run = _Run(tmp_path / "run")
    tracker = run.tracker(server)
    for pause_s in (0.0, 0.1, 0.3, 0.7, 1.1, 1.9, 2.6, 3.1):
        run.go_on(tracker, 10, every_s=0.05)
        server.send(signal.SIGSTOP)
        run.go_on(tracker, 5, every_s=pause_s / 5)
        server.send(signal.SIGCONT)
    tracker.finish("FINISHED", wait_s=60)
    assert tracker.unsent() is None
    run.check(tracker, server, "FINISHED")
