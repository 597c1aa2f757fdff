"""Commands sent to a real head through its dashboard, which wants a token."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from nafnet_core import InputError
from pipelines.cli import jobs
from tests.pipelines.buckets import free_port
from tests.pipelines.pairs import make_store, write_pairs
from tests.pipelines.train.commands import RECIPE

_ROOT = Path(__file__).resolve().parents[2]
_TOKEN = "a-token-of-this-test-0123456789abcdef"
_START_S = 60.0


@dataclass
class Head:
    """A head without CPUs for work, and what its users need."""

    address: str
    folder: Path
    environment: dict[str, str]
    client_port: int

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "pipelines", "cluster", *map(str, arguments)]

    def run(self, *arguments: object, code: int = 0, token: str = _TOKEN) -> str:
        """A command of `nafnet cluster`; returns what it printed."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment | ({"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def status(self, job: str) -> dict[str, Any]:
        return json.loads(self.run("status", job, "--json"))[0]

    def wait_for(self, job: str, status: str, words: str) -> None:
        deadline = time.monotonic() + _START_S
        while (found := self.status(job))["status"] != status or words not in (found["line"] or ""):
            assert time.monotonic() < deadline, found
            time.sleep(0.3)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with _head(waits_for_client_server=False) as started:
        yield started


@contextlib.contextmanager
def _head(*, waits_for_client_server: bool) -> Iterator[Head]:
    ports = [free_port() for _ in range(3)]
    folder = Path(tempfile.mkdtemp(prefix="head-"))  # short, for Ray's sockets
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
    command += [f"--temp-dir={folder / 'ray'}", "--object-store-memory=100000000", "--disable-usage-stats"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment | {"RAY_AUTH_TOKEN": _TOKEN},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{ports[1]}"
    environment |= {"PYTHONPATH": str(_ROOT), "RAY_API_SERVER_ADDRESS": address}
    deadline = time.monotonic() + _START_S
    while not all(map(_listens, ports if waits_for_client_server else ports[:2])):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
        time.sleep(0.2)
    try:
        yield Head(address, folder, environment, client_port=ports[2])
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_a_command_runs_on_the_head_and_tells_how_it_ended(head: Head) -> None:
    write_pairs(head.folder / "pairs", ["s/0", "s/1"])
    out = head.folder / "store"
    # `pairs` is there on this machine, so this is meant: the head is on it as well.
    prepare = ("prepare", "pairs", "--out", out, "--crop", 64, "--stride", 32)
    printed = head.run("submit", "--job", "good", "--follow", "--", *prepare)
    assert re.search(r"Job good: \d+ KiB of code and recipes sent", printed)
    assert (out / "manifest.json").exists() and "pairs from 2 images" in printed
    failed = head.run("submit", "--job", "bad", "--follow", "--", "inspect", "/no/such", code=1)
    assert "bad: FAILED" in failed and "no such" in failed
    table = head.run("status")
    assert "good" in table and "SUCCEEDED" in table and "nafnet inspect /no/such" in table
    assert "pairs from 2 images" in head.run("logs", "good")
    assert "has a job of this name" in head.run("submit", "--job", "good", "--", "inspect", "x", code=2)
    assert "not a name for a job" in head.run("submit", "--job", "../x", "--", "inspect", "x", code=2)
    # An address that is given wins over the environment's.
    elsewhere = ("--address", "http://127.0.0.1:1")
    assert "no dashboard answers there: 'http://127.0.0.1:1'" in head.run("status", *elsewhere, code=4)


@pytest.mark.ray
def test_a_job_outlives_its_terminal_and_stops_when_asked(head: Head) -> None:
    make_store(write_pairs(head.folder / "more", ["s/0", "s/1"]), head.folder / "train")
    (head.folder / "mine.yaml").write_text(RECIPE)
    arguments = ("--", "train", "--config", "mine.yaml", "--data", "train", "--name", "run")
    terminal = subprocess.Popen(
        head.command("submit", "--job", "long", "--workspace", head.folder / "there", "--follow", *arguments),
        env=head.environment | {"RAY_AUTH_TOKEN": _TOKEN},
        cwd=head.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + _START_S
    while "long" not in head.run("status"):
        assert time.monotonic() < deadline
    terminal.kill()
    terminal.wait()
    # The head has no CPUs: it waits, and says for what.
    head.wait_for(
        "long", "RUNNING", "waiting for room for 2 × a worker with 0.95 CPUs; there are no nodes for work"
    )
    assert "long: STOPPED" in head.run("stop", "long", "--wait")
    head.wait_for("long", "STOPPED", "stopped, waiting for room in the cluster")
    assert "has ended already" in head.run("stop", "long", code=2)


@pytest.mark.ray
def test_without_the_token_nothing_is_told(head: Head) -> None:
    assert "wants its token" in head.run("status", token="", code=4)
    assert "wants its token" in head.run("status", token="another-token-0123456789abcdef012", code=4)


@pytest.mark.ray
@pytest.mark.slow
def test_a_command_from_outside_brings_its_code_and_needs_the_token() -> None:
    with _head(waits_for_client_server=True) as head:
        address = f"ray://127.0.0.1:{head.client_port}"
        printed = head.run("preflight", "--address", address)
        assert re.search(r"sending \d+ KiB of code", printed)
        assert "warn  nodes: 0 of 1 do work" in printed and "ok    versions of python, ray, torch" in printed
        # Ray only says that it waited for too long, half a minute.
        refused = head.run("preflight", "--address", address, token="", code=4)
        assert "Does it want a token" in refused.splitlines()[-1] and "Traceback" not in refused


@pytest.mark.ray
def test_an_unknown_job_names_those_that_there_are(head: Head) -> None:
    head.run("submit", "--job", "known", "--", "inspect", "/no/such")
    assert re.search(r"no such job.*expected .*known.*got unknown", head.run("logs", "unknown", code=2))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "not a command"),
        (["serve"], "not a command"),
        (["cluster", "up"], "got cluster up"),
        (["train", "--config", "mobille"], "no such recipe: 'mobille'"),
        (["train", "--config", "mobile", "--set", "optim.lrr=1"], "optim.lr"),
        (["train", "--config", "mobile", "--data", "s3://key:secret@bucket/x"], "'s3://bucket/x'"),
        (["prepare", "x", "--out=s3://key:secret@bucket/x"], "password or a key"),
        (["prepare", "s3://bucket/x", "--out", "store"], "are places on the cluster"),
        (["train", "--config", "mobile", "--data", "no-such-store"], "are places on the cluster"),
        (["train", "--config", "mobile"], "no training data"),
        (["train", "--config", "mobile", "--data", "/d", "--address", "ray://h:1"], "its own cluster"),
    ],
)
def test_what_could_not_run_is_not_sent(command: list[str], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        jobs._checked(command)
    assert "secret" not in str(caught.value)


def test_recipes_go_along_and_paths_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE)
    Path("store").mkdir()
    words, files = jobs._checked(["nafnet", "train", "--config", "./mine.yaml", "--data", "store"])
    assert words == ["train", "--config", "mine.yaml", "--data", str(tmp_path / "store")]
    assert files == {"mine.yaml": Path("mine.yaml")}


def test_secrets_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:password@server")
    monkeypatch.setenv("NAFNET_CACHE", "/scratch")
    for name in ("MY_API_KEY", "MLFLOW_TRACKING_URI"):
        with pytest.raises(InputError, match="secrets are not") as caught:
            jobs._public_value(name)
        assert "password@" not in str(caught.value)
    assert jobs._public_value("NAFNET_CACHE") == "/scratch"
    with pytest.raises(InputError, match="not set here"):
        jobs._public_value("NO_SUCH_VARIABLE")


def test_the_line_that_tells_how_far_a_job_is() -> None:
    log = "Running entrypoint\ntrain: 8/100 samples\ntrain: 16/100 samples 2.0/s\nnafnet: a remark\n"
    assert jobs.last_line(log, is_over=False) == "train: 16/100 samples 2.0/s"
    assert jobs.last_line(log, is_over=True) == "nafnet: a remark"
    assert jobs.last_line("Running entrypoint for job x: python", is_over=False) == "starting"
    assert jobs.last_line("", is_over=True) is None


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
