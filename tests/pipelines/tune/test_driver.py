"""Small searches, whole: what they leave behind, and what is refused before any trial begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nafnet_core import CapabilityError, InputError
from pipelines import console, inspect, train, tune
from pipelines.config import SearchConfig, load_config, with_stores
from pipelines.config.recipe import load_search
from pipelines.files import locked
from pipelines.models import REGISTERED_NAME
from pipelines.store import PairStore
from pipelines.tracking import TRACKING, mlflow_client
from pipelines.tune.ledger import TrialLedger
from pipelines.workspace import Workspace
from tests.pipelines.tune import searches


def _config(
    tmp_path: Path, store: PairStore, changes: dict[str, Any] | None = None, **search: Any
) -> SearchConfig:
    recipe = searches.recipe(tmp_path / "recipe.yaml", changes, **search)
    return load_search(recipe, train=[store.root], val=store.root)


@pytest.mark.ray
def test_a_search_ends_with_a_recipe_a_record_and_a_candidate(
    store: PairStore, tmp_path: Path, ray_session: None
) -> None:
    workspace = Workspace(tmp_path / "workspace")
    config = _config(tmp_path, store, trials=4, register_winner=True, rungs=2)
    seen: list[tune.Progress] = []
    result = tune.run(config, workspace, on_progress=seen.append)

    assert len(result.progress.trials) == 4
    assert {trial.outcome for trial in result.progress.trials} == {"finished", "stopped"}
    assert result.progress.samples < result.full_samples == 4 * 256
    assert seen[-1].num_wanted == 4 and len(seen[-1].trials) == 4
    # Fair: the same samples in the same order for all, and scores at the rungs.
    for trial in result.progress.trials:
        run_dir = workspace.run_dir(f"s-{trial.number:04d}")
        recipe = json.loads((run_dir / "config.json").read_text())
        assert (recipe["seed"], recipe["budget"]["samples"]) == (0, 256)
        assert [score.samples for score in trial.scores] in ([64, 256], [64])
        assert len(trial.scores) == (2 if trial.outcome == "finished" else 1)
    finished = [trial for trial in result.progress.trials if trial.outcome == "finished"]
    assert result.best.psnr_db == max(trial.psnr_db or 0.0 for trial in finished)

    # The recipe is what `nafnet train` takes, and holds the best trial's values.
    best = load_config(result.recipe)
    assert best.optim.lr == result.best.point["optim.lr"]
    assert best.data.train[0].path == str(store.root)
    assert best.scaling == config.scaling and best.validation == config.validation
    train.check(best)

    # One MLflow run of the search, one below it a trial; samples of all trials together on its axis.
    client = mlflow_client(workspace)
    parent = client.get_run(result.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["search.space.optim.lr"] == '{"loguniform": [0.0001, 0.01]}'
    curve = client.get_metric_history(result.mlflow_run_id, "search/best_psnr_db")
    assert max(row.step for row in curve) == result.progress.samples
    names = {file.path for file in client.list_artifacts(result.mlflow_run_id)}
    assert {"trials.csv", "best.yaml", "pictures"} <= names
    assert len(client.list_artifacts(result.mlflow_run_id, "pictures")) == 2
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.mlflow_run_id}'"
    )
    assert len(children) == 4
    status = {int(child.data.tags["nafnet.trial"]): child.info.status for child in children}
    assert all(
        status[trial.number] == {"finished": "FINISHED", "stopped": "KILLED"}[trial.outcome or ""]
        for trial in result.progress.trials
    )
    assert all(len(client.get_metric_history(c.info.run_id, "val/psnr_db")) in (1, 2) for c in children)

    # The winner is the candidate, in the MLflow run of its trial.
    assert result.version is not None and result.version.aliases == ("candidate",)
    assert result.version.psnr_db is not None  # with its report, for the gate
    winner = json.loads((workspace.run_dir(result.winner.run) / TRACKING).read_text())
    version = client.get_model_version(REGISTERED_NAME, str(result.version.version))
    assert version.run_id == winner["run_id"]

    with pytest.raises(InputError, match="finished already"):
        tune.run(config, workspace)
    with (
        locked(result.search_dir / "lock"),
        pytest.raises(InputError, match="another run is at work.*--name"),
    ):
        tune.run(config, workspace)
    looked_at = inspect.run(inspect.InspectConfig(what="s", workspace=workspace), show=console.progress)
    assert (looked_at.kind, looked_at.facts["finished"]) == ("search", True)
    assert looked_at.facts["best_trial"] == result.best.number and len(looked_at.pictures) == 2
    # More trials: the same search goes on.
    more = tune.run(_config(tmp_path, store, trials=5, register_winner=True, rungs=2), workspace)
    assert more.mlflow_run_id == result.mlflow_run_id
    assert [trial.point for trial in more.progress.trials[:4]] == [
        trial.point for trial in result.progress.trials
    ]
    assert len(more.progress.trials) == 5
    with pytest.raises(InputError, match=r"search of this name was started with other values.*optim.betas"):
        tune.run(_config(tmp_path, store, {"optim": {"betas": [0.9, 0.99]}}, trials=5, rungs=2), workspace)


@pytest.mark.slow
@pytest.mark.ray
def test_a_trial_that_diverges_is_recorded_and_replaced(
    store: PairStore, tmp_path: Path, ray_session: None
) -> None:
    """A rate of 1e30 gives no number in a step or two."""
    bad = {"optim.lr": {"choice": [1e-3, 2e-3, 1e30]}, "optim.max_bad_steps": {"choice": [1]}}
    workspace = Workspace(tmp_path / "workspace")
    config = _config(tmp_path, store, space=bad, scheduler="none", searcher="grid", trials=2)
    result = tune.run(config, workspace)
    failed = [trial for trial in result.progress.trials if trial.outcome == "failed"]
    assert failed and all(trial.point["optim.lr"] == 1e30 for trial in failed)
    assert all("diverged" in (trial.error or "") for trial in failed)
    well = [trial for trial in result.progress.trials if trial.outcome == "finished"]
    assert {trial.point["optim.lr"] for trial in well} == {1e-3, 2e-3}
    assert result.version is None

    only_bad = _config(
        tmp_path, store, {"name": "bad"}, space={**bad, "optim.lr": {"choice": [1e30]}}, max_failed=1
    )
    with pytest.raises(
        CapabilityError, match=r"the search gives up.*[23] trials failed, the last: .*diverged"
    ):
        tune.run(only_bad, workspace)
    ledger = TrialLedger(workspace.run_dir("bad") / "trials.jsonl")
    # A third may have been under way, and is left as it is, to be gone on with.
    assert [trial.outcome for trial in ledger.trials.values()][:2] == ["failed", "failed"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_winner_is_trained_at_full_length(store: PairStore, tmp_path: Path, ray_session: None) -> None:
    workspace = Workspace(tmp_path / "workspace")
    config = _config(tmp_path, store, trials=1, retrain={"samples": 320}, searcher="optuna")
    rows = []
    result = tune.run(config, workspace, on_row=rows.append)
    assert result.winner.run == "s-0001-best"
    assert load_config(result.recipe).budget.samples == 320
    assert max(row.samples for row in rows) == 320
    assert result.winner.weights.is_relative_to(workspace.run_dir("s-0001-best"))


@pytest.mark.ray
def test_a_search_without_room_for_a_trial_says_so_at_once(
    store: PairStore, tmp_path: Path, ray_session: None
) -> None:
    config = _config(tmp_path, store, {"scaling": {"num_workers": 4, "cpus_per_worker": 64}})
    with pytest.raises(CapabilityError, match="not enough CPUs"):
        tune.run(config, Workspace(tmp_path / "workspace"))
    assert not TrialLedger(tmp_path / "workspace" / "runs" / "s" / "trials.jsonl").trials


def test_what_cannot_be_compared_is_refused(store: PairStore, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    recipe = searches.recipe(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="compared on a validation store.*--val"):
        tune.run(load_search(recipe, train=[store.root]), workspace)
    with pytest.raises(InputError, match=r"validation.times above 0"):
        tune.run(_config(tmp_path, store, {"validation": {"times": 0}}), workspace)
    with pytest.raises(InputError, match=r"too short for the first rung.*Give a larger budget"):
        tune.run(_config(tmp_path, store, {"budget": {"samples": 64}}), workspace)


def test_a_name_that_another_run_has_is_refused(store: PairStore, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    config = _config(tmp_path, store)
    (workspace.run_dir("s-0001") / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"name of this search's first trial.*--name"):
        tune.run(config, workspace)
    run = workspace.run_dir("s")
    run.mkdir()
    (run / "config.json").write_text(with_stores(config.base, [store.root], None).model_dump_json())
    with pytest.raises(InputError, match="a training run has this name"):
        tune.run(config, workspace)
