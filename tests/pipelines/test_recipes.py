"""The shipped recipes: what they say, where their numbers come from, and that each can be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines.config import load_config, load_search, parse_config
from pipelines.train import dry_run
from pipelines.tune.space import Space
from pipelines.workspace import Workspace

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SEARCHES = [path for path in SHIPPED if path.stem.startswith("search_")]
RECIPES = [path for path in SHIPPED if path not in SEARCHES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_can_be_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Smaller still than for a person: what counts here is that every stage steps.
    monkeypatch.setattr("pipelines.train.trial._MAX_MACS", {"cpu": 0, "cuda": 0})
    config = load_config(path.stem)
    trial = dry_run(config, Workspace(tmp_path / "workspace"))
    assert len(trial.stages) == len(config.stages) and trial.init is None
    assert all(len(stage.losses) == 2 for stage in trial.stages)
    assert trial.rates is not None and max(trial.rates) <= config.optim.lr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_by_name_and_by_file(path: Path) -> None:
    config = load_config(path.stem)
    assert config == load_config(path) == load_config(str(path))
    # Data come from the command line: a recipe for everybody names nobody's folders.
    assert config.data.train == () and config.data.val is None
    # Checkpoints keep the configuration as plain values.
    assert (
        parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), file="again") == config
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_writes_numbers_that_yaml_reads_as_numbers(path: Path) -> None:
    # PyYAML reads 1e-3 as a string; other readers of the file may not be as kind as pydantic.
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for child in value.values() for leaf in leaves(child)]
        return [leaf for child in value for leaf in leaves(child)] if isinstance(value, list) else [value]

    words = {"width32", "width64", "mobile", "compact", "cosine", "step", "fp32", "bf16"}
    assert {leaf for leaf in leaves(yaml.safe_load(path.read_text())) if isinstance(leaf, str)} <= words


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_shipped_search_can_be_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.trial._MAX_MACS", {"cpu": 0, "cuda": 0})
    config = load_search(path.stem)
    assert config == load_search(path)
    assert config.data.train == () and config.data.val is None
    space = Space(config)
    space.check()
    for seed in range(3):
        recipe = space.recipe(space.draw(np.random.default_rng(seed)), name="trial")
        assert len(dry_run(recipe, Workspace(tmp_path / "workspace")).stages) == len(config.stages)
    first = [line for line in path.read_text().splitlines() if line.startswith("#   ")]
    assert first[0].startswith(f"#   nafnet tune --config {path.stem} ")


def test_there_are_recipes() -> None:
    shipped = {"demo", "mobile", "gopro_width32", "gopro_width64", "progressive", "mixed_l1_perceptual"}
    assert shipped | {"guide_l1", "mobile_gpu"} <= {path.stem for path in RECIPES}
    assert [path.stem for path in SEARCHES] == ["search_mobile"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_opens_with_the_command_that_runs_it(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = "nafnet demo" if path.stem == "demo" else f"nafnet train --config {path.stem} "
    assert any(line.startswith(f"#   {command}") for line in comments)


def test_gopro_width32_is_the_paper() -> None:
    # options/train/GoPro/NAFNet-width32.yml of megvii-research/NAFNet, and the clip in its model.
    config = load_config("gopro_width32")
    assert config.model.preset == "width32"
    assert config.budget.samples == 200_000 * 32
    assert (config.budget.epochs, config.budget.minutes) == (None, None)
    (stage,) = config.stages
    assert (stage.share, stage.patch_px, stage.batch) == (1.0, 256, 32)
    optim = config.optim
    assert (optim.lr, optim.betas, optim.weight_decay) == (1e-3, (0.9, 0.9), 1e-3)
    assert (optim.clip_norm, optim.ema_decay, optim.residual_scale) == (0.01, None, 0.0)
    schedule = config.schedule
    assert (schedule.kind, schedule.final_lr, schedule.warmup_share) == ("cosine", 1e-7, 0.0)
    assert config.loss == {"psnr": 1.0}
    assert config.precision == "fp32"
    assert config.data.augment
    assert (config.scaling.num_workers, config.scaling.use_gpu) == (8, True)


def test_gopro_width64_is_the_paper() -> None:
    # options/train/GoPro/NAFNet-width64.yml: as width 32, but for these.
    wide, narrow = load_config("gopro_width64"), load_config("gopro_width32")
    assert wide.model.preset == "width64" and wide.budget.samples == 400_000 * 64
    assert [(stage.patch_px, stage.batch) for stage in wide.stages] == [(256, 64)]
    assert (wide.optim, wide.schedule, wide.loss) == (narrow.optim, narrow.schedule, narrow.loss)


def test_progressive_takes_restormers_steps() -> None:
    config = load_config("progressive")
    steps = (92_000, 64_000, 48_000, 36_000, 36_000, 24_000)
    assert config.budget.samples is not None
    assert [stage.patch_px for stage in config.stages] == [128, 160, 192, 256, 320, 384]
    assert [stage.batch for stage in config.stages] == [64, 40, 32, 16, 8, 8]
    for stage, number in zip(config.stages, steps, strict=True):
        assert round(config.budget.samples * stage.share / stage.batch) == number


def test_guide_accumulates_four_steps_of_four() -> None:
    config = load_config("guide_l1")
    (stage,) = config.stages
    assert (stage.batch, config.scaling.micro_batch, config.scaling.num_workers) == (16, 4, 1)
    assert (config.optim.lr, config.schedule.decay, config.budget.epochs) == (1e-3, 0.5, 3000)
    assert config.schedule.kind == "step" and config.schedule.step_epochs and config.loss == {"l1": 1.0}
