"""The launcher's files against Ray's own loader, schema and AWS part; and what a person sees of its failures.

AWS is moto's, which knows the real instance types. That a real machine starts cannot be tried here;
`test_up_down.py` has machines that do, by the file for one's own.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import launcher
from cluster.launch_file import check_ready, read
from nafnet_core import CapabilityError, InputError

_ROOT = Path(__file__).resolve().parents[2]
_AWS, _LOCAL = _ROOT / "ray_cluster.yaml", _ROOT / "ray_cluster_local.yaml"
_GIB = 2**30

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _content(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def _commands(file: Path) -> list[str]:
    return [
        command
        for key, commands in _content(file).items()
        if key.endswith("_commands")
        for command in commands
    ]


@pytest.mark.parametrize("file", [_AWS, _LOCAL], ids=lambda file: file.stem)
def test_ray_accepts_the_files(file: Path) -> None:
    launch = read(file)
    assert launch.groups[0].is_head and not launch.groups[0].is_spot
    # Whoever starts machines with made-up values pays for them.
    with pytest.raises(InputError, match=r"still to be filled in.*FILL-IN"):
        check_ready(launch)


@pytest.mark.parametrize("file", [_AWS, _LOCAL], ids=lambda file: file.stem)
def test_each_command_is_whole_after_yaml(file: Path) -> None:
    """A ` #` in an unquoted YAML line cuts it off there; so does a `: `, or worse."""
    for command in _commands(file):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize("file", [_AWS, _LOCAL], ids=lambda file: file.stem)
def test_ray_start_has_the_options(file: Path) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    used = {
        word.partition("=")[0]
        for command in _commands(file)
        if "ray start" in command
        for word in shlex.split(command.partition("ray start")[2])
    }
    assert used and used <= known
    assert {"--head", "--address", "--num-cpus", "--autoscaling-config"} <= used


@pytest.mark.parametrize("file", [_AWS, _LOCAL], ids=lambda file: file.stem)
def test_nodes_install_the_tested_versions(file: Path) -> None:
    (install,) = [command for command in _commands(file) if "pip install" in command]
    assert '-c ~/nafnet-ray/constraints.txt "$HOME/nafnet-ray[cluster]"' in install
    project = (_ROOT / "pyproject.toml").read_text()
    assert re.search(r"^cluster = \[", project, re.MULTILINE)
    # All that the wheel is built of must be there, and a name that is gone would stop `up`.
    sent = {place: name for place, name in _content(file)["file_mounts"].items() if "nafnet-ray" in place}
    assert all(place == f"~/nafnet-ray/{name}" and (_ROOT / name).exists() for place, name in sent.items())
    packages = re.findall(r"^packages = \[(.+)\]", project, re.MULTILINE)[0].replace('"', "").split(", ")
    assert {*packages, "configs", "README.md", "LICENSE", "pyproject.toml"} <= set(sent.values())
    constraints = (_ROOT / "constraints.txt").read_text()
    assert "\nray==" in constraints and "\nboto3==" in constraints


@pytest.mark.parametrize("file", [_AWS, _LOCAL], ids=lambda file: file.stem)
def test_the_head_takes_no_work_and_nobody_comes_in_without_a_token(file: Path) -> None:
    content = _content(file)
    assert "--num-cpus=0" in content["head_start_ray_commands"][-1]
    assert content["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in content["setup_commands"])


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """moto's AWS, with the instance profiles that the file names."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray puts the key that it has made
    with mock_aws():
        iam = boto3.client("iam")
        for name in ("nafnet-head", "nafnet-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2", region_name="us-west-2")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves a file open
def test_ray_makes_machines_of_it(aws: Any) -> None:
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    config = _bootstrap_config(_content(_AWS), no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        tags = {"ray-node-type": "head" if name == "head" else "worker", "ray-user-node-type": name}
        provider.create_node(kind["node_config"], tags, 1)
    made = [machine for group in aws.describe_instances()["Reservations"] for machine in group["Instances"]]
    by_type = {machine["InstanceType"]: machine for machine in made}
    assert [machine.get("InstanceLifecycle") for machine in made].count("spot") == 2
    assert "InstanceLifecycle" not in by_type["m6i.xlarge"]  # the head
    assert all("IamInstanceProfile" in machine for machine in made)
    assert {machine["Placement"]["AvailabilityZone"] for machine in made} == {"us-west-2a"}


def test_resources_are_those_of_the_instance_types(aws: Any) -> None:
    content = _content(_AWS)
    kinds = content["available_node_types"]
    # Those that its comments offer as well.
    offered = re.findall(r"([\w.]+xlarge) with[\s#]+\{CPU: (\d+), GPU: (\d+)\}", _AWS.read_text())
    assert len(offered) == 3
    names = [kind["node_config"]["InstanceType"] for kind in kinds.values()] + [name for name, *_ in offered]
    types = {
        found["InstanceType"]: found
        for found in aws.describe_instance_types(InstanceTypes=names)["InstanceTypes"]
    }
    (worker_store,) = re.findall(r"object-store-memory=(\d+)", content["worker_start_ray_commands"][-1])
    for name, cpus, gpus in offered:
        assert types[name]["VCpuInfo"]["DefaultVCpus"] == int(cpus)
        assert types[name]["GpuInfo"]["Gpus"][0]["Count"] == int(gpus)
    for name, kind in kinds.items():
        machine = types[kind["node_config"]["InstanceType"]]
        if name == "head":
            assert kind["resources"] == {"CPU": 0}
            continue
        assert kind["resources"]["CPU"] == machine["VCpuInfo"]["DefaultVCpus"]
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        assert kind["resources"].get("GPU", 0) == gpus
        # /dev/shm is half of the memory, and NCCL wants some of it.
        assert int(worker_store) < machine["MemoryInfo"]["SizeInMiB"] * 2**20 / 2 - _GIB


def _local(tmp_path: Path, **changes: Any) -> Path:
    """The file for machines of one's own, filled in, in a folder of its own."""
    content = _content(_LOCAL)
    content["provider"].update(head_ip="192.0.2.1", worker_ips=["192.0.2.2", "192.0.2.3"])
    content["auth"]["ssh_private_key"] = str(tmp_path / "key")
    content["file_mounts"] = {"~/.ray/auth_token": str(tmp_path / "auth_token")}
    (tmp_path / "key").touch()
    (tmp_path / "auth_token").touch()
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}))
    return file


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a shell script in the place of a program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def write(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return write


def test_a_local_file_is_told_in_full(tmp_path: Path) -> None:
    head, workers = read(_local(tmp_path)).groups
    assert (head.machine, head.least, head.most) == ("192.0.2.1", 1, 1)
    assert (workers.machine, workers.least, workers.most) == ("192.0.2.2, 192.0.2.3", 2, 2)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [", "not a YAML file"),
        ("cluster_name: x", "not a file of Ray's cluster launcher"),
        ("provider: {}", "(got no 'type')"),
        ("provider: {type: awz}", "Unsupported node provider: awz"),
        ("provider: {type: local}", "(got Please supply a `head_ip`"),
        ("provider: {type: aws, region: x}\nmax_wrkers: 3", "('max_wrkers' was unexpected)"),
        ("provider: {type: aws, region: x}\nhead_node_type: hd", "`head_node_type` must be one of"),
        ("provider: {type: aws, region: x}\navailable_node_types: [1]", "refuses this file"),
        (
            "provider: {type: aws, region: x}\nhead_node_type: a\n"
            "available_node_types: {a: {node_config: {}, resources: {CPU: 1.5}}}",
            "available_node_types.a.resources.CPU: 1.5 is not of type 'integer'",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read(file)
    assert line in str(error.value) and str(file) in str(error.value)


def test_what_is_not_there_is_told_before_anything_starts(tmp_path: Path, stub: Any) -> None:
    stub("ssh", "echo 'ssh: connect to host 192.0.2.1 port 22: Connection refused' >&2; exit 255")
    stub("rsync", "exit 0")
    launch = read(_local(tmp_path))
    with pytest.raises(CapabilityError, match=r"cannot be reached by SSH: 'ubuntu@192.0.2.1'.*refused"):
        check_ready(launch)
    (tmp_path / "auth_token").unlink()
    with pytest.raises(InputError, match="ray get-auth-token --generate"):
        check_ready(launch)
    (tmp_path / "auth_token").touch()
    (tmp_path / "key").unlink()
    with pytest.raises(InputError, match=r"auth\.ssh_private_key"):
        check_ready(launch)


def test_a_cluster_of_nobody_is_refused(tmp_path: Path, stub: Any) -> None:
    for name in ("ssh", "rsync"):
        stub(name, "exit 0")
    launch = read(_local(tmp_path, provider={"type": "local", "head_ip": "192.0.2.1", "worker_ips": []}))
    with pytest.raises(InputError, match="no machines to work"):
        check_ready(launch)


@pytest.mark.parametrize(
    ("printed", "line"),
    [
        (
            "botocore.exceptions.NoCredentialsError: Unable to locate credentials",
            "no AWS credentials were found",
        ),
        ("ImportError: The Ray AWS VM launcher … with `pip install boto3`.", "Ray needs boto3"),
        (
            "botocore.exceptions.ClientError: An error occurred (UnauthorizedOperation) when …",
            "does not allow",
        ),
        ("botocore.exceptions.ClientError: An error occurred (VcpuLimitExceeded) when …", "quota is used up"),
        (
            "botocore.exceptions.EndpointConnectionError: Could not connect to …",
            "cannot be reached from here",
        ),
        (
            "bash: ray: command not found\nNew status: update-failed\n  !!!",
            "got bash: ray: command not found",
        ),
        ("SomethingNewError: of another kind", "got SomethingNewError: of another kind"),
    ],
)
def test_a_failure_of_the_launcher_is_one_line(
    tmp_path: Path, stub: Any, monkeypatch: pytest.MonkeyPatch, printed: str, line: str
) -> None:
    trace = "Traceback (most recent call last):\n  File x, line 1, in y\n" if "Error:" in printed else ""
    (tmp_path / "said").write_text(f"Cluster: x\nShared connection to y closed.\n{trace}{printed}\n")
    monkeypatch.setattr(launcher.sys, "executable", str(stub("python", f"cat {tmp_path}/said; exit 1")))
    monkeypatch.setattr(launcher.tempfile, "tempdir", str(tmp_path))
    told: list[str] = []
    with pytest.raises(CapabilityError) as error:
        launcher.up(read(_local(tmp_path)), on_line=told.append)
    assert line in str(error.value) and "cluster.yaml" in str(error.value)
    # Whoever wants to know more finds all of it; a person sees no traceback on the way.
    (log,) = tmp_path.glob("nafnet-cluster-up-*.log")
    assert str(log) in str(error.value) and log.read_text() == (tmp_path / "said").read_text()
    assert told[0] == "Cluster: x" and not any("Traceback" in one or "Shared" in one for one in told)


def test_nothing_is_left_of_a_launch_that_went_well(
    tmp_path: Path, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.sys, "executable", str(stub("python", 'echo "$PWD $*"')))
    monkeypatch.setattr(launcher.tempfile, "tempdir", str(tmp_path))
    told: list[str] = []
    launcher.down(read(_local(tmp_path)), on_line=told.append)
    assert told == [
        f"{tmp_path} -m ray.scripts.scripts down --yes --log-style pretty --log-color false "
        f"{tmp_path / 'cluster.yaml'}"
    ]
    assert not list(tmp_path.glob("*.log"))
