"""Preflight of one node; of several hosts: tests/cluster/test_hosts.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.connect import connect
from cluster.preflight import Check
from pipelines import preflight
from pipelines.config import RunConfig, StoreSection
from pipelines.probe import StageProbe
from pipelines.storage import LocalFolder
from pipelines.workspace import Workspace
from tests.pipelines.pairs import make_store, write_pairs
from tests.pipelines.train import tiny


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    store = make_store(write_pairs(tmp_path / "pairs", ["s/0", "s/1"]), tmp_path / "store")
    return tiny.config(data={"train": [{"path": str(store.root)}]})


@pytest.mark.ray
def test_each_line_is_there_and_nothing_is_left_behind(config: RunConfig, tmp_path: Path) -> None:
    workspace = Workspace.find(tmp_path / "workspace")
    told: list[Check] = []
    with connect():
        report = preflight.run(config, workspace, on_check=told.append)
        missing = config.model_copy(
            update={"data": config.data.model_copy(update={"train": (_elsewhere(config),)})}
        )
        failing = preflight.run(missing, workspace)
    assert told == report
    names = [check.name.split(" ")[0] for check in report]
    expected = [
        "nodes",
        "versions",
        "versions",
        "free",
        "shared",
        "clocks",
        "room",
        "store",
        "storage",
        "tracking",
    ]
    assert names == expected
    assert {check.verdict for check in report if check.name != "free disk"} == {"ok"}
    assert [check.name for check in failing if check.verdict == "fail"] == [
        f"store {_elsewhere(config).path}"
    ]
    assert not list((tmp_path / "workspace" / "runs").iterdir()), "the run's folder is not left behind"


def test_a_probe_tells_what_a_node_cannot(tmp_path: Path) -> None:
    probe = StageProbe()
    assert isinstance(probe.write(LocalFolder(tmp_path), "a", 10), float)
    assert probe.write(LocalFolder(tmp_path / "none"), "a", 10) == "there is no such folder"
    assert isinstance(probe.read_back(LocalFolder(tmp_path), "a", 10), float)
    assert "does not see" in str(probe.read_back(LocalFolder(tmp_path), "b", 10))
    assert "no-such" in str(probe.read_store(str(tmp_path / "no-such"), 0, 10))
    assert probe.reaches("127.0.0.1", 1) == "Connection refused"


def _elsewhere(config: RunConfig) -> StoreSection:
    return config.data.train[0].model_copy(update={"path": "/no-such-store"})
