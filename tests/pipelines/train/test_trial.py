"""The dry run: what it tells, and that it leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nafnet_core import PRESETS, InputError, NAFNet
from nafnet_core.losses import mixed_loss
from pipelines.config import RunConfig, parse_config, with_stores
from pipelines.store import PairStore
from pipelines.train import dry_run
from pipelines.train.step_memory import step_memory
from pipelines.workspace import Workspace


def _config(**changes: Any) -> RunConfig:
    content = {
        "model": {"width": 4, "enc_blk_nums": [1], "middle_blk_num": 1, "dec_blk_nums": [1]},
        "budget": {"samples": 640},
        "stages": [{"share": 0.5, "patch_px": 16, "batch": 16}, {"share": 0.5, "patch_px": 32, "batch": 4}],
        **changes,
    }
    return parse_config(content, file="test")


def test_it_tells_what_the_run_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trial = dry_run(_config(scaling={"num_workers": 2, "micro_batch": 3}), Workspace(tmp_path / "none"))
    first, second = trial.stages
    assert (first.batch, first.micro_batch, first.accumulation, first.num_steps) == (16, 3, 3, 20)
    assert (second.batch, second.micro_batch, second.accumulation, second.num_steps) == (4, 2, 1, 80)
    assert (first.tried_patch_px, first.tried_batch) == (16, 2)
    assert trial.samples == 640 and trial.epochs is None and not trial.has_data
    assert (
        trial.rates is not None and trial.rates[0] == 1e-3 and trial.rates[2] == pytest.approx(5e-4, rel=1e-3)
    )
    assert trial.checkpoint_mib > 0 and second.memory_mib > 0
    assert os.listdir(tmp_path) == []


def test_large_networks_are_tried_on_small_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.trial._MAX_MACS", {"cpu": PRESETS["mobile"].num_macs(40, 40)})
    config = _config(model={"preset": "mobile"}, stages=[{"patch_px": 128}])
    (stage,) = dry_run(config, Workspace(tmp_path)).stages
    assert (stage.patch_px, stage.tried_patch_px) == (128, 40)


@pytest.mark.parametrize(
    ("budget", "schedule", "known"),
    [
        ({"epochs": 3}, {"kind": "step", "step_epochs": 1}, True),
        ({"samples": 640}, {"kind": "step", "step_epochs": 1}, False),
        ({"minutes": 3}, {"kind": "step", "step_epochs": 1}, False),
        ({"minutes": 3}, {"kind": "step", "milestones": [0.4, 0.7]}, True),
        ({"epochs": 3}, {"kind": "step", "step_samples": 100}, False),
    ],
)
def test_rates_are_told_where_they_do_not_need_the_data(
    tmp_path: Path, budget: dict[str, Any], schedule: dict[str, Any], known: bool
) -> None:
    trial = dry_run(_config(budget=budget, schedule=schedule), Workspace(tmp_path))
    assert (trial.rates is not None) == known
    if known:
        assert trial.rates == pytest.approx((1e-3, 1e-3, 5e-4, 2.5e-4, 2.5e-4))


def test_with_data_it_knows_the_epochs_and_checks_the_store(tmp_path: Path, store: PairStore) -> None:
    config = with_stores(_config(budget={"epochs": 2}), [store.root], None)
    trial = dry_run(config, Workspace(tmp_path))
    assert trial.has_data and (trial.samples, trial.epochs) == (90, 2)  # 45 crops
    large = with_stores(_config(stages=[{"patch_px": 64}]), [store.root], None)
    with pytest.raises(InputError, match="patches are larger"):
        dry_run(large, Workspace(tmp_path))


def test_a_diverging_recipe_is_told(tmp_path: Path) -> None:
    config = _config(optim={"lr": 1e30, "residual_scale": 1.0, "clip_norm": None}, precision="bf16")
    with pytest.raises(InputError, match="no finite gradient"):
        dry_run(config, Workspace(tmp_path))


def test_memory_of_a_step_is_what_was_measured() -> None:
    # README: 2.1 GiB and, checkpointed, 1.2 at the peak of a process that takes some 0.3 by itself.
    model = NAFNet(PRESETS["width32"])
    loss = mixed_loss({"psnr": 1.0})
    whole = step_memory(model, loss, use_bf16=False, has_average=False).mib(256, 2)
    assert 1.5 < whole / 1024 < 2.1
    model.checkpoint_activations = True
    assert 0.4 < step_memory(model, loss, use_bf16=False, has_average=False).mib(256, 2) / 1024 < 1.2
    model.checkpoint_activations = False
    assert step_memory(model, loss, use_bf16=True, has_average=False).mib(256, 2) < 0.8 * whole
