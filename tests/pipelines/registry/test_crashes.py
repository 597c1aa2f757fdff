"""A command killed at any step leaves the old champion or the new one, and the next one says what was.

Real processes, killed by SIGKILL before one of the calls by which a move is written.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import registry
from pipelines.gate import GateSettings
from pipelines.registry.history import HISTORY
from pipelines.store import PairStore
from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.pipelines.registry.brighteners import write_brightener

_ROOT = Path(__file__).resolve().parents[3]
# Runs a command and kills itself before the call of this number: all by which the registry is written.
_KILLED = """
import os, sys
from mlflow import MlflowClient
from pipelines.cli import main

at, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
calls = 0

def counted(name):
    original = getattr(MlflowClient, name)
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls > at:
            print("killed before", name, flush=True)
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)
    setattr(MlflowClient, name, call)

for name in ("create_run", "log_dict", "set_terminated", "create_model_version", "set_tag",
             "set_registered_model_alias", "set_model_version_tag", "delete_model_version",
             "delete_logged_model"):
    counted(name)
main()
"""


def _run(workspace: Workspace, program: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "NAFNET_WORKSPACE": str(workspace.root)}
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def _killed_before(step: int, workspace: Workspace, *arguments: object) -> str | None:
    """Name of the call that was not made any more; None where the command came to its end before."""
    done = _run(workspace, ["-c", _KILLED], step, *arguments)
    if done.returncode == 0:
        return None
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.split()[-1]


def _nafnet(workspace: Workspace, *arguments: object) -> str:
    """What the command said on stderr."""
    done = _run(workspace, ["-m", "pipelines"], *arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def two(workspace: Workspace, store: PairStore) -> Workspace:
    """Version 1 the champion, version 2 the better one."""
    for strength in (0.3, 0.8):
        path = write_brightener(workspace.root / f"{strength}.safetensors", strength)
        registry.register(str(path), workspace, on=store.root)
    settings = GateSettings(max_latency_ratio=50)
    registry.promote(workspace, version=1, on=store.root, settings=settings)
    return workspace


def _promote(store: PairStore) -> tuple[object, ...]:
    return ("registry", "promote", "--on", store.root, "--max-latency-ratio", 50)


@pytest.mark.parametrize(
    ("step", "call", "champion", "said"),
    [
        (4, "set_registered_model_alias", 1, "move 2 (promote 1 → 2, by {user} at "),
        (5, "set_tag", 2, "it had been carried out. The history is complete again"),
    ],
)
def test_the_next_command_completes_the_record_and_says_so(
    two: Workspace, store: PairStore, step: int, call: str, champion: int, said: str
) -> None:
    assert _killed_before(step, two, *_promote(store)) == call
    assert registry.champion(two) == champion
    told = _nafnet(two, "registry", "history")
    assert said.format(user=registry.history(two)[0].user) in told
    assert [move.state for move in registry.history(two)] == [
        "done" if champion == 2 else "abandoned",
        "done",
    ]
    assert "interrupted" not in _nafnet(two, "registry", "list")  # once


@pytest.mark.slow
def test_killed_before_any_step_there_is_one_champion_and_the_history_is_whole(
    two: Workspace, store: PairStore
) -> None:
    calls, moved_at, client = [], None, mlflow_client(two)
    for step in range(40):
        before = len(registry.history(two))
        call = _killed_before(step, two, *_promote(store))
        champion = registry.champion(two)
        assert champion in (1, 2)
        moves = registry.history(two)
        assert all(move.state in ("done", "abandoned") for move in moves)
        # Claimed or not, what was killed is either one more move or none.
        assert [move.number for move in moves] == list(range(len(moves), 0, -1))
        assert len(moves) in (before, before + 1)
        assert registry.previous(moves) == (1 if champion == 2 else None)
        experiment = client.get_experiment_by_name(HISTORY)
        runs = client.search_runs([experiment.experiment_id])  # type: ignore[union-attr]
        assert "RUNNING" not in {run.info.status for run in runs}, call
        if call is None:
            break
        calls.append(call)
        if champion == 2:
            moved_at = moved_at or call
            registry.rollback(two)
    assert calls == [
        "create_run", "log_dict", "set_terminated", "create_model_version", "set_registered_model_alias",
        "set_tag", "set_tag", "set_terminated", "set_model_version_tag",
    ]  # fmt: skip
    assert moved_at == "set_tag"  # the first call after the alias
    assert registry.champion(two) == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", [("rollback",), ("delete", 1)])
def test_rollback_and_delete_too(two: Workspace, store: PairStore, command: tuple[object, ...]) -> None:
    _nafnet(two, *_promote(store))
    for step in range(40):
        arguments = ("registry", *command, *(("--force",) if command[0] == "delete" else ()))
        call = _killed_before(step, two, *arguments)
        newest = registry.history(two)[0]
        if command[0] == "delete":
            is_done = 1 not in [version.version for version in registry.versions(two)]
            assert registry.champion(two) == 2
        else:
            is_done = registry.champion(two) == 1
        assert is_done == (newest.action == command[0] and newest.state == "done"), call
        if is_done:
            break
    assert is_done
