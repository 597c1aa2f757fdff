"""`nafnet cluster up` and `down` for real: machines with addresses and SSH servers of their own, here.

They take the shipped file as it is but for addresses, key and token, and a virtual environment that is there.
What Amazon's file starts on its head is started here too, as are machines that come back to a lost head.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.machines import Machines, machines, why_not

_ROOT = Path(__file__).resolve().parents[2]
_SMALL = " --object-store-memory=80000000"
_DEADLINE_S = 180.0
# Longer than Ray's workers wait for their head unless they are told to.
_HEAD_AWAY_S = 75.0
_LOOK = """
import json, ray, sys
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
alive = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
@ray.remote(num_cpus=1)
def where():
    return ray.util.get_node_ip_address()
work = {}
for address, node in alive.items():
    if ray.state.total_resources_per_node()[node].get("CPU"):
        work[address] = ray.get(where.options(scheduling_strategy=On(node, soft=False)).remote(), timeout=60)
print(json.dumps({"alive": alive, "work": work}))
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Machines]:
    if (reason := why_not()) is not None:
        pytest.skip(f"no such machines to be had here: {reason}")
    with machines(3, tmp_path) as found:
        yield found


def _file(three: Machines, folder: Path, **changes: Any) -> Path:
    content = yaml.safe_load((_ROOT / "ray_cluster_local.yaml").read_text())
    content["cluster_name"] = f"test-{os.getpid()}"
    content["provider"].update(head_ip=three.addresses[0], worker_ips=list(three.addresses[1:]))
    content["auth"] = {"ssh_user": "root", "ssh_private_key": str(three.key)}
    (folder / "auth_token").write_text("a-token-of-this-test-and-of-no-other")
    sent = {place: _ROOT / name for place, name in content["file_mounts"].items() if "nafnet-ray" in place}
    content["file_mounts"] = {place: str(path) for place, path in sent.items()}
    content["file_mounts"]["~/.ray/auth_token"] = "auth_token"  # beside the file
    content["setup_commands"] = [f"ln -sfn {sys.prefix} ~/venv"] + [
        command for command in content["setup_commands"] if "venv/bin/p" not in command
    ]
    content.update(changes)
    content["head_start_ray_commands"][-1] += _SMALL
    content["worker_start_ray_commands"][-1] += _SMALL + " --num-cpus=1"
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def _run(folder: Path, *command: object) -> str:
    """Run a launcher's command on this machine; its notes go into the test's folder."""
    env = {**os.environ, "PYTHONPATH": str(_ROOT), "TMPDIR": str(folder), "RAY_TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _on(
    three: Machines, number: int, command: str, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command on a machine, in the shell that its own set-up has left behind."""
    options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    ssh = ["ssh", "-i", str(three.key), *(part for option in options for part in ("-o", option))]
    command = f"source ~/.bashrc; cd; {command}"
    done = subprocess.run(
        [*ssh, f"root@{three.addresses[number]}", command],
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _whole(three: Machines) -> dict[str, Any]:
    """What the head sees, once all machines have joined."""
    end = time.monotonic() + _DEADLINE_S
    while True:
        looked = _on(three, 0, f"python -c {shlex.quote(_LOOK)}", check=False)
        if looked.returncode == 0:
            seen = json.loads(looked.stdout.splitlines()[-1])
            if set(seen["alive"]) == set(three.addresses):
                return seen
        assert time.monotonic() < end, looked.stdout + looked.stderr
        time.sleep(3)


def _ray_runs(three: Machines, number: int) -> bool:
    return _on(three, number, "pgrep -x 'raylet|gcs_server' || true").stdout.strip() != ""


def test_three_machines_become_a_cluster_and_end(three: Machines, tmp_path: Path) -> None:
    file = _file(three, tmp_path)
    told = _run(tmp_path, "pipelines", "cluster", "up", file, "--yes")
    assert "is up" in told and f"ray dashboard {file}" in told
    seen = _whole(three)
    # Work is done on both workers, and none on the head.
    assert seen["work"] == {address: address for address in three.addresses[1:]}
    for home in three.homes:
        assert (home / "nafnet-ray" / "pyproject.toml").is_file()
        assert not list((home / "nafnet-ray").rglob("__pycache__"))
    # With another token nobody gets in; it is that, and nothing else, that keeps them out.
    status = f"ray status --address {three.addresses[0]}:6379"
    assert "Node status" in _on(three, 1, status).stdout
    assert "Node status" not in _on(three, 1, f"RAY_AUTH_TOKEN=another {status}", check=False).stdout
    told = _run(tmp_path, "pipelines", "cluster", "down", file, "--yes")
    assert "is down" in told
    assert not _ray_runs(three, 0)
    end = time.monotonic() + _DEADLINE_S
    while _ray_runs(three, 1) or _ray_runs(three, 2):
        assert time.monotonic() < end, "workers go on without their head"
        time.sleep(3)


def test_a_head_that_is_lost_comes_back_to_its_workers(three: Machines, tmp_path: Path) -> None:
    """By what ray_cluster.yaml has heads and workers start."""
    aws = yaml.safe_load((_ROOT / "ray_cluster.yaml").read_text())
    sizes = ("--object-store-memory=2000000000", "--object-store-memory=8000000000")
    commands = {
        key: [command.replace(sizes[0], "").replace(sizes[1], "") for command in aws[key]]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    }
    # Of machines of one's own, see ray_cluster_local.yaml.
    start = commands["head_start_ray_commands"][-1]
    commands["head_start_ray_commands"][-1] = start.replace(
        "RAY_gcs", "RAY_enable_autoscaler_v2=0 RAY_gcs", 1
    )
    file = _file(three, tmp_path, **commands)
    _run(tmp_path, "pipelines", "cluster", "up", file, "--yes")
    before = _whole(three)["alive"]
    _on(three, 0, "ray stop --force")
    time.sleep(_HEAD_AWAY_S)
    assert _ray_runs(three, 1) and _ray_runs(three, 2)
    _run(tmp_path, "ray.scripts.scripts", "up", "--yes", "--restart-only", "--no-config-cache", file)
    after = _whole(three)["alive"]
    for address in three.addresses[1:]:
        assert after[address] == before[address], "a worker that began anew has lost its actors and objects"
