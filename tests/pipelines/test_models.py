"""What MODEL names: files, runs, registered versions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nafnet_core import InputError, NAFNet, NAFNetConfig, randomize_residual_scales
from pipelines.checkpoint import CheckpointLedger, Snapshot
from pipelines.models import find_weights, open_model
from pipelines.workspace import Workspace

_TINY = NAFNetConfig(width=4, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,))


def _save_run(run_dir: Path) -> NAFNet:
    model = NAFNet(_TINY)
    randomize_residual_scales(model, seed=0)
    metadata = {"train_patch_px": 32}
    CheckpointLedger(run_dir).save(
        Snapshot(samples=8, model=model, ema=None, optimizer={}, state={}, metadata=metadata)
    )
    return model


def test_a_run_by_its_folder_and_by_its_name(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    model = _save_run(workspace.run_dir("mine"))
    for spec in ("mine", str(workspace.run_dir("mine"))):
        loaded = open_model(spec, workspace)
        assert loaded.label == "run mine at 8 samples" and loaded.train_patch_px == 32
        assert all(
            torch.equal(value, loaded.model.state_dict()[key]) for key, value in model.state_dict().items()
        )


def test_a_weights_file(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    _save_run(workspace.run_dir("mine"))
    _, weights = find_weights("mine", workspace)
    shutil.copy(weights, tmp_path / "copy.safetensors")
    label, path = find_weights(str(tmp_path / "copy.safetensors"), workspace)
    assert label == "copy.safetensors" and path == tmp_path / "copy.safetensors"


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = Workspace(tmp_path)
    with pytest.raises(InputError, match="no such model"):
        find_weights("nowhere", workspace)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="no checkpoints in this folder"):
        find_weights(str(tmp_path / "folder"), workspace)
    with pytest.raises(InputError, match="no version is the champion yet"):
        find_weights("models:/nafnet-deblur@champion", workspace)
