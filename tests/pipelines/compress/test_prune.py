"""`nafnet compress prune`: what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nafnet_core import InputError, load_model, save_model
from pipelines import registry
from pipelines.compress import PruneConfig, PruneResult, run_prune
from pipelines.config import load_config
from pipelines.models import open_model
from pipelines.train.initial import write_initial
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import lively_network, photo_nchw
from tests.pipelines.compress.conftest import CONFIG
from tests.pipelines.conftest import Run


def _prune(model: Path, tmp_path: Path, **options: Any) -> PruneResult:
    config = PruneConfig(out=tmp_path / "small.safetensors", **options)
    return run_prune(config, open_model(str(model), Workspace(tmp_path)))


def test_the_result_is_an_ordinary_model_with_its_recipe(model: Path, store: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = PruneConfig(out=tmp_path / "small.safetensors", macs=0.8, on=store, num_patches=6, patch_px=64)
    result = run_prune(
        config,
        open_model(str(model), Workspace(tmp_path)),
        on_patch=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(number, 6) for number in range(6)]
    small, metadata = load_model(result.weights)
    assert metadata["train_patch_px"] == 64 and metadata["pruned"]["from"] == "whole.safetensors"
    assert metadata["pruned"]["importance"] == "taylor" and metadata["pruned"]["fitted"] is True
    shapes = small.config.gated_channels()
    assert [dw for _, dw, _ in shapes] == list(result.dw_channels)
    assert [ffn for _, _, ffn in shapes] == list(result.ffn_channels)
    assert result.parameters == (
        open_model(str(model), Workspace(tmp_path)).model.num_parameters,
        small.num_parameters,
    )
    assert 0.5 * result.gmacs[0] < result.gmacs[1] <= 0.8 * result.gmacs[0]
    assert result.psnr_db is not None and result.psnr_blurred_db is not None

    # The recipe takes it up whole.
    run_config = load_config(result.recipe, train=[store], val=store, name="tuned")
    initial = write_initial(run_config, Workspace(tmp_path), tmp_path)
    assert initial.is_whole and initial.total == len(small.state_dict())
    begun, _ = load_model(tmp_path / "init.safetensors")
    lq = photo_nchw(40, 40)
    with torch.no_grad():
        assert torch.equal(begun(lq), small(lq))


def test_without_pairs_magnitudes_decide(model: Path, tmp_path: Path) -> None:
    result = _prune(model, tmp_path, ratio=0.5)
    assert (result.importance, result.psnr_db) == ("magnitude", None)
    assert result.dw_channels == (8, 16, 32, 16, 8)


def test_the_same_pairs_give_the_same_file(model: Path, store: str, tmp_path: Path) -> None:
    content = []
    for _ in range(2):
        out = _prune(model, tmp_path, ratio=0.5, on=store, num_patches=3, patch_px=64).weights
        content.append(out.read_bytes())
    assert content[0] == content[1]


def test_a_pruned_model_is_registered_and_loaded_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = _prune(model, tmp_path, ratio=0.5).weights
    workspace = Workspace(tmp_path / "workspace").make()
    version = registry.register(str(out), workspace)
    again = open_model(f"models:/nafnet-deblur/{version.version}", workspace)
    assert again.model.config == load_model(out)[0].config


def test_what_is_there_already_stays(model: Path, tmp_path: Path) -> None:
    _prune(model, tmp_path, ratio=0.5)
    _prune(model, tmp_path, ratio=0.5)  # ours, and made anew
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {preset: mobile}\n")
    with pytest.raises(InputError, match=r"a recipe of this name.*small\.yaml"):
        _prune(model, tmp_path, ratio=0.5)
    assert recipe.read_text() == "model: {preset: mobile}\n"
    recipe.unlink()
    with pytest.raises(InputError, match="would replace the one it comes from"):
        run_prune(
            PruneConfig(out=tmp_path / "small.safetensors", macs=0.9),
            open_model(str(tmp_path / "small.safetensors"), Workspace(tmp_path)),
        )


def test_a_network_of_gray_images_is_refused(tmp_path: Path) -> None:
    gray = lively_network(dataclasses.replace(CONFIG, img_channel=1))
    save_model(gray, tmp_path / "gray.safetensors", metadata={})
    with pytest.raises(InputError, match="does not restore RGB.*1 channels"):
        _prune(tmp_path / "gray.safetensors", tmp_path, ratio=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--ratio or --macs"),
        ({"ratio": 0.2, "macs": 0.8}, "--ratio or --macs"),
        ({"ratio": 1.0}, "less than 1, got 1.0"),
        ({"ratio": 0.2, "importance": "taylor"}, "Name one with --on"),
        ({"ratio": 0.2, "importance": "luck"}, "auto, magnitude, taylor"),
        ({"macs": 0.01}, "at least 0.* of the multiply-accumulates stay"),
        ({"ratio": 0.01}, "nothing leaves"),
        ({"ratio": 0.2, "on": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(model: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        _prune(model, tmp_path, **options)
    assert not list(tmp_path.glob("small.*"))


def test_the_command(model: Path, store: str, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "small.safetensors"
    on = ("--on", store, "--patches", 2)
    code, shown, _ = run("compress", "prune", model, "--ratio", 0.3, *on, "--out", out)
    assert code == 0 and "× 0." in shown and f"--config {out.with_suffix('.yaml')}" in shown
    code, told, _ = run("compress", "prune", model, "--ratio", 0.3, "--out", out, "--json")
    assert code == 0 and json.loads(told)["importance"] == "magnitude"
    assert json.loads(told)["weights"] == str(out)
