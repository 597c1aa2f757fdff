"""Blur of a training store, as recipes and `--set` say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nafnet_core import InputError
from nafnet_core.blur import draw_degradation, sample_rng
from pipelines.config import BlurSection, load_config
from pipelines.synth import SynthConfig


def with_blur(*overrides: str) -> BlurSection | None:
    return load_config("mobile", overrides, train=["a", "b"]).data.train[0].blur


def test_overrides_come_after_the_stores_of_the_command_line() -> None:
    assert with_blur() is None
    assert with_blur("data.train.0.blur={}") == BlurSection()
    blur = with_blur("data.train.0.blur.kinds=[shake, defocus]", "data.train.0.blur.max_size_px=30")
    assert blur == BlurSection(kinds=("shake", "defocus"), max_size_px=30)
    config = load_config("mobile", ["data.train.1.weight=2"], train=["a", "b"], val="c")
    assert [(store.path, store.weight) for store in config.data.train] == [
        (str(Path("a").absolute()), 1.0), (str(Path("b").absolute()), 2.0)
    ]  # fmt: skip
    assert config.data.val == str(Path("c").absolute())
    assert load_config("mobile", ["data.val=d"], val="c").data.val == str(Path("d").absolute())


def test_stores_of_a_recipe_are_found_wherever_a_worker_starts(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {preset: mobile}\nbudget: {samples: 9}\n"
        "data: {train: [{path: stores/a}, {path: s3://bucket/b/}], val: ../c}\ncheckpoint: {storage: runs}\n"
    )
    config = load_config(recipe)
    assert [store.path for store in config.data.train] == [str(Path("stores/a").absolute()), "s3://bucket/b"]
    assert config.data.val == str(Path("../c").absolute())
    assert config.checkpoint.storage == str(Path("runs").absolute())


def test_a_section_that_a_recipe_turned_off_can_be_turned_on(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {preset: mobile}\nbudget: {samples: 9}\ndata: {train: [{path: a, blur: null}]}\n"
    )
    config = load_config(recipe, ["data.train.0.blur.max_noise=0"])
    assert config.data.train[0].blur == BlurSection(max_noise=0)
    assert load_config(recipe, train=["b"]).data.train[0].path == str(Path("b").absolute())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "blur.kind=[shake]",
            r"unknown key 'data\.train\.0\.blur\.kind'.*mean 'data\.train\.0\.blur\.kinds'",
        ),
        ("blur={kinds: [spin]}", "expected 'shake', 'varying', .*got spin"),
        ("blur={kinds: shake}", r"expected a list, as \[a, b\], got shake"),
        ("blur={kinds: []}", "expected one or more"),
        ("blur={min_size_px: 20}", r"expected 0 ≤ min_size_px ≤ max_size_px < 1000.*got 20\.0, 15\.0"),
        ("blur={max_size_px: 5000}", "max_size_px < 1000"),
        ("blur={min_jpeg_quality: 99}", "less than or equal to 95, got 99"),
        ("blur={kinds: [measured]}", "expected `kernels` and the kind `measured` together"),
        ("blur={kernels: there}", "expected `kernels` and the kind `measured` together"),
        ("blur={sharp_share: 0.6, own_share: 0.5}", "sharp_share and own_share of at most 1"),
    ],
)
def test_blur_that_cannot_be_is_one_line(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        with_blur(f"data.train.0.{override}")
    assert f"--set data.train.0.{override}" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("stores", "key"), [((), "data.train.0.blur.kinds"), (("a",), "data.train.1.blur.kinds")]
)
def test_a_store_that_is_not_there_cannot_be_set(stores: tuple[str, ...], key: str) -> None:
    with pytest.raises(InputError, match=rf"--set {key}' \(got {key[11]}\). Name the store with --data"):
        load_config("mobile", [f"{key}=[shake]"], train=stores)


def test_kernels_are_found_wherever_a_worker_starts() -> None:
    blur = with_blur("data.train.0.blur={kinds: [measured], kernels: mine}")
    assert blur is not None and blur.kernels == Path.cwd() / "mine"


def test_synth_has_the_same_options_and_defaults() -> None:
    section, synth = BlurSection(), SynthConfig(sharp=[], out=Path())
    names: set[str] = set(section.ranges())
    assert names == {"kinds", "min_size_px", "max_size_px", "max_noise", "min_jpeg_quality", "encoded_share"}
    same: dict[str, Any] = {name: getattr(synth, name) for name in names - {"max_noise"}}
    assert same == {name: getattr(section, name) for name in same}
    draw_degradation(sample_rng(0, 0), **section.ranges())
