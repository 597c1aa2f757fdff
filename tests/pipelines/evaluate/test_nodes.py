"""A cluster of two nodes, the code sent to it: scores of one process; a node that sees no pairs says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.test_prepare_nodes import _CAN_HIDE, ROOT, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def _evaluate(places: Path, data: str, workspace: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "evaluate",
        places / "a.safetensors",
        places / data,
        *options,
    ]
    return subprocess.run(
        [*map(str, command), "--json"],
        cwd=ROOT,
        env={**os.environ, "NAFNET_WORKSPACE": str(workspace)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_node_has_the_scores_of_one_process(places: Path, tmp_path: Path) -> None:
    with two_nodes() as address:
        done = _evaluate(places, "store", tmp_path, "--address", address)
    assert done.returncode == 0, done.stderr
    alone = _evaluate(places, "store", tmp_path)
    assert json.loads(done.stdout)["images"] == json.loads(alone.stdout)["images"]
    assert json.loads(done.stdout)["num_workers"] == 1, "one for each of the cluster's cores"
    assert "sending" in done.stderr


@pytest.mark.skipif(not _CAN_HIDE, reason="this machine allows no name spaces of one's own")
@pytest.mark.parametrize(
    ("hidden", "what"), [("store", "folder of the store"), ("pairs", "folder of the images")]
)
def test_a_node_with_a_disk_of_its_own(places: Path, tmp_path: Path, hidden: str, what: str) -> None:
    for path in places.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    with two_nodes(tmp_path / hidden) as address:
        done = _evaluate(tmp_path, hidden, tmp_path / "workspace", "--address", address)
    lines = [line for line in done.stderr.splitlines() if line.startswith("nafnet: the nodes")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"do not share the {what}" in lines[0] and "URL" in lines[0]
