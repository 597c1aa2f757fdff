"""Faults of a running `nafnet tune`, real ones: no trial is lost, and none run twice from the start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.pipelines.mlflow_servers import MlflowServer
from tests.pipelines.pairs import make_store, write_pairs
from tests.pipelines.postgres import postgres
from tests.pipelines.tune import searches
from tests.pipelines.tune.searches import Search

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# A trial of some ten seconds, so that a kill finds it in the middle.
_LONG = {"budget": {"samples": 4096}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    source = write_pairs(root / "pairs", [f"s{n // 4}/{n}" for n in range(24)])
    return Path(make_store(source, root / "store").root)


def _search(
    tmp_path: Path, store: Path, *options: object, changes: dict[str, Any] | None = None, **search: Any
) -> Search:
    recipe = searches.recipe(tmp_path / "recipe.yaml", {**_LONG, **(changes or {})}, **search)
    return Search(tmp_path, recipe, store, *options)


def _starts(search: Search) -> dict[int, int]:
    """How often each trial began from the start."""
    return {
        number: sum(row.get("event") == "started" for row in search.journal(number))
        for number in search.ledger().trials
    }


def _assert_curves_are_whole(search: Search, result: dict[str, Any], uri: str | None = None) -> None:
    """MLflow has one run of the search and one a trial, and each validation once."""
    client = mlflow_client(Workspace(search.workspace), uri)
    experiment = client.get_experiment_by_name("nafnet")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "nafnet.trial" in run.data.tags]
    assert len(runs) == len(children) + 1
    assert sorted(int(run.data.tags["nafnet.trial"]) for run in children) == sorted(search.ledger().trials)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {result["mlflow_run_id"]}
    for run in children:
        scores = search.ledger().trials[int(run.data.tags["nafnet.trial"])].scores
        history = client.get_metric_history(run.info.run_id, "val/psnr_db")
        # One that was stopped may have had a further score under way.
        assert [row.step for row in history][: len(scores)] == [score.samples for score in scores]
        assert len({row.step for row in history}) == len(history)


def test_a_driver_that_is_killed_five_times_loses_nothing(store: Path, tmp_path: Path) -> None:
    search = _search(tmp_path, store, trials=4, rungs=3)
    for kills in range(5):
        search.start()
        told = sum(len(trial.scores) for trial in search.ledger().trials.values())

        def has_new_scores(before: int = told) -> bool:
            return sum(len(trial.scores) for trial in search.ledger().trials.values()) > before

        search.wait_for(has_new_scores)
        if kills % 2:  # in the middle of a rung as well
            rows = sum(len(search.journal(number)) for number in search.ledger().trials)
            search.wait_for(
                lambda rows=rows: sum(len(search.journal(n)) for n in search.ledger().trials) > rows + 8
            )
        before = search.ledger()
        search.kill()
        # What was known is known; nothing is taken back.
        after = search.ledger()
        assert all(after.trials[n].scores[: len(t.scores)] == t.scores for n, t in before.trials.items())
    result = search.run()
    assert len(result["trials"]) == 4
    assert {trial["state"] for trial in result["trials"]} <= {"finished", "stopped"}
    assert set(_starts(search).values()) == {1}  # none from the start again
    for trial in search.ledger().trials.values():
        steps = [score.samples for score in trial.scores]
        assert steps == [256, 1024, 4096][: len(steps)]  # each rung once
    _assert_curves_are_whole(search, result)


def test_trials_whose_processes_die_go_on(store: Path, tmp_path: Path) -> None:
    changes = {"budget": {"samples": 16384}}
    search = _search(tmp_path, store, changes=changes, trials=2, scheduler="none")
    search.start()
    search.wait_for(lambda: len(search.journal(1)) > 8)
    for worker in search.processes("RayTrainWorker"):
        worker.send_signal(signal.SIGKILL)
    search.wait_for(lambda: any(row.get("event") == "resumed" for row in search.journal(1)))
    count = sum(row.get("event") == "resumed" for row in search.journal(1))
    for actor in search.processes("TrialActor"):
        actor.send_signal(signal.SIGKILL)
    search.wait_for(lambda: sum(row.get("event") == "resumed" for row in search.journal(1)) > count)
    result = search.finish()
    assert [trial["state"] for trial in result["trials"]] == ["finished", "finished"]
    assert set(_starts(search).values()) == {1}
    assert "trial 1: workers were lost" in search.said()
    _assert_curves_are_whole(search, result)


def test_ctrl_c_saves_and_the_same_command_goes_on(store: Path, tmp_path: Path) -> None:
    search = _search(tmp_path, store, trials=2)
    search.start()
    search.wait_for(lambda: len(search.journal(1)) > 8)
    assert search.process is not None
    search.process.send_signal(signal.SIGINT)
    search.finish(code=130, timeout_s=90)
    assert "The same command goes on from there" in search.said()
    assert search.journal(1)[-1]["event"] == "stopped"
    result = search.run()
    assert len(result["trials"]) == 2
    assert set(_starts(search).values()) == {1}
    _assert_curves_are_whole(search, result)


def test_a_server_on_postgresql_has_each_run_once(store: Path, tmp_path: Path) -> None:
    """Also one that is away for a while, and a driver that is killed meanwhile."""
    with postgres() as database:
        server = MlflowServer(tmp_path / "server", database)
        server.start()
        try:
            changes = {"tracking": {"uri": server.uri, "log_every_s": 0.1}}
            search = _search(tmp_path, store, changes=changes, trials=3, rungs=2)
            search.start()
            search.wait_for(lambda: len(search.journal(1)) > 8)
            server.send(signal.SIGKILL)
            search.wait_for(lambda: search.ledger().trials[1].scores)
            search.kill()
            server.start()
            result = search.run()
            _assert_curves_are_whole(search, result, server.uri)
        finally:
            server.stop()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that does no work, and two nodes with room for a trial each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def test_a_lost_node_costs_no_trial(store: Path, tmp_path: Path, cluster: Any) -> None:
    nodes = list(cluster.worker_nodes)
    search = _search(tmp_path, store, "--address", cluster.address, trials=3, scheduler="none")
    search.start()
    search.wait_for(lambda: all(len(search.journal(number)) > 8 for number in (1, 2)))
    cluster.remove_node(nodes[0], allow_graceful=False)
    cluster.add_node(num_cpus=1)
    result = search.finish()
    assert [trial["state"] for trial in result["trials"]] == ["finished"] * 3
    assert set(_starts(search).values()) == {1}
    _assert_curves_are_whole(search, result)


def test_trials_of_several_workers_never_wait_for_one_another(
    store: Path, tmp_path: Path, cluster: Any
) -> None:
    """Room for three workers: one trial of two at a time, and never half of each of two."""
    cluster.add_node(num_cpus=1)
    changes = {"scaling": {"num_workers": 2, "threads_per_worker": 1}, "budget": {"samples": 512}}
    search = _search(
        tmp_path, store, "--address", cluster.address, changes=changes, trials=3, scheduler="none"
    )
    result = search.run()
    assert [trial["state"] for trial in result["trials"]] == ["finished"] * 3
    times = [
        [row["time"] for row in search.journal(number) if row.get("event") in ("started", "finished")]
        for number in (1, 2, 3)
    ]
    assert times[0][1] < times[1][0] and times[1][1] < times[2][0]
