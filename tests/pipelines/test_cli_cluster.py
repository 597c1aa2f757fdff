"""`nafnet cluster …`: one line for each thing that a person does wrong, and the right exit code."""

from __future__ import annotations

import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.pipelines.conftest import Run

_ROOT = Path(__file__).resolve().parents[2]

_CONFIG = {
    "image": "registry/nafnet:1",
    "storage": {"url": "s3://bucket/nafnet"},
    "mlflow_uri": "http://m:5000",
}


@pytest.fixture
def run(run: Run) -> Run:
    """Call `nafnet cluster` in this process."""
    return partial(run, "cluster")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(_CONFIG))
    return file


def test_a_cluster_goes_to_stdout_and_nothing_else_does(run: Run, config: Path) -> None:
    code, out, err = run(
        "manifest", "--config", config, "--set", "gpu.max_nodes=64", "--set", "gcs.backend=none"
    )
    assert code == 0 and not err
    manifest = yaml.safe_load(out)
    assert manifest["kind"] == "RayCluster"
    assert manifest["spec"]["workerGroupSpecs"][0]["maxReplicas"] == 64


def test_remarks_go_to_stderr(run: Run) -> None:
    code, out, err = run("manifest", "--set", "mlflow_uri=null")
    assert code == 0 and yaml.safe_load(out)["kind"] == "RayCluster"
    assert (
        "The shipped example" in err and "No mlflow_uri" in err and "GCSFaultToleranceEmbeddedStorage" in err
    )


def test_a_job_runs_on_the_cluster_with_its_state_in_the_bucket(
    run: Run, config: Path, tmp_path: Path
) -> None:
    train = ("train", "--config", "mobile", "--data", "s3://bucket/stores/train", "--name", "mine")
    code, out, err = run(
        "manifest", "--config", config, "--job", "--out", tmp_path / "job.yaml", "--", *train
    )
    assert (code, out) == (0, "") and f"kubectl apply -f {tmp_path / 'job.yaml'}" in err
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert job["spec"]["entrypoint"] == (
        "nafnet train --config mobile --data s3://bucket/stores/train --name mine "
        "--address auto --set checkpoint.storage=s3://bucket/nafnet"
    )


def test_what_a_job_says_itself_is_left_alone(run: Run, config: Path) -> None:
    own = "checkpoint.storage=s3://other/place"
    for command, entrypoint in (
        (("train", "--config", "mobile", "--data", "/d", "--address", "auto", "--set", own), None),
        (("inspect", "s3://bucket/stores/train"), None),
        (("prepare", "a", "--out", "/b"), "nafnet prepare a --out /b --address auto"),
    ):
        code, out, _ = run("manifest", "--config", config, "--job", "--", *command)
        assert code == 0
        assert yaml.safe_load(out)["spec"]["entrypoint"] == (entrypoint or " ".join(["nafnet", *command]))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--job"],
            "--job and a command go together (expected --job -- COMMAND …, or neither, got --job alone)",
        ),
        (["--", "train"], "got the command 'train' alone"),
        (["--job", "--", "trian"], "No such command 'trian'. Did you mean 'train'?"),
        (
            ["--job", "--", "prepare", "s3://b/x", "--out", "b"],
            "what a job reads and writes are places on the cluster: 'b'",
        ),
        (["--job", "--", "train", "--confg", "mobile"], "No such option: --confg"),
        (["--job", "--", "train"], "Missing option '--config'"),
        (["--job", "--", "train", "--config", "recipe.yaml", "--data", "/d"], "a file of this machine"),
        (["--job", "--", "train", "--config", "mobile", "--data", "s3://k:secret@b/x"], "a key in it"),
        (
            ["--job", "--", "train", "--config", "mobile", "--data", "/d", "--address", "ray://h:1"],
            "its own cluster",
        ),
        (["--job", "--", "train", "--config", "mobile"], "no training data"),
        (["--job", "--", "cluster", "up"], "not a command for a cluster to run"),
        (["--set", "gpu.gpuz=1"], "Did you mean 'gpu.gpus'"),
        (["--config", "none.yaml"], "no such file: 'none.yaml'"),
    ],
)
def test_a_slip_is_one_line(run: Run, tmp_path: Path, arguments: list[str], line: str) -> None:
    (tmp_path / "mine.yaml").write_text("model: {preset: mobile}")
    shutil.copy(_ROOT / "configs" / "mobile.yaml", tmp_path / "recipe.yaml")
    code, out, err = run("manifest", *arguments)
    assert code == 2 and not out
    assert line in err.splitlines()[-1] and err.splitlines()[-1].startswith("nafnet: ")


def test_a_place_that_cannot_be_written_is_one_line(run: Run, config: Path) -> None:
    code, _, err = run("manifest", "--config", config, "--out", "/nowhere/x.yaml")
    assert code == 4
    assert err.splitlines()[-1] == (
        "nafnet: cannot write the manifest: '/nowhere/x.yaml' (got No such file or directory)"
    )


_LAUNCH = {
    "cluster_name": "mine",
    "provider": {"type": "aws", "region": "us-west-2"},
    "max_workers": 2,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"node_config": {"InstanceType": "m6i.xlarge"}, "resources": {"CPU": 0}},
        "gpu": {
            "node_config": {"InstanceType": "g5.xlarge", "InstanceMarketOptions": {"MarketType": "spot"}},
            "resources": {"CPU": 4, "GPU": 1},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
}


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launcher's file where the command looks for it, and a launcher that says what it is called with."""
    (tmp_path / "ray_cluster.yaml").write_text(yaml.safe_dump(_LAUNCH))
    for name in ("python", "ssh", "rsync"):
        (tmp_path / name).write_text('#!/bin/sh\necho "called: $*"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "ray_cluster.yaml"


def test_up_tells_what_it_starts_and_what_comes_next(run: Run, launch: Path) -> None:
    code, out, err = run("up", "--yes")
    assert code == 0
    assert "g5.xlarge (spot)" in out and "0 to 2" in out and "-- cluster preflight" in out
    assert "http://localhost:8265" in out and "nafnet cluster down ray_cluster.yaml" in out
    assert "called: -m ray.scripts.scripts up --yes --no-config-cache" in err.replace("\n", " ")


def test_up_and_down_ask_first_and_do_nothing_on_no(
    run: Run, launch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("up")
    assert code == 2 and err.splitlines()[-1] == "nafnet: nobody is there to be asked. Give --yes"
    for verb in ("up", "down"):
        terminal = io.StringIO("n\n")
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", terminal)
        code, _, err = run(verb)
        assert code == 0 and "called" not in err and "[y/N]" in err


def test_json_is_all_of_stdout(run: Run, launch: Path) -> None:
    code, out, _ = run("up", "--yes", "--json")
    told = json.loads(out)
    assert code == 0 and (told["name"], told["provider"]) == ("mine", "aws")
    assert [group["is_head"] for group in told["groups"]] == [True, False]
    code, out, _ = run("down", "--yes", "--json")
    assert code == 0 and json.loads(out) == told


def test_a_launcher_that_fails_is_one_line_and_4(run: Run, launch: Path) -> None:
    said = (
        "Launched a new head node\\n"
        "Traceback (most recent call last):\\n  File x\\nbotocore.exceptions.NoCredentialsError: Unable to …"
    )
    (launch.parent / "python").write_text(f"#!/bin/sh\nprintf '{said}\\n'\nexit 1\n")
    for verb in ("up", "down"):
        code, _, err = run(verb, "--yes")
        assert code == 4 and "Traceback" not in err
        assert err.splitlines()[-1].startswith("nafnet: no AWS credentials were found: 'ray_cluster.yaml'")
        # What costs money is told of.
        assert ("A machine was started" in err.splitlines()[-1]) == (verb == "up")


def test_a_bad_file_is_one_line_and_2(run: Run, launch: Path) -> None:
    launch.write_text(yaml.safe_dump({**_LAUNCH, "max_wrkers": 3}))
    for verb in ("up", "down"):
        code, out, err = run(verb, "--yes")
        assert code == 2 and not out
        assert "('max_wrkers' was unexpected)" in err.splitlines()[-1]
        code, _, err = run(verb, "none.yaml", "--yes")
        assert code == 2 and "no such file: 'none.yaml'" in err.splitlines()[-1]
