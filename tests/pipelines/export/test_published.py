"""Exports beside registered versions: fetched by whoever resolves the version, on a real MLflow store."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from nafnet_core import CapabilityError, InputError
from pipelines import export, registry
from pipelines.export.kept import NOTE, Kept, read_kept
from pipelines.export.published import TAG, publish
from pipelines.models import REGISTERED_NAME, LoadedModel, open_model
from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.pipelines.conftest import Run
from tests.pipelines.export.conftest import PATCH_PX

_ALIAS = "first"
_VERSION = f"models:/{REGISTERED_NAME}/1"
_NAME = f"onnxruntime-fp32-patch{PATCH_PX}"


@pytest.fixture(scope="module")
def registered(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A registry with one version, under an alias of its own."""
    workspace = Workspace(tmp_path_factory.mktemp("registered"))
    registry.register(str(weights), workspace)
    mlflow_client(workspace).set_registered_model_alias(REGISTERED_NAME, _ALIAS, "1")
    return workspace


@pytest.fixture
def kept(workspace: Workspace) -> Kept:
    (note,) = workspace.exports.glob(f"*/*/{NOTE}")
    return read_kept(note.parent)


@pytest.fixture
def elsewhere(registered: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Another machine's workspace, empty, on the same registry."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registered.database}")
    return Workspace(tmp_path / "elsewhere")


def _open(workspace: Workspace) -> LoadedModel:
    return open_model(f"models:/{REGISTERED_NAME}@{_ALIAS}", workspace)


def test_another_machine_fetches_what_lies_beside_a_version(
    registered: Workspace, kept: Kept, elsewhere: Workspace
) -> None:
    publish(kept, _VERSION, registered)
    loaded = _open(elsewhere)
    assert loaded.version == _VERSION
    opened = export.choose(loaded, elsewhere, backend="onnxruntime")
    assert opened.label == f"{REGISTERED_NAME} version 1 ({_ALIAS}), in onnxruntime, fp32"
    assert opened.version == _VERSION and opened.weights_digest == loaded.digest
    (note,) = elsewhere.exports.glob("*/*/*.json")
    fetched = read_kept(note.parent)
    assert fetched.digest == kept.digest
    assert sorted(path.name for path in fetched.folder.parent.iterdir()) == [_NAME]
    # Of a version by its number too, and once only.
    before = fetched.path.stat().st_ino
    export.choose(open_model(_VERSION, elsewhere), elsewhere, backend="onnxruntime")
    assert fetched.path.stat().st_ino == before
    # What has been damaged here is fetched anew.
    fetched.path.write_bytes(b"")
    assert export.choose(loaded, elsewhere, backend="onnxruntime").backend == "onnxruntime"
    assert fetched.path.stat().st_size


def test_the_version_tells_of_it(run: Run, registered: Workspace, kept: Kept) -> None:
    publish(kept, _VERSION, registered)
    tags = mlflow_client(registered).get_model_version(REGISTERED_NAME, "1").tags
    told = json.loads(tags[f"{TAG}{_NAME}"])
    assert (told["format"], told["precision"], told["digest"]) == ("onnx", "fp32", kept.digest)
    assert abs(told["loss_db"]) <= 0.005 and told["difference"] < 1e-4
    code, out, errors = run("registry", "show", _ALIAS, "--workspace", registered.root)
    assert code == 0 and "onnx, fp32: loses" in out, errors
    _, out, _ = run("registry", "show", "1", "--workspace", registered.root, "--json")
    assert json.loads(out)["exports"][_NAME]["network"] == kept.network


def test_what_is_damaged_beside_a_version(
    registered: Workspace, kept: Kept, elsewhere: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    publish(kept, _VERSION, registered)
    (file,) = registered.root.glob("mlartifacts/**/exports/**/model.onnx")
    content = file.read_bytes()
    file.write_bytes(content[:5000])
    try:
        loaded = _open(elsewhere)
        with caplog.at_level(logging.WARNING):
            assert export.choose(loaded, elsewhere, backend="auto") is loaded
        assert "are passed over: a kept export that cannot be used" in caplog.text
        with pytest.raises(InputError, match="model.onnx has changed"):
            export.choose(loaded, elsewhere, backend="onnxruntime")
        assert not list(elsewhere.exports.glob("*/*")), "nothing half-fetched"
    finally:
        file.write_bytes(content)


def test_a_version_without_an_export_has_other_tags(registered: Workspace, elsewhere: Workspace) -> None:
    client = mlflow_client(registered)
    version = registry.register(_VERSION, registered).version
    for name, value in ((_NAME, "hello"), (f"../{_NAME}", "{}"), ("openvino-fp32-global", "[]")):
        client.set_model_version_tag(REGISTERED_NAME, str(version), f"{TAG}{name}", value)
    loaded = open_model(f"models:/{REGISTERED_NAME}/{version}", elsewhere)
    with pytest.raises(InputError, match=f"nafnet export {loaded.version} --to onnx --keep"):
        export.choose(loaded, elsewhere, backend="onnxruntime")
    assert export.choose(loaded, elsewhere, backend="auto") is loaded
    assert not elsewhere.exports.exists()


def test_a_version_without_a_run(registered: Workspace, kept: Kept) -> None:
    made = mlflow_client(registered).create_model_version(REGISTERED_NAME, source=str(registered.root))
    with pytest.raises(CapabilityError, match="no MLflow run.*kept in the workspace alone"):
        publish(kept, f"models:/{REGISTERED_NAME}/{made.version}", registered)


@pytest.mark.slow
def test_export_keep_of_a_version(run: Run, registered: Workspace, elsewhere: Workspace) -> None:
    version = registry.register(_VERSION, registered).version
    spec = f"models:/{REGISTERED_NAME}/{version}"
    code, _, errors = run("export", spec, "--to", "onnx", "--keep", "--workspace", registered.root)
    assert code == 0, errors
    chosen = export.choose(open_model(spec, elsewhere), elsewhere, backend="onnxruntime")
    assert chosen.backend == "onnxruntime"
