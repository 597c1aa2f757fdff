"""Exports behind `nafnet serve`: pinned, and versions without one refused until there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nafnet_core import InputError, load_model, save_model
from nafnet_core.tiling import restore_image
from pipelines import registry
from pipelines.export.kept import NOTE, read_kept
from pipelines.export.published import publish
from pipelines.models import REGISTERED_NAME
from pipelines.serve.champion import open_served
from pipelines.serve.settings import ServeSettings
from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import lively_network, photo
from tests.pipelines.export.conftest import PATCH_PX, SHAPE
from tests.pipelines.serve.clients import ask, encoded, restore
from tests.pipelines.serve.services import Command, routes

_ALIAS = "followed"


@dataclass(frozen=True)
class _Registry:
    """Version 1 has an export beside it that is not in the workspace; version 2 is another network."""

    workspace: Workspace

    def point_at(self, version: int, alias: str = _ALIAS) -> None:
        client = mlflow_client(self.workspace)
        client.set_registered_model_alias(REGISTERED_NAME, alias, str(version))


@pytest.fixture
def registered(workspace: Workspace, weights: Path, tmp_path: Path) -> Iterator[_Registry]:
    made = _Registry(Workspace(tmp_path / "registry"))
    registry.register(str(weights), made.workspace)
    other = tmp_path / "other.safetensors"
    save_model(lively_network(SHAPE, seed=1), other, metadata={"train_patch_px": PATCH_PX})
    registry.register(str(other), made.workspace)
    (note,) = workspace.exports.glob(f"*/*/{NOTE}")
    publish(read_kept(note.parent), f"models:/{REGISTERED_NAME}/1", made.workspace)
    made.point_at(1)
    yield made


def _until(happens: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_an_exported_file_is_served(weights: Path, onnx_file: Path, tmp_path: Path) -> None:
    model, _ = load_model(weights)
    image = photo(60, 80)
    expected = restore_image(model, image, train_patch_px=PATCH_PX, tile_px=None).astype(int)
    with routes(model=str(onnx_file), precision="auto", workspace=tmp_path) as (address, _):
        answer = restore(address, encoded(image))
        assert np.abs(answer.image.astype(int) - expected).max() <= 1
        told = ask(address, "/v1/model").told
        assert told["model"]["backend"] == "onnxruntime" == ask(address, "/readyz").told["model"]["backend"]
        assert (told["pinned"]["backend"], told["pinned"]["precision"]) == ("onnxruntime", "fp32")
        assert 'backend="onnxruntime"' in ask(address, "/metrics").content.decode()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "torch", "precision": "auto"}, "a back end of its own"),
        ({"precision": "bf16"}, "the precision of an exported model is fixed"),
        ({"train_patch_px": 64, "precision": "auto"}, "local statistics of an exported model are fixed"),
    ],
)
def test_an_exported_file_is_what_it_is(
    onnx_file: Path, tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        open_served(ServeSettings(model=str(onnx_file), workspace=tmp_path, **settings))  # type: ignore[arg-type]


def test_a_service_is_pinned(weights: Path, workspace: Workspace) -> None:
    settings = ServeSettings(model=str(weights), workspace=workspace.root)
    assert open_served(settings).restorer.loaded.backend == "torch"
    with pytest.raises(InputError, match="a service has one precision"):
        ServeSettings(model=str(weights), workspace=workspace.root, precision="auto")
    with pytest.raises(InputError, match=r"expected bf16.*--to onnx --precision bf16 --keep"):
        open_served(
            ServeSettings(
                model=str(weights), workspace=workspace.root, backend="onnxruntime", precision="bf16"
            )
        )


def test_a_version_without_the_export_is_refused_until_one_is_kept(
    registered: _Registry, weights: Path
) -> None:
    spec = f"models:/{REGISTERED_NAME}@{_ALIAS}"
    with routes(model=spec, workspace=registered.workspace.root, backend="onnxruntime", poll_s=0.05) as (
        address,
        _,
    ):
        ready = ask(address, "/readyz").told["model"]
        assert (ready["version"], ready["backend"]) == ("1", "onnxruntime")
        body = encoded(photo(40, 40))
        before = restore(address, body)
        registered.point_at(2)
        _until(lambda: ask(address, "/readyz").told["refused"] is not None)
        refused = ask(address, "/readyz").told["refused"]
        assert refused["version"] == "2" and "no export for onnxruntime is kept" in refused["reason"]
        assert (
            f"nafnet export models:/{REGISTERED_NAME}/2 --to onnx --precision fp32 --keep"
            in refused["reason"]
        )
        assert restore(address, body).content == before.content
        time.sleep(0.5)  # many looks later it has not been tried again
        assert 'champions_refused_total{replica="0"} 1.0' in ask(address, "/metrics").content.decode()
        # Version 3 has the tensors of version 1, whose export lies in the workspace by now: it needs no tag.
        version = registry.register(str(weights), registered.workspace).version
        registered.point_at(version)
        _until(lambda: ask(address, "/readyz").told["model"]["version"] == str(version))
        ready = ask(address, "/readyz").told
        assert ready["refused"] is None and ready["model"]["backend"] == "onnxruntime"


@pytest.mark.slow
def test_what_is_kept_later_is_taken_up(registered: _Registry) -> None:
    from pipelines import export
    from pipelines.models import open_model

    spec, root = f"models:/{REGISTERED_NAME}@{_ALIAS}", registered.workspace.root
    with routes(model=spec, workspace=root, backend="onnxruntime", poll_s=0.5) as (address, _):
        registered.point_at(2)
        _until(lambda: ask(address, "/readyz").told["refused"] is not None)
        config = export.ExportConfig(to="onnx", out=root / "model.onnx")
        export.keep(config, open_model(f"models:/{REGISTERED_NAME}/2", Workspace(root)), Workspace(root))
        _until(lambda: ask(address, "/readyz").told["model"]["version"] == "2")
        ready = ask(address, "/readyz").told
        assert ready["refused"] is None and ready["model"]["backend"] == "onnxruntime"
        assert 'champions_refused_total{replica="0"} 1.0' in ask(address, "/metrics").content.decode()


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_follows_in_its_back_end(registered: _Registry, tmp_path: Path) -> None:
    registered.point_at(1, "champion")
    command = Command(
        registered.workspace.root, tmp_path / "log", "--threads", "1", "--backend", "onnxruntime"
    )
    try:
        command.wait_until_ready()
        ready = ask(command.address, "/readyz").told["model"]
        assert (ready["version"], ready["backend"]) == ("1", "onnxruntime")
        assert (
            "in onnxruntime, fp32"
            in restore(command.address, encoded(photo(40, 40))).headers["x-nafnet-model"]
        )
        registered.point_at(2, "champion")
        _until(lambda: ask(command.address, "/readyz").told["refused"] is not None)
        _until(lambda: "--to onnx --precision fp32 --keep" in command.log.read_text())
        assert ask(command.address, "/readyz").told["model"] == ready
    finally:
        assert command.stop() == 130
