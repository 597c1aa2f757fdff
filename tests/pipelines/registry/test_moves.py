"""What a process cannot know of others: another machine's claims, a claim that is late or came twice."""

from __future__ import annotations

import json
import sqlite3

import pytest
from mlflow import MlflowClient

from pipelines import registry
from pipelines.gate import GateSettings
from pipelines.models import REGISTERED_NAME
from pipelines.registry import moves
from pipelines.registry.history import MOVES, PREFIX
from pipelines.store import PairStore
from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.pipelines.registry.brighteners import write_brightener

_GATE = GateSettings(max_latency_ratio=50)


class _KilledError(Exception):
    """Ends a move where a process would be killed."""


@pytest.fixture
def two(workspace: Workspace, store: PairStore) -> Workspace:
    """Version 1 the champion, version 2 the better one."""
    for strength in (0.3, 0.8):
        path = write_brightener(workspace.root / f"{strength}.safetensors", strength)
        registry.register(str(path), workspace, on=store.root)
    registry.promote(workspace, version=1, on=store.root, settings=_GATE)
    return workspace


def _promote(workspace: Workspace, store: PairStore) -> registry.Promotion:
    return registry.promote(workspace, version=2, on=store.root, settings=_GATE)


def _states(workspace: Workspace) -> list[str]:
    return [move.state for move in reversed(registry.history(workspace))]


def _claimed_elsewhere(workspace: Workspace, store: PairStore) -> None:
    """An open move that another machine has claimed just now."""
    with pytest.MonkeyPatch.context() as patch:

        def killed(*args: object) -> None:
            raise _KilledError

        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(_KilledError):
            _promote(workspace, store)
    owner = json.dumps({"machine": "elsewhere", "host": "node7", "pid": 1, "started": 0.0})
    mlflow_client(workspace).set_model_version_tag(MOVES, "2", f"{PREFIX}owner", owner)


def test_another_machines_claim_is_waited_for_and_then_given_up(
    two: Workspace, store: PairStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(moves, "_WAIT_S", 1.0)
    caplog.set_level("INFO")
    _claimed_elsewhere(two, store)
    with pytest.raises(registry.OvertakenError, match="under way: promote 1 → 2.*process 1 on node7"):
        _promote(two, store)
    assert _states(two) == ["done", "open", "abandoned"] and registry.champion(two) == 1
    connection = sqlite3.connect(two.database)
    with connection:
        connection.execute(
            "UPDATE model_versions SET creation_time = creation_time - 130000 WHERE version = 2"
        )
    connection.close()
    assert _promote(two, store).version == 2
    assert _states(two) == ["done", "abandoned", "abandoned", "done"]
    assert "move 2" in caplog.text and "had not been carried out" in caplog.text


def test_what_another_machine_has_carried_out_is_done(two: Workspace, store: PairStore) -> None:
    _claimed_elsewhere(two, store)
    mlflow_client(two).set_registered_model_alias(REGISTERED_NAME, "champion", "2")
    assert _states(two) == ["done", "open"]  # it may be at work on closing it
    connection = sqlite3.connect(two.database)
    with connection:
        connection.execute(
            "UPDATE model_versions SET creation_time = creation_time - 130000 WHERE version = 2"
        )
    connection.close()
    assert _states(two) == ["done", "done"]
    assert registry.rollback(two).version == 1


def test_an_error_in_this_process_leaves_no_claim_in_its_way(two: Workspace, store: PairStore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _promote(two, store)
    assert _promote(two, store).version == 2
    assert _states(two) == ["done", "abandoned", "done"]


def test_two_that_find_what_another_hand_did_enter_it_once(
    two: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mlflow_client(two)
    client.set_registered_model_alias(REGISTERED_NAME, "champion", "2")
    original = moves._claim

    def after_another(*args: object) -> object:
        monkeypatch.setattr(moves, "_claim", original)
        registry.history(two)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(moves, "_claim", after_another)
    told = [(move.told(), move.state) for move in registry.history(two)]
    assert told[:2] == [("outside 1 → 2", "abandoned"), ("outside 1 → 2", "done")]


def test_one_that_was_held_up_does_not_move_the_alias(
    two: Workspace, store: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "_FENCE_S", 0.0)
    with pytest.raises(registry.OvertakenError, match="held up"):
        _promote(two, store)
    assert registry.champion(two) == 1 and _states(two) == ["done", "abandoned"]


def test_a_claim_that_was_sent_twice_holds_nobody_up(
    two: Workspace, store: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MlflowClient.create_model_version

    def twice(*args: object, **kwargs: object) -> object:
        original(*args, **kwargs)  # type: ignore[arg-type]
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "create_model_version", twice)
    assert _promote(two, store).number == 3
    assert _states(two) == ["done", "abandoned", "done"] and registry.champion(two) == 2


def test_a_champion_that_changed_while_the_gate_was_at_work(
    two: Workspace, store: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate has compared with version 1; somebody promotes version 3 before the claim."""
    path = write_brightener(two.root / "0.6.safetensors", 0.6)
    registry.register(str(path), two, on=store.root)
    from pipelines.registry import promotion

    original = promotion.latency_ratio

    def meanwhile(*args: object) -> float:
        monkeypatch.setattr(promotion, "latency_ratio", original)
        registry.promote(two, version=3, on=store.root, settings=_GATE)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(promotion, "latency_ratio", meanwhile)
    with pytest.raises(registry.OvertakenError, match="champion changed meanwhile, from 1 to 3"):
        _promote(two, store)
    assert registry.champion(two) == 3
    told = [(move.told(), move.state) for move in registry.history(two)]
    assert told[:2] == [("promote 1 → 2", "abandoned"), ("promote 1 → 3", "done")]
