from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from nafnet_core import InputError
from nafnet_core.losses import LOSSES
from pipelines.config import LossName, RunConfig, find_recipe, load_config, parse_config, with_stores

MINIMAL: dict[str, Any] = {"model": {"preset": "mobile"}, "budget": {"samples": 100}}


def parsed(**changes: Any) -> RunConfig:
    return parse_config(MINIMAL | changes, file="recipe.yaml")


def refused(content: dict[str, Any]) -> str:
    """The one line that the user reads."""
    with pytest.raises(InputError) as caught:
        parse_config(content, file="recipe.yaml")
    line = str(caught.value)
    assert "'recipe.yaml'" in line and "\n" not in line
    return line


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {preset: mobile}\n"
        "budget: {minutes: 5}\n"
        "stages: [{share: 0.5, patch_px: 64}, {share: 0.5, patch_px: 128}]\n"
        "data: {train: [{path: one}, {path: two, weight: 0.4}]}\n"
    )
    return path


# Initial weights


def test_initial_weights_of_the_command_line() -> None:
    assert load_config("mobile").model.init is None
    assert load_config("mobile", init="a/model.pth").model.init == str(Path.cwd() / "a/model.pth")
    assert load_config("mobile", init="model.safetensors").model.init == str(Path.cwd() / "model.safetensors")
    for name in ("first-run", "models:/nafnet-deblur@champion"):  # no paths
        assert load_config("mobile", init=name).model.init == name
    with pytest.raises(InputError, match="credentials in a URL"):
        load_config("mobile", init="s3://user:secret@bucket/model.pth")


# Unknown keys


@pytest.mark.parametrize(
    ("content", "key", "nearest"),
    [
        ({"optimm": {}}, "optimm", "optim"),
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate", None),
        ({"optim": {"weight_decy": 1}}, "optim.weight_decy", "weight_decay"),
        ({"scaling": {"workers": 2}}, "scaling.workers", "num_workers"),
        ({"stages": [{"share": 1.0, "patchpx": 64}]}, "stages.0.patchpx", "patch_px"),
        ({"stages": [{"share": 0.5}, {"share": 0.5, "batchsize": 4}]}, "stages.1.batchsize", "batch"),
        ({"data": {"train": [{"path": "a", "wieght": 2}]}}, "data.train.0.wieght", "weight"),
        ({"model": {"presett": "mobile"}}, "model.presett", "preset"),
    ],
)
def test_unknown_key_names_the_nearest(content: dict[str, Any], key: str, nearest: str | None) -> None:
    line = refused(MINIMAL | content)
    assert f"unknown key '{key}'" in line and "Known here: " in line
    whole = ".".join([*key.split(".")[:-1], nearest or ""])
    assert nearest is None or f"Did you mean '{whole}'?" in line


# Values that cannot be


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"optim": {"lr": 0}}, "optim.lr"),
        ({"optim": {"lr": -1e-3}}, "optim.lr"),
        ({"optim": {"lr": "fast"}}, "optim.lr"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"optim": {"lr": float("inf")}}, "optim.lr"),
        ({"optim": {"betas": [0.9]}}, "optim.betas"),
        ({"optim": {"ema_decay": 1.0}}, "optim.ema_decay"),
        ({"optim": 3}, "optim"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"name": "../escape"}, "name"),
        ({"name": ""}, "name"),
        ({"precision": "fp16"}, "precision"),
        ({"scaling": {"bucket_mib": 0}}, "scaling.bucket_mib"),
        ({"scaling": {"gradient_compression": "fp16"}}, "scaling.gradient_compression"),
        ({"schedule": {"kind": "linear-ish"}}, "schedule.kind"),
        ({"loss": {"l3": 1.0}}, "loss.l3"),
        ({"loss": {}}, "loss"),
        ({"stages": []}, "stages"),
        ({"stages": [{"batch": 0}]}, "stages.0.batch"),
        ({"stages": [{"share": 1.5}]}, "stages.0.share"),
        ({"data": {"train": [{"path": "a", "weight": 0}]}}, "data.train.0.weight"),
        ({"data": {"train": [{"weight": 1}]}}, "data.train.0.path"),
        ({"budget": {"minutes": float("inf")}}, "budget.minutes"),
        ({"budget": {"samples": 0}}, "budget.samples"),
        ({"model": {"preset": "width48"}}, "model.preset"),
        ({"model": {"preset": "mobile", "init": 5}}, "model.init"),
        ({"model": {"preset": "mobile", "init": "a", "init_sha256": "abc"}}, "model.init_sha256"),
        ({"data": {"train": [{"path": 5}]}}, "data.train.0.path"),
        ({"optim": {"betas": [1.5, 0.9]}}, "optim.betas.0"),
        ({"optim": {"betas": [0.9, -0.1]}}, "optim.betas.1"),
        ({"schedule": {"warmup_share": 1}}, "schedule.warmup_share"),
        ({"loss": {"l1": 0}}, "loss.l1"),
        ({"loss": {"l1": -1}}, "loss.l1"),
        ({"scaling": {"use_gpu": "maybe"}}, "scaling.use_gpu"),
    ],
)
def test_bad_value_is_named(content: dict[str, Any], where: str) -> None:
    line = refused(MINIMAL | content)
    assert f"bad value for '{where}" in line and "expected" in line


def test_missing_sections_are_named() -> None:
    assert "'model'" in refused({"budget": {"samples": 1}})
    assert "'budget'" in refused({"model": {"preset": "mobile"}})


@pytest.mark.parametrize(
    ("budget", "got"),
    [
        ({}, "none"),
        ({"samples": 1, "minutes": 1}, "samples.*minutes"),
        ({"samples": 1, "epochs": 1, "minutes": 1}, "samples.*epochs.*minutes"),
    ],
)
def test_budget_is_exactly_one(budget: dict[str, Any], got: str) -> None:
    with pytest.raises(InputError, match=f"exactly one of samples, epochs and minutes; got .*{got}"):
        parsed(budget=budget)


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.4), (0.5, 0.500_01), (0.9, 0.9)])
def test_shares_must_add_up(shares: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=rf"shares must add up to 1, not {sum(shares):g}"):
        parsed(stages=[{"share": share} for share in shares])


def test_shares_of_thirds_add_up() -> None:
    assert (
        len(parsed(stages=[{"share": 0.333_333_3}, {"share": 0.333_333_3}, {"share": 0.333_333_4}]).stages)
        == 3
    )


def test_batch_must_reach_every_worker() -> None:
    scaling = {"num_workers": 4}
    assert parsed(stages=[{"batch": 4}], scaling=scaling).stages[0].batch == 4
    with pytest.raises(InputError, match="a batch of 3 cannot be shared by 4 workers"):
        parsed(stages=[{"share": 0.5, "batch": 4}, {"share": 0.5, "batch": 3}], scaling=scaling)


def test_final_rate_cannot_exceed_the_first() -> None:
    with pytest.raises(InputError, match=r"schedule\.final_lr must not exceed optim\.lr"):
        parsed(optim={"lr": 1e-5}, schedule={"final_lr": 1e-4})


def test_preset_and_numbers_exclude_each_other() -> None:
    numbers = {"width": 8, "enc_blk_nums": [1, 1], "middle_blk_num": 1, "dec_blk_nums": [1, 1]}
    assert parsed(model=numbers).model.enc_blk_nums == (1, 1)
    with pytest.raises(InputError, match="exclude each other"):
        parsed(model=numbers | {"preset": "mobile"})
    with pytest.raises(InputError, match="exclude each other"):
        parsed(model={"preset": "mobile", "middle_blk_num": 0})
    for missing in numbers:
        with pytest.raises(InputError, match="give `preset`, or all of"):
            parsed(model={key: value for key, value in numbers.items() if key != missing})


def test_configuration_is_frozen() -> None:
    config = parsed()
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]


# Overrides


def test_overrides_come_last(recipe: Path) -> None:
    config = load_config(
        recipe,
        ["optim.lr=1e-3", "optim.betas=[0.8, 0.99]", "precision=bf16", "optim.ema_decay=null", "seed=7"],
    )
    assert config.optim.lr == 0.001 and isinstance(config.optim.lr, float)
    assert config.optim.betas == (0.8, 0.99)
    assert (config.precision, config.optim.ema_decay, config.seed) == ("bf16", None, 7)
    assert config.model.preset == "mobile" and config.budget.minutes == 5
    assert load_config(recipe, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("budget", ["samples=1000", "epochs=0.5", "minutes=9"])
def test_budget_by_override_replaces_the_recipes(recipe: Path, budget: str) -> None:
    name, _, value = budget.partition("=")
    config = load_config(recipe, [f"budget.{budget}"])
    assert config.budget.model_dump(exclude_none=True) == {name: float(value)}


def test_two_budgets_by_override_leave_the_last(recipe: Path) -> None:
    assert load_config(recipe, ["budget.samples=10", "budget.epochs=2"]).budget.epochs == 2


def test_override_reaches_into_lists(recipe: Path) -> None:
    # The error of a patch that is too large tells to set stages.0.patch_px.
    config = load_config(recipe, ["stages.1.patch_px=96", "data.train.0.weight=2"])
    assert [stage.patch_px for stage in config.stages] == [64, 96]
    assert [store.weight for store in config.data.train] == [2.0, 0.4]


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("optim.lr", "not an override"),
        ("=3", "not an override"),
        ("optim.lr=[1", "not a value"),
        ("seed.deeper=1", "bad value for 'seed'"),
        ("budget.minutes.deeper=1", "not a section"),
        ("stages.2.patch_px=96", "an item of a list that is not there"),
        ("stages.first.patch_px=96", "not a section"),
        ("stages.2=96", "an item of a list that is not there"),
        ("optim.lr=", "bad value for 'optim.lr'"),
        ("optim.rl=1", "unknown key 'optim.rl'.*Did you mean 'optim.lr'"),
        ("new.section=1", "unknown key 'new'"),
    ],
)
def test_bad_override(recipe: Path, override: str, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_config(recipe, [override])
    assert "\n" not in str(caught.value)


def test_a_fault_names_the_option_that_it_came_from(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"'optim.lr': '--set optim.lr=fast'"):
        load_config(recipe, ["seed=3", "optim.lr=fast"])
    with pytest.raises(InputError, match=r"'name': '--name no good'"):
        load_config(recipe, ["seed=3"], name="no good")
    with pytest.raises(InputError, match=r"'budget': '--set budget.samples=-1'|'budget.samples'"):
        load_config(recipe, ["budget.samples=-1"])
    # A recipe's own fault stays the recipe's.
    recipe.write_text(recipe.read_text() + "optim: {lr: fast}\n")
    with pytest.raises(InputError, match=str(recipe)):
        load_config(recipe, ["seed=3"])


def test_numbers_as_people_write_them(recipe: Path) -> None:
    config = load_config(recipe, ["budget.samples=1e6", "optim.lr=5e-4"], name="2024")
    assert (config.budget.samples, config.optim.lr, config.name) == (1_000_000, 5e-4, "2024")


def test_stores_of_the_command_line_replace_the_recipes(recipe: Path) -> None:
    config = load_config(recipe)
    assert with_stores(config, [], None) == config
    changed = with_stores(config, [Path("mine")], Path("val"))
    assert [(store.path, store.weight) for store in changed.data.train] == [
        (str(Path("mine").absolute()), 1.0)
    ]
    # Workers start elsewhere: a relative path would mean another folder there.
    assert changed.data.val == str(Path("val").absolute())
    assert with_stores(changed, [], None) == changed


@pytest.mark.parametrize(
    ("schedule", "match"),
    [
        ({"kind": "step"}, "needs one of milestones, step_samples and step_epochs; got none"),
        ({"kind": "step", "step_samples": 5, "step_epochs": 1}, "needs one of"),
        ({"step_epochs": 3}, "step_epochs belongs to kind `step`, not to `cosine`"),
        ({"kind": "step", "milestones": [0.5, 0.4]}, r"milestones that increase.*got \[0.5, 0.4\]"),
        ({"kind": "step", "milestones": [0.5, 1.4]}, "milestones that increase, between 0 and 1"),
        ({"kind": "step", "milestones": [0.0, 0.4]}, "milestones that increase, between 0 and 1"),
    ],
)
def test_steps_are_given_once_and_to_step(schedule: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        parsed(schedule=schedule)


def test_recipes_know_the_losses_that_there_are() -> None:
    assert set(get_args(LossName)) == {*LOSSES, "perceptual"}


# Files


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="no such recipe: 'mobil'.*demo.*gopro_width32.*mobile"):
        find_recipe("mobil")


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo").name == "demo.yaml"
    (tmp_path / "demo").write_text("model: {preset: width64}\nbudget: {epochs: 1}\n")
    assert load_config("demo").model.preset == "width64"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"model: [", "not a YAML file"),
        (b"a: b: c", "not a YAML file"),
        (b"\x80\x81\xff", "not a YAML file"),
        (b"model: !!python/object/apply:os.system ['true']", "not a YAML file"),
        (b"", "an empty recipe.*expected model, budget"),
        (b"- 1\n- 2\n", "expected a mapping, got list"),
    ],
)
def test_file_that_is_no_recipe(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_fault_inside_an_override_of_a_whole_section_is_the_overrides() -> None:
    with pytest.raises(InputError, match=r"--set loss=\{lpips: 0.1\}"):
        load_config("mobile", ["loss={lpips: 0.1}"])


def test_perceptual_weights_are_found_wherever_a_worker_starts() -> None:
    config = load_config("mobile", ["perceptual_weights=vgg19.pth"])
    assert config.perceptual_weights == Path.cwd() / "vgg19.pth"
    assert load_config("mobile").perceptual_weights is None
