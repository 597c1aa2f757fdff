"""One tiny network and a workspace that keeps its export to ONNX: building a graph takes seconds a block."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nafnet_core import NAFNetConfig, save_model
from pipelines import export
from pipelines.export import onnx_format, parity
from pipelines.models import open_model
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import lively_network

SHAPE = NAFNetConfig(width=8, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,))
PATCH_PX = 32  # local statistics then have windows of 48 px


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry of a test is its workspace's, whatever the environment of the tests says."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: look, do not touch."""
    path = tmp_path_factory.mktemp("weights") / "lively.safetensors"
    save_model(lively_network(SHAPE), path, metadata={"train_patch_px": PATCH_PX, "name": "lively"})
    return path


@pytest.fixture(scope="session")
def keeping(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace that keeps the network for ONNX Runtime. Shared: look, do not touch."""
    workspace = Workspace(tmp_path_factory.mktemp("keeping"))
    config = export.ExportConfig(to="onnx", out=workspace.exports / "model.onnx")
    result = export.keep(config, open_model(str(weights), workspace), workspace)
    assert result.parity.difference < 1e-5
    return workspace


@pytest.fixture
def workspace(keeping: Workspace, tmp_path: Path) -> Workspace:
    """The same, to be changed; where `run` has its workspace."""
    return Workspace(shutil.copytree(keeping.root, tmp_path / "workspace"))


@pytest.fixture(scope="session")
def onnx_file(keeping: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file. Shared: look, do not touch."""
    (file,) = keeping.exports.glob("*/*/model.onnx")
    return Path(shutil.copy(file, tmp_path_factory.mktemp("onnx") / "lively.onnx"))


@pytest.fixture
def quick_openvino(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO models are made of the graph that is there already, and tried on small crops."""
    import onnx

    monkeypatch.setattr(parity, "LARGE_PX", (96, 128))

    monkeypatch.setattr(onnx_format, "build", lambda form, precision: onnx.load(onnx_file))


def export_weights(weights: Path, out: Path, **options: Any) -> export.ExportResult:
    """`nafnet export` of them, to a file."""
    loaded = open_model(str(weights), Workspace(out.parent))
    return export.run(export.ExportConfig(out=out, **options), loaded)
