"""Register, promote, refuse, force, roll back, delete, on a real SQLite registry."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from nafnet_core import InputError
from pipelines import evaluate, registry
from pipelines.gate import GateSettings, PromotionRefusedError
from pipelines.models import REGISTERED_NAME
from pipelines.registry.history import HISTORY, MOVES
from pipelines.store import PairStore
from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.pipelines.registry.brighteners import dark_store, write_brightener

_GATE = GateSettings(max_latency_ratio=50)  # time is another test's business


def _register(workspace: Workspace, store: PairStore, *strengths: float) -> None:
    for strength in strengths:
        path = write_brightener(workspace.root / f"{strength}.safetensors", strength)
        registry.register(str(path), workspace, on=store.root)


def _promote(workspace: Workspace, store: PairStore, version: int, **options: object) -> registry.Promotion:
    return registry.promote(workspace, version=version, on=store.root, settings=_GATE, **options)  # type: ignore[arg-type]


def _told(workspace: Workspace) -> list[tuple[str, str]]:
    """Moves and their states, the oldest first."""
    return [(move.told(), move.state) for move in reversed(registry.history(workspace))]


def test_each_move_is_in_the_history_with_reports_and_gate(workspace: Workspace, store: PairStore) -> None:
    _register(workspace, store, 0.3, 0.8)
    first = _promote(workspace, store, 1, reason="the first")
    assert (first.before, first.version, first.number) == (None, 1, 1)
    _promote(workspace, store, 2, reason="brighter")
    with pytest.raises(PromotionRefusedError):
        _promote(workspace, store, 1)
    assert _told(workspace) == [
        ("promote none → 1", "done"),
        ("promote 1 → 2", "done"),
        ("promote 2 → 1", "refused"),
    ]
    refused, second, _ = registry.records(registry.history(workspace), workspace)
    assert second["reason"] == "brighter" and second["user"] and second["host"]
    assert second["gate"]["settings"]["max_latency_ratio"] == 50
    assert {check["name"] for check in second["gate"]["checks"]} == {
        "PSNR, dB", "SSIM", "share worse", "time, ×",
    }  # fmt: skip
    for side, version in (("candidate", 2), ("champion", 1)):
        report = second[side]
        assert report["data_digest"] == store.digest and len(report["images"]) == 4, version
    assert second["gain_db"] == pytest.approx(
        second["candidate"]["psnr_restored_db"] - second["champion"]["psnr_restored_db"], abs=1e-3
    )
    assert refused["state"] == "refused" and "PSNR" in refused["note"]

    # The same in MLflow's own interface: a run a move, and a version a move.
    client = mlflow_client(workspace)
    runs = client.search_runs([client.get_experiment_by_name(HISTORY).experiment_id])  # type: ignore[union-attr]
    told = {run.info.run_name: (run.info.status, run.data.tags["nafnet.number"]) for run in runs}
    assert told == {
        "promote none → 1": ("FINISHED", "1"),
        "promote 1 → 2": ("FINISHED", "2"),
        "promote 2 → 1": ("FAILED", "3"),
    }
    assert client.get_model_version(MOVES, "2").tags["nafnet.reason"] == "brighter"


def test_the_champion_again_changes_nothing(workspace: Workspace, store: PairStore) -> None:
    _register(workspace, store, 0.3)
    _promote(workspace, store, 1)
    again = _promote(workspace, store, 1)
    assert again.version == again.before == 1 and again.number is None
    assert len(registry.history(workspace)) == 1


def test_force_needs_a_reason_and_both_are_recorded(workspace: Workspace, store: PairStore) -> None:
    _register(workspace, store, 0.8, 0.3)
    _promote(workspace, store, 1)
    with pytest.raises(InputError, match="--force needs --reason"):
        _promote(workspace, store, 2, force=True, reason=" ")
    assert registry.champion(workspace) == 1
    moved = _promote(workspace, store, 2, force=True, reason="the old one is withdrawn")
    assert moved.forced and registry.champion(workspace) == 2
    newest = registry.history(workspace)[0]
    assert (newest.action, newest.reason) == ("force", "the old one is withdrawn")
    record = registry.records([newest], workspace)[0]
    assert not all(check["passed"] for check in record["gate"]["checks"])


def test_rollback_goes_back_one_by_one_and_forward_again(workspace: Workspace, store: PairStore) -> None:
    _register(workspace, store, 0.2, 0.5, 0.9)
    with pytest.raises(InputError, match="nothing to roll back to.*no champion"):
        registry.rollback(workspace)
    for version in (1, 2, 3):
        _promote(workspace, store, version)
    for expected in (2, 1):
        assert registry.rollback(workspace, reason="worse on faces").version == expected
        assert registry.champion(workspace) == expected
    with pytest.raises(InputError, match="nothing to roll back to.*champion 1, the first"):
        registry.rollback(workspace)
    _promote(workspace, store, 3)
    assert registry.rollback(workspace).version == 1
    assert registry.previous(registry.history(workspace)) is None


def test_a_rollback_tells_both_reports_and_needs_none(
    workspace: Workspace, store: PairStore, caplog: pytest.LogCaptureFixture
) -> None:
    _register(workspace, store, 0.2, 0.5)
    for version in (1, 2):
        _promote(workspace, store, version)
    registry.rollback(workspace)
    (record,) = registry.records(registry.history(workspace)[:1], workspace)
    scores = [record[side]["psnr_restored_db"] for side in ("candidate", "champion")]
    assert scores == sorted(scores) and scores[0] < scores[1]
    # Somebody has cleared the files away.
    shutil.rmtree(workspace.artifacts / HISTORY)
    _promote(workspace, store, 2)
    assert registry.rollback(workspace).version == 1
    assert "the record of move" in caplog.text
    assert len(registry.records(registry.history(workspace), workspace)) == 5


def test_delete_spares_the_champion_and_where_a_rollback_leads(
    workspace: Workspace, store: PairStore
) -> None:
    _register(workspace, store, 0.2, 0.5, 0.9)
    for version in (1, 2):
        _promote(workspace, store, version)
    for name in ("2", "champion"):
        with pytest.raises(InputError, match="the champion is not deleted"):
            registry.delete(name, workspace, force=True)
    with pytest.raises(InputError, match="a rollback would come to this version"):
        registry.delete("1", workspace)
    client = mlflow_client(workspace)
    source = str(client.get_model_version(REGISTERED_NAME, "3").source)
    assert registry.delete("candidate", workspace, reason="a typo").before == 3
    with pytest.raises(MlflowException, match="not found"):  # and `mlflow gc` takes its files away
        client.get_logged_model(source.removeprefix("models:/"))
    assert [version.version for version in registry.versions(workspace)] == [2, 1]
    with pytest.raises(InputError, match="there is no candidate yet"):
        registry.delete("candidate", workspace)
    registry.delete("1", workspace, force=True)
    with pytest.raises(InputError, match="was deleted.*version 1"):
        registry.rollback(workspace)
    assert _told(workspace)[2:] == [("delete 3", "done"), ("delete 1", "done")]
    assert registry.champion(workspace) == 2
    with pytest.raises(InputError, match="no such version"):
        _promote(workspace, store, 1)


def test_a_report_in_the_version_spares_another_machine_the_evaluation(
    workspace: Workspace, store: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register(workspace, store, 0.2, 0.5)
    _promote(workspace, store, 1)
    shutil.rmtree(workspace.reports)
    monkeypatch.setattr(evaluate, "run", lambda *args, **kwargs: pytest.fail("evaluated again"))
    _promote(workspace, store, 2)
    assert registry.champion(workspace) == 2


def test_other_data_is_evaluated_on_the_spot(workspace: Workspace, store: PairStore, tmp_path: Path) -> None:
    _register(workspace, store, 0.2, 0.5)
    _promote(workspace, store, 1)
    other = dark_store(tmp_path / "other", num_pairs=2)
    _promote(workspace, other, 2)
    record = registry.records(registry.history(workspace)[:1], workspace)[0]
    assert record["candidate"]["data_digest"] == record["champion"]["data_digest"] == other.digest


def test_another_protocol_is_refused_and_named(workspace: Workspace, store: PairStore) -> None:
    _register(workspace, store, 0.2)
    _promote(workspace, store, 1)
    path = write_brightener(workspace.root / "global.safetensors", 0.9, train_patch_px=None)
    registry.register(str(path), workspace, on=store.root)
    with pytest.raises(InputError, match="local_statistics False ≠ True"):
        _promote(workspace, store, 2)
    assert registry.champion(workspace) == 1
    moved = _promote(workspace, store, 2, force=True, reason="its patch is not known")
    assert moved.forced and moved.checks == ()
    record = registry.records(registry.history(workspace)[:1], workspace)[0]
    assert "local_statistics" in record["gate"]["not_compared"]


def test_what_another_hand_did_to_the_alias_is_entered(
    workspace: Workspace, store: PairStore, caplog: pytest.LogCaptureFixture
) -> None:
    _register(workspace, store, 0.2, 0.5)
    _promote(workspace, store, 1)
    client = mlflow_client(workspace)
    client.set_registered_model_alias(REGISTERED_NAME, "champion", "2")
    assert _told(workspace)[1:] == [("outside 1 → 2", "done")]
    assert "moved from 1 to 2 by something else" in caplog.text
    assert len(registry.history(workspace)) == 2  # once
    assert registry.rollback(workspace).version == 1


def test_compare_names_the_images_that_get_worse(
    workspace: Workspace, store: PairStore, tmp_path: Path
) -> None:
    _register(workspace, store, 0.3, 0.8)
    compared = registry.compare("1", "candidate", workspace, on=store.root)
    assert compared.gain_db > 1 and compared.count() == 4 and compared.count(worse_by_db=0) == 0
    back = registry.compare("candidate", "1", workspace)
    assert back.gain_db == -compared.gain_db and back.latency_ratio is None
    assert list(back.gains_db.values()) == sorted(back.gains_db.values())
    # Reports that lie with the versions, of two data sets.
    other = dark_store(tmp_path / "other", num_pairs=2)
    registry.register(str(workspace.root / "0.8.safetensors"), workspace, on=other.root)
    with pytest.raises(InputError, match=f"different data.*{store.digest[:12]}.*{other.digest[:12]}"):
        registry.compare("1", "3", workspace)
