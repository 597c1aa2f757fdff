"""`nafnet compress quantize`: what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nafnet_core import GateError, InputError, load_model
from pipelines import registry
from pipelines.compress import PruneConfig, QuantizeConfig, QuantizeResult, run_prune, run_quantize
from pipelines.config import load_config
from pipelines.export import ExportConfig
from pipelines.export import run as run_export
from pipelines.models import open_model
from pipelines.png import encode_png
from pipelines.train.initial import write_initial
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import photo_nchw
from tests.pipelines.conftest import Run
from tests.pipelines.pairs import piece


def _quantize(model: Path, tmp_path: Path, **options: Any) -> QuantizeResult:
    config = QuantizeConfig(
        **{
            "out": tmp_path / "int8.safetensors",
            "num_patches": 6,
            "patch_px": 64,
            "max_loss_db": 9.0,
            **options,
        }
    )
    return run_quantize(config, open_model(str(model), Workspace(tmp_path)))


def test_the_result_is_an_ordinary_model_with_its_recipe(model: Path, store: str, tmp_path: Path) -> None:
    result = _quantize(model, tmp_path, on=store)
    rounded, metadata = load_model(result.weights)
    assert metadata["train_patch_px"] == 64 and metadata["quantized"]["from"] == "whole.safetensors"
    assert set(rounded.config.int8_layers or ()) == set(rounded.convolutions)
    assert (result.num_int8, result.kept) == (len(rounded.convolutions), ())
    assert result.psnr_db is not None and result.psnr_db[0] != result.psnr_db[1]
    assert metadata["quantized"]["psnr_db"] == list(result.psnr_db)

    # The recipe takes it up whole, grids and all.
    assert result.recipe is not None
    run_config = load_config(result.recipe, train=[store], val=store, name="tuned")
    initial = write_initial(run_config, Workspace(tmp_path), tmp_path)
    assert initial.is_whole and initial.total == len(rounded.state_dict())
    begun, _ = load_model(tmp_path / "init.safetensors")
    lq = photo_nchw(40, 40)
    with torch.no_grad():
        assert torch.equal(begun(lq), rounded(lq))


def test_sensitive_convolutions_stay_until_the_loss_is_held(model: Path, learnt: str, tmp_path: Path) -> None:
    before, after = _quantize(model, tmp_path, on=learnt).psnr_db or (0.0, 0.0)
    loss_db = before - after
    assert loss_db > 1.0
    asked: list[str] = []
    config = QuantizeConfig(
        out=tmp_path / "int8.safetensors", on=learnt, num_patches=6, patch_px=64, max_loss_db=0.7 * loss_db
    )
    result = run_quantize(
        config,
        open_model(str(model), Workspace(tmp_path)),
        on_step=lambda done, total, what: asked.append(what),
    )
    rounded, _ = load_model(result.weights)
    assert result.kept and set(result.kept).isdisjoint(rounded.config.int8_layers or ())
    assert result.num_int8 + len(result.kept) == len(rounded.convolutions)
    assert set(asked[1:]) == set(rounded.convolutions)  # each was tried alone
    assert result.psnr_db is not None and result.psnr_db[0] - result.psnr_db[1] <= 0.7 * loss_db


def test_too_great_a_loss_writes_nothing(model: Path, learnt: str, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="int8 loses too much.*at most 1e-09 dB"):
        _quantize(model, tmp_path, on=learnt, max_loss_db=1e-9)
    assert not list(tmp_path.glob("int8.*"))


@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_half_precision_is_half_the_file(model: Path, store: str, tmp_path: Path, to: str) -> None:
    result = _quantize(model, tmp_path, to=to, on=store)
    assert 0.45 < result.weights.stat().st_size / model.stat().st_size < 0.6
    assert (result.recipe, result.num_int8, load_model(result.weights)[0].config.int8_layers) == (
        None,
        0,
        None,
    )
    assert result.psnr_db is not None and 0 < abs(result.psnr_db[0] - result.psnr_db[1]) < 0.1
    assert not (tmp_path / "int8.yaml").exists()


def test_a_quantised_model_is_registered_and_evaluated_as_it_rounds(
    model: Path, store: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = Workspace(tmp_path / "workspace").make()
    version = registry.register(str(_quantize(model, tmp_path, on=store).weights), workspace)
    again = open_model(f"models:/nafnet-deblur/{version.version}", workspace)
    assert again.model.config.int8_layers and again.fixed_precision == "fp32"
    (photo := tmp_path / "photo.png").write_bytes(encode_png(piece(0)))
    code, _, said = run("restore", photo, "--model", tmp_path / "int8.safetensors", "--precision", "bf16")
    assert code == 2 and "the precision of this model is fixed" in said


def test_what_cannot_be_is_one_line(model: Path, store: str, tmp_path: Path) -> None:
    for options, words in (
        ({}, "Name one with --calibration"),
        ({"on": store, "to": "int4"}, "int8, fp16, bf16"),
        ({"on": store, "max_loss_db": 0.0}, "more than 0 dB"),
        ({"on": store, "out": tmp_path / "int8.onnx"}, "NAME.safetensors"),
        ({"on": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(InputError, match=words):
            _quantize(model, tmp_path, **options)
    assert not list(tmp_path.glob("int8.*"))
    weights = _quantize(model, tmp_path, on=store).weights
    with pytest.raises(InputError, match="quantised already"):
        _quantize(weights, tmp_path, on=store, out=tmp_path / "twice.safetensors")
    loaded = open_model(str(weights), Workspace(tmp_path))
    with pytest.raises(InputError, match="a quantised model is not pruned"):
        run_prune(PruneConfig(out=tmp_path / "pruned.safetensors", ratio=0.5), loaded)
    with pytest.raises(InputError, match=r"no model in int8.*onnx, openvino.*torch"):
        run_export(ExportConfig(to="torch", out=tmp_path / "int8.pt2"), loaded)
    with pytest.raises(InputError, match="exported as that.*--precision fp32"):
        run_export(ExportConfig(to="onnx", out=tmp_path / "int8.onnx", precision="fp32"), loaded)
    with pytest.raises(InputError, match="not in int8.*compress quantize"):
        whole = open_model(str(model), Workspace(tmp_path))
        run_export(ExportConfig(to="onnx", out=tmp_path / "int8.onnx", precision="int8"), whole)


def test_the_command(model: Path, store: str, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "int8.safetensors"
    on = ("--calibration", store, "--patches", 3, "--patch", 64, "--max-loss", 9)
    code, shown, _ = run("compress", "quantize", model, *on, "--out", out)
    assert code == 0 and "convolutions round to int8" in shown and f"nafnet export {out} --to onnx" in shown
    code, told, _ = run("compress", "quantize", model, *on, "--out", out, "--json")
    assert code == 0 and json.loads(told)["weights"] == str(out)
