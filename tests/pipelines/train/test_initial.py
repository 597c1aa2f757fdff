"""Weights that a run begins with: what fits is loaded and told, and the rest is refused or left as drawn."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nafnet_core import InputError, NAFNet, NAFNetConfig, randomize_residual_scales, save_model, save_official
from pipelines.config import RunConfig, parse_config
from pipelines.files import sha256, write_json
from pipelines.train.checks import claim
from pipelines.train.files import CONFIG, INIT, METRICS
from pipelines.train.initial import with_initial_weights
from pipelines.train.trainer import Trainer
from pipelines.workspace import Workspace
from tests.pipelines.train import tiny

_TINY = NAFNetConfig(width=4, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,))


def _config(init: str | Path, **model: Any) -> RunConfig:
    numbers = {"width": 4, "enc_blk_nums": [1], "middle_blk_num": 1, "dec_blk_nums": [1], **model}
    content = {
        "model": {**numbers, "init": str(init)},
        "budget": {"samples": 8},
        "stages": [{"patch_px": 16, "batch": 2}],
        "optim": {"residual_scale": 0.3},
    }
    return parse_config(content, file="test")


def _trainer(config: RunConfig, run_dir: Path) -> Trainer:
    return Trainer(config, tiny.context(run_dir, epoch_samples=8))


@pytest.fixture
def model() -> NAFNet:
    torch.manual_seed(5)
    network = NAFNet(_TINY)
    randomize_residual_scales(network, seed=5)
    return network


@pytest.fixture
def weights(model: NAFNet, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model.safetensors", metadata={})
    return tmp_path / "model.safetensors"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["model.safetensors", "official.pth"])
def test_a_run_and_its_average_begin_with_the_weights(
    kind: str, model: NAFNet, weights: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = weights.parent / kind
    if kind == "official.pth":
        save_official(model, place)
    with caplog.at_level(logging.INFO):
        config = with_initial_weights(_config(place), Workspace(run_dir.parent), run_dir)
    assert config.model.init_sha256 == sha256(place)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.told  # type: ignore[attr-defined]
    assert record.getMessage() == f"initial weights: 61 of 61 tensors from {kind}"
    trainer = _trainer(config, run_dir)
    assert trainer.ema is not None
    for network in (trainer.model, trainer.ema):
        own = network.state_dict()
        # β and γ too: the recipe's residual_scale draws them for new networks only.
        assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_a_part_is_loaded_and_warned_of(
    weights: Path, run_dir: Path, model: NAFNet, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(weights, middle_blk_num=2)
    pinned = with_initial_weights(config, Workspace(run_dir.parent), run_dir)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "61 of 79 tensors from model.safetensors; 18 not in it (middle_blks.1." in record.getMessage()
    assert "and 16 more" in record.getMessage()
    own, plain = _trainer(pinned, run_dir).model, _trainer(_config(weights, middle_blk_num=2), run_dir).model
    assert torch.equal(own.intro.weight, model.intro.weight)
    # What the file has not begins as in any run of this seed.
    (run_dir / INIT).unlink()
    bare = parse_config({**config.model_dump(exclude={"model"}), "model": {
        **config.model.model_dump(), "init": None}}, file="test")  # fmt: skip
    drawn = _trainer(bare, run_dir).model.state_dict()
    name = "middle_blks.1.beta"
    assert torch.equal(own.state_dict()[name], drawn[name]) and drawn[name].abs().sum() > 0
    assert torch.equal(plain.state_dict()[name], drawn[name])


def test_what_the_network_has_not_is_told(
    weights: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_initial_weights(_config(weights, middle_blk_num=0), Workspace(run_dir.parent), run_dir)
    assert "43 of 43 tensors" in caplog.text and "18 unknown to the network (middle_blks.0." in caplog.text


def test_other_shapes_are_told_with_both(
    weights: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = NAFNet(_TINY).state_dict()
    torch.save({**state, "intro.weight": torch.zeros(4, 1, 3, 3)}, weights.parent / "gray.pth")
    config = _config(weights.parent / "gray.pth")
    with_initial_weights(config, Workspace(run_dir.parent), run_dir)
    assert "60 of 61" in caplog.text
    assert "1 of another shape (intro.weight (4, 1, 3, 3) for (4, 3, 3, 3))" in caplog.text


def test_what_cannot_be_begun_with(weights: Path, run_dir: Path) -> None:
    def refused(config: RunConfig, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            with_initial_weights(config, Workspace(run_dir.parent), run_dir)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        assert not (run_dir / INIT).exists()

    folder = weights.parent
    refused(_config(weights, width=6), r"nothing of this model fits.*\(4, 3, 3, 3\) for \(6, 3, 3, 3\)")
    torch.save({"layer.weight": torch.zeros(3)}, folder / "other.pth")
    refused(_config(folder / "other.pth"), r"nothing of this model fits.*got layer.weight")
    broken = NAFNet(_TINY)
    torch.nn.init.constant_(broken.intro.weight, float("nan"))
    save_model(broken, folder / "nan.safetensors", metadata={})
    refused(_config(folder / "nan.safetensors"), "not finite.*intro.weight")
    (folder / "cut.safetensors").write_bytes(weights.read_bytes()[:-9])
    refused(_config(folder / "cut.safetensors"), "damaged weights file.*cut.safetensors")
    refused(_config(folder / "nowhere.pth"), "no such model.*nowhere.pth")
    config = _config(weights)
    other = config.model.model_copy(update={"init_sha256": "0" * 64})
    refused(config.model_copy(update={"model": other}), "other initial weights than.*expected 000")


def test_a_run_that_goes_on_needs_the_model_no_more(weights: Path, run_dir: Path) -> None:
    workspace = Workspace(run_dir.parent)
    config = with_initial_weights(_config(weights), workspace, run_dir)
    write_json(run_dir / CONFIG, config.model_dump(mode="json"))
    (run_dir / METRICS).touch()
    trainer = _trainer(config, run_dir)
    torch.nn.init.constant_(trainer.model.intro.bias, 7.0)
    trainer.samples = 2
    trainer.save()
    trainer.saver.wait()
    entry = trainer.saver.ledger.entries()[-1]
    written = json.loads((trainer.saver.ledger.folder / entry.folder / "state.json").read_text())
    assert written["digests"] == ["data"]
    digest = config.model.init_sha256
    weights.unlink()
    (run_dir / INIT).unlink()
    # The command says the model, not its digest: that is the run's own.
    again = with_initial_weights(_config(weights), workspace, run_dir)
    assert again.model.init_sha256 == digest
    resumed = _trainer(again, run_dir)
    assert resumed.resume() and float(resumed.model.intro.bias[0].detach()) == 7.0
    assert trainer._metadata()["recipe"]["model"]["init_sha256"] == digest


def test_another_model_is_another_run(weights: Path, run_dir: Path) -> None:
    config = with_initial_weights(_config(weights), Workspace(run_dir.parent), run_dir)
    write_json(run_dir / CONFIG, config.model_dump(mode="json"))
    (run_dir / METRICS).touch()
    claim(_config(weights), run_dir)
    with pytest.raises(InputError, match=r"other values.*model\.init=.*other.pth.*--name"):
        claim(_config(weights.parent / "other.pth"), run_dir)
