"""Real processes that move the champion at the same time: one wins, the others are told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from pipelines import registry
from pipelines.gate import GateSettings
from pipelines.registry.history import HISTORY
from pipelines.store import PairStore
from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.pipelines.mlflow_servers import MlflowServer
from tests.pipelines.registry.brighteners import write_brightener

_ROOT = Path(__file__).resolve().parents[3]
_NUM = 4
# Says that it is ready, and goes on when all are: to begin with, or once the gate has compared the two.
_RACER = """
import sys
import mlflow, torch
from pipelines.cli import main
from pipelines.registry import promotion

def wait():
    print("ready", flush=True)
    sys.stdin.readline()

def judged(*args, original=promotion._judge, **kwargs):
    found = original(*args, **kwargs)
    wait()
    return found

if sys.argv.pop(1) == "judged":
    promotion._judge = judged
else:
    wait()
main()
"""


def _race(
    workspace: Workspace, commands: list[list[str]], *, once: str = "judged", **environment: str
) -> list[tuple[int, str]]:
    """Run commands that go on at the same moment; exit code and what was said on stderr of each."""
    variables = {**os.environ, "PYTHONPATH": str(_ROOT), "NAFNET_WORKSPACE": str(workspace.root)}
    variables |= {"OMP_NUM_THREADS": "1", **environment}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, once, *command],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n", racer.communicate()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    answers = [racer.communicate(timeout=200) for racer in racers]
    return [(racer.returncode, said) for racer, (_, said) in zip(racers, answers, strict=True)]


def _prepared(workspace: Workspace, store: PairStore, *, has_champion: bool = True) -> list[list[str]]:
    """Version 1, a champion or not, and as many better versions as racers; their commands."""
    for number in range(_NUM + 1):
        path = write_brightener(workspace.root / f"{number}.safetensors", 0.2 + 0.15 * number)
        registry.register(str(path), workspace, on=store.root)
    first = GateSettings(max_latency_ratio=50)
    if has_champion:
        registry.promote(workspace, version=1, on=store.root, settings=first)
    loose = ["--on", str(store.root), "--max-latency-ratio", "50"]
    return [["registry", "promote", str(number + 2), *loose] for number in range(_NUM)]


def _check(workspace: Workspace, answers: list[tuple[int, str]], *, before: int | None = 1) -> None:
    """Of all that the gate let pass against `before`, one has won, and the others were told."""
    assert Counter(code for code, _ in answers) == {0: 1, 4: _NUM - 1}, answers
    moves = registry.history(workspace)
    assert [move.number for move in moves] == list(range(len(moves), 0, -1))
    here = [move for move in moves if move.to != 1]
    assert Counter(move.state for move in here) == {"done": 1, "abandoned": _NUM - 1}
    won = next(move for move in here if move.state == "done")
    assert registry.champion(workspace) == won.to and won.before == before
    assert registry.previous(moves) == before
    for code, said in answers:
        assert "Traceback" not in said, said
        if code == 4:
            told = ("not carried out: the champion changed meanwhile", "another move is under way")
            assert said.count("nafnet: ") == 1 and any(line in said for line in told), said


def test_one_of_several_promotions_at_once_wins(workspace: Workspace, store: PairStore) -> None:
    commands = _prepared(workspace, store)
    _check(workspace, _race(workspace, commands))


@pytest.mark.slow
def test_the_first_promotions_of_all_at_once(workspace: Workspace, store: PairStore) -> None:
    """None of the tables' rows that moves need is there yet."""
    commands = _prepared(workspace, store, has_champion=False)
    _check(workspace, _race(workspace, commands), before=None)


@pytest.mark.slow
@pytest.mark.parametrize("through_server", [False, True])
def test_on_postgresql_too(
    through_server: bool,
    postgres_uri: str,
    store: PairStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    uri = postgres_uri
    if through_server:
        server: MlflowServer = request.getfixturevalue("postgres_server")
        uri = server.uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    workspace = Workspace(tmp_path / "workspace").make()
    answers = _race(workspace, _prepared(workspace, store), MLFLOW_TRACKING_URI=uri)
    _check(workspace, answers)
    history = mlflow_client(workspace).get_experiment_by_name(HISTORY)
    # A server has its own place for files; else they must not lie wherever the command was typed.
    in_workspace = (
        history is not None and history.artifact_location == f"file://{workspace.artifacts}/{HISTORY}"
    )
    assert in_workspace != through_server


@pytest.mark.slow
def test_promotions_rollbacks_and_deletions_mixed_leave_one_champion(
    workspace: Workspace, store: PairStore
) -> None:
    commands = _prepared(workspace, store)[:2]
    commands += [["registry", "rollback"], ["registry", "delete", "5"], ["registry", "history"]]
    for _ in range(3):
        answers = _race(workspace, commands, once="imported")
        assert all(code in (0, 2, 3, 4) and "Traceback" not in said for code, said in answers), answers
        champion = registry.champion(workspace)
        moves = registry.history(workspace)
        assert champion is not None and all(move.state != "open" for move in moves)
        assert [move.number for move in moves] == list(range(len(moves), 0, -1))
        known = [version.version for version in registry.versions(workspace)]
        assert champion in known


def test_one_that_is_at_work_is_waited_for_and_named(
    workspace: Workspace, store: PairStore, tmp_path: Path
) -> None:
    commands = _prepared(workspace, store)
    # Claims and then stands still, as on a machine that hangs.
    slow = (
        "import sys, time\nfrom mlflow import MlflowClient\nfrom pipelines.cli import main\n"
        "def still(*args):\n    print('claimed', flush=True)\n    time.sleep(600)\n"
        "MlflowClient.set_registered_model_alias = still\nmain()"
    )
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "NAFNET_WORKSPACE": str(workspace.root)}
    holder = subprocess.Popen(
        [sys.executable, "-c", slow, *commands[0]], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "claimed\n"
        begin = time.monotonic()
        with pytest.raises(
            registry.OvertakenError, match=f"another move is under way: promote 1 → 2.*{holder.pid}"
        ):
            registry.promote(workspace, version=3, on=store.root, settings=GateSettings(max_latency_ratio=50))
        assert 9 < time.monotonic() - begin < 60 and registry.champion(workspace) == 1
    finally:
        holder.kill()
        holder.communicate()
    # Killed, it is no obstacle any more.
    registry.promote(workspace, version=3, on=store.root, settings=GateSettings(max_latency_ratio=50))
    told = [(move.told(), move.state) for move in registry.history(workspace)]
    assert told[0] == ("promote 1 → 3", "done") and ("promote 1 → 2", "abandoned") in told
