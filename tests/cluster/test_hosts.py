"""Several hosts with addresses and disks of their own: the whole road, and what goes wrong between them.

What is asserted of the output is what docs/cluster.md says that a user sees.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cluster.host_cluster import head_state, host_cluster, start_node
from tests.cluster.hosts import ROOT, Nafnet, Network
from tests.pipelines.buckets import s3_server
from tests.pipelines.mlflow_servers import MlflowServer
from tests.pipelines.pairs import make_store, write_pairs
from tests.pipelines.train import tiny
from tests.pipelines.train.commands import RECIPE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]

_SECRET, _PASSWORD = "planted-key-8d1f", "planted-password-77ac"
_LONG = 9600  # samples
_SEARCH = RECIPE + "search: {trials: 2, scheduler: none, space: {optim.lr: {loguniform: [1.0e-3, 4.0e-3]}}}\n"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    source = write_pairs(tmp_path / "pairs", [f"s{n // 4}/{n}" for n in range(24)])
    return Path(make_store(source, tmp_path / "store").root)


class _Run:
    """A training run of the tiny network on a cluster, its state on the shared disk."""

    def __init__(self, network: Network, store: Path, **scaling: Any) -> None:
        self._network, self._store = network, network.shared / "store"
        if not self._store.exists():
            shutil.copytree(store, self._store)
        self.workspace = network.shared / "workspace"
        self.folder = self.workspace / "runs" / "run"
        self._scaling = {"num_workers": 4, "timeout_s": 20, **scaling}
        self._log = network.folder / "train.log"

    def start(self, host: str = "head", *options: str) -> Nafnet:
        recipe = self._network.shared / "recipe.yaml"
        recipe.write_text(RECIPE)
        scaling = [f"--set=scaling.{key}={json.dumps(value)}" for key, value in self._scaling.items()]
        return self._network[host].nafnet(
            *(
                "train",
                "--config",
                recipe,
                "--data",
                self._store,
                "--name",
                "run",
                "--address",
                self._network.ray,
            ),
            *scaling,
            *options,
            log=self._log,
            env={"NAFNET_WORKSPACE": str(self.workspace)},
        )

    def rows(self) -> list[dict[str, Any]]:
        journal = self.folder / "metrics.jsonl"
        lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
        return [json.loads(line) for line in lines]

    def seen(self) -> int:
        return max((row["samples"] for row in self.rows()), default=0)

    def resumed_at(self) -> list[int]:
        return [row["samples"] for row in self.rows() if row.get("event") == "resumed"]

    def num_workers(self) -> list[int]:
        """Of each group that began."""
        return [int(row["metrics"]["workers"]) for row in self.rows() if "workers" in row["metrics"]]

    def hosts(self) -> set[str]:
        """On which ranks have begun."""
        text = "".join(log.read_text() for log in (self.folder / "logs").glob("rank*.log"))
        return set(re.findall(r"begins, process \d+ on (\w+)", text))


def test_the_whole_road_as_jobs_from_outside(tmp_path: Path) -> None:
    """prepare, train by 4 workers on 3 nodes, tune, promote; no secret is left anywhere."""
    secrets = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "MLFLOW_TRACKING_PASSWORD": _PASSWORD,
    }
    secrets |= {"MLFLOW_TRACKING_USERNAME": "user"}
    with host_cluster("one", "two", "three", cpus={"one": 2}, **secrets) as network:
        pairs = network.shared / "pairs"
        write_pairs(pairs, [f"s{n // 4}/{n}" for n in range(24)])
        workspace = network.shared / "workspace"
        with s3_server(tmp_path / "s3.log", network.gateway) as s3:
            s3.make_bucket("bucket")
            server = MlflowServer(tmp_path / "mlflow", host=network.gateway)
            server.start()
            try:
                train, runs = s3.url("bucket/train"), s3.url("bucket/runs")
                (tmp_path / "recipe.yaml").write_text(RECIPE)
                (tmp_path / "search.yaml").write_text(_SEARCH)

                def job(*command: object) -> str:
                    return _submit(network, workspace, server.uri, *command)

                job("prepare", pairs, "--out", train, "--crop", 64, "--stride", 32)
                job("prepare", pairs, "--out", network.shared / "val", "--crop", 0)
                common = ("--data", train, "--val", network.shared / "val")
                recipe = ("--config", tmp_path / "recipe.yaml", *common, "--name", "run")
                where = ("--set", f"checkpoint.storage={runs}")
                report = job("cluster", "preflight", "--config", tmp_path / "recipe.yaml", *common, *where)
                assert (
                    "fail" not in report
                    and f"tracking {server.uri}: answers here and on every node" in report
                )
                printed = job("train", *recipe, *where, "--set", "scaling.num_workers=4")
                assert "by 4 workers" in printed
                job("tune", "--config", tmp_path / "search.yaml", *common, "--name", "search", *where)
                promoted = job("registry", "promote", "--on", network.shared / "val", "--min-gain-db", -9)
                assert "champion" in promoted
                _assert_not_found(_SECRET, network.folder, tmp_path / "mlflow")
                _assert_not_found(_PASSWORD, network.folder, tmp_path / "mlflow")
                _assert_none_in_bucket(s3, (_SECRET, _PASSWORD))
            finally:
                server.stop()


def test_ten_kills_of_nodes_and_drivers_lose_and_repeat_nothing(store: Path) -> None:
    """Final weights are those of a run that nothing happens to, and no sample is in the journal twice."""
    dice = random.Random(7)
    with host_cluster("one", "two", "three", cpus={"one": 2}) as network:
        budget = f"--set=budget.samples={_LONG}"
        whole = _Run(network, store, max_failures=20)
        whole.start("head", budget).finish()
        _assert_each_step_once(whole)
        assert whole.hosts() == {"one", "two", "three"}
        expected = tiny.final_weights(whole.folder)
        shutil.rmtree(whole.folder)

        run = _Run(network, store, max_failures=20)
        command = run.start("head", budget)
        command.wait_for(lambda: run.seen() > 100)
        _assert_readers_are_beside_workers(network)
        for _ in range(10):
            target = run.seen() + dice.randrange(100, 300)
            command.wait_for(lambda target=target: run.seen() > target)
            victim = dice.choice(["one", "two", "three", "driver"])
            before = len(run.resumed_at())
            if victim == "driver":
                command.kill()
                command = run.start("head", budget)
            else:
                network[victim].kill()
                start_node(network, victim, {"one": 2})
            command.wait_for(lambda before=before: len(run.resumed_at()) > before)
        command.finish()
        assert len(run.resumed_at()) >= 10
        _assert_each_step_once(run)
        found = tiny.final_weights(run.folder)
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_node_that_is_cut_off_is_given_up_and_one_that_joins_is_used(store: Path) -> None:
    with host_cluster("one", "two") as network:
        run = _Run(network, store, num_workers=[1, 2])
        command = run.start("head", "--set=budget.samples=400000")
        command.wait_for(lambda: run.seen() > 400)
        assert run.num_workers() == [2]
        network["two"].cut()
        command.wait_for(lambda: len(run.resumed_at()) == 1)
        assert run.num_workers() == [2, 1]
        assert re.search(
            r"workers were lost: rank \d: (rank \d does not answer|its process or node died)",
            command.printed(),
        )
        before = run.seen()
        command.wait_for(lambda: run.seen() > before + 400)
        # As a machine that was repaired: what ran there is gone.
        network["two"].kill()
        network["two"].join()
        start_node(network, "two", {})
        command.wait_for(lambda: run.num_workers()[-1] == 2)
        command.interrupt()
        assert "all state is saved" in command.finish(130)


def test_a_head_that_is_lost_stops_nothing_where_the_driver_is_elsewhere(store: Path) -> None:
    """Nodes and the driver wait for it; a command that ran on the head goes on when it is given again."""
    with host_cluster("one", "two", cpus={"one": 2, "two": 2}) as network:
        run = _Run(network, store)
        command = run.start("one", "--set=budget.samples=12000")
        command.wait_for(lambda: run.seen() > 400)
        head = network["head"]
        head.kill()
        time.sleep(5)
        head.start_head(env=head_state(head))
        before = run.seen()
        command.wait_for(lambda: run.seen() > before + 800)
        network["head"].kill()
        command.kill()


def test_storage_behind_a_slow_link(store: Path, tmp_path: Path) -> None:
    """Training goes on while checkpoints crawl, and the report of the preflight names the slowness."""
    credentials = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": _SECRET}
    with host_cluster("one", "two", "storage", cpus={"one": 2, "two": 2}, **credentials) as network:
        storage = network["storage"]
        storage.start(sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "9000")
        while not storage.listens(9000):
            time.sleep(0.2)
        subprocess.run(["curl", "-sX", "PUT", f"http://{storage.address}:9000/bucket"], check=True)
        place = f"s3://bucket/runs?endpoint_override=http://{storage.address}:9000&region=us-east-1"
        for host in ("one", "two", "storage"):
            network[host].limit(20)
        run = _Run(network, store, num_workers=2)
        recipe = network.shared / "recipe.yaml"
        command = run.start("one", f"--set=checkpoint.storage={place}")
        command.finish()
        report = (
            network["one"]
            .nafnet(
                *(
                    "cluster",
                    "preflight",
                    "--address",
                    network.ray,
                    "--config",
                    recipe,
                    f"--set=checkpoint.storage={place}",
                ),
                log=network.folder / "preflight.log",
                env={"NAFNET_WORKSPACE": str(run.workspace)},
            )
            .finish()
        )
        assert re.search(
            r"warn +storage s3://bucket/runs.*\n.*prefer storage in the cluster's own region", report
        )
        assert re.search(r"warn +network between nodes: [\d.]+ MB/s", report)


def _submit(network: Network, workspace: Path, tracking_uri: str, *command: object) -> str:
    """Have the cluster run a command, as from a laptop that has no secret; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "cluster", "submit", "--follow", "--workspace", str(workspace)]
        + ["--address", f"http://{network['head'].address}:8265", "--env", "MLFLOW_TRACKING_URI", "--"]
        + [str(word) for word in command],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": tracking_uri}
        | {"HOME": str(network.folder)},
        cwd=network.folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _assert_each_step_once(run: _Run) -> None:
    rows = [row["samples"] for row in run.rows() if "train/loss" in row["metrics"]]
    assert rows == sorted(set(rows)), "no step is in the journal twice, none out of order"
    assert rows[-1] == _LONG


def _assert_readers_are_beside_workers(network: Network) -> None:
    """Patches go through a node's shared memory; none of them over the network, nor over the head."""
    of_workers = {"head": 0, "one": 2, "two": 1, "three": 1}
    for name, count in of_workers.items():
        programs = network[name].programs()
        assert sum("Feeder" in program for program in programs) == count, name
        # They end when all is read, which of so small a store is soon.
        assert sum("MapWorker" in program for program in programs) <= count, name


def _assert_not_found(secret: str, *folders: Path) -> None:
    found = subprocess.run(["grep", "-rlaF", secret, *map(str, folders)], capture_output=True, text=True)
    assert not found.stdout, f"the planted secret is in {found.stdout}"


def _assert_none_in_bucket(s3: Any, secrets: tuple[str, ...]) -> None:
    from pipelines.storage import folder

    place = folder(s3.url("bucket"))
    names = list(s3.objects("bucket"))
    assert any("checkpoint" in name for name in names)
    for name in names:
        content = place.read(name)
        assert not any(secret.encode() in content for secret in secrets), name
