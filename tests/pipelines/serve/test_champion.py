"""The alias is followed, a bad champion refused, a registry that is silent borne."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nafnet_core import InputError, NAFNet, NAFNetConfig, save_model
from pipelines.models import WEIGHTS_IN_VERSION
from pipelines.registry import register
from pipelines.serve.champion import Follower, followed, known_image, open_served
from pipelines.serve.settings import ServeSettings
from pipelines.tracking import mlflow_client
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, lively_network, photo
from tests.pipelines.serve.clients import ask, encoded, restore
from tests.pipelines.serve.conftest import PATCH_PX, Registry
from tests.pipelines.serve.services import routes

_ALIAS = "followed"  # the champion itself is followed by the real command
_MODEL = f"models:/nafnet-deblur@{_ALIAS}"


@pytest.fixture
def registry(champions: Registry) -> Registry:
    return champions


def _champion(registry: Registry, version: int) -> None:
    """Straight to the registry, as another tool would: no gate, no history."""
    mlflow_client(registry.workspace).set_registered_model_alias("nafnet-deblur", _ALIAS, str(version))


def _nan() -> NAFNet:
    model = lively_network(SMALL)
    with torch.no_grad():
        model.intro.weight[0, 0, 0, 0] = float("nan")
    return model


def _wild() -> NAFNet:
    model = lively_network(SMALL)
    with torch.no_grad():
        model.ending.weight.mul_(1000)
    return model


def _gray() -> NAFNet:
    return lively_network(NAFNetConfig(**{**SMALL.to_dict(), "img_channel": 1}))


def test_the_known_image_is_the_same_each_time_and_a_good_network_leaves_it_whole() -> None:
    assert np.array_equal(known_image(), known_image())
    assert known_image().std() > 30


@pytest.mark.parametrize(
    ("make", "reason"), [(_nan, "breaks a known image"), (_wild, "breaks a known image"), (_gray, "RGB")]
)
def test_a_bad_champion_is_refused_and_the_old_one_stays(
    registry: Registry, make: Callable[[], NAFNet], reason: str, tmp_path: Path
) -> None:
    _champion(registry, 1)
    save_model(make(), tmp_path / "bad.safetensors", metadata={"train_patch_px": PATCH_PX})
    bad = registry.add(tmp_path / "bad.safetensors")
    with routes(model=_MODEL, workspace=registry.workspace.root, poll_s=0.05) as (address, _):
        body = encoded(photo(40, 40))
        before = restore(address, body)
        assert before.headers["x-nafnet-version"] == "1"
        _champion(registry, bad)
        _until(lambda: ask(address, "/readyz").told["refused"] is not None)
        ready = ask(address, "/readyz").told
        assert ready["status"] == "ready" and ready["model"]["version"] == "1"
        assert ready["refused"]["version"] == str(bad) and reason in ready["refused"]["reason"]
        assert restore(address, body).content == before.content
        time.sleep(0.3)  # many looks later it has not been tried again
        assert 'champions_refused_total{replica="0"} 1.0' in ask(address, "/metrics").content.decode()
        _champion(registry, 2)
        _until(lambda: ask(address, "/readyz").told["model"]["version"] == "2")
        assert ask(address, "/readyz").told["refused"] is None
        assert restore(address, body).content != before.content
        assert 'champions_taken_total{replica="0"} 1.0' in ask(address, "/metrics").content.decode()


def test_weights_that_are_damaged_or_of_another_network_are_refused(
    registry: Registry, tmp_path: Path
) -> None:
    from pipelines.registry import show

    for number, damage in enumerate((b"not safetensors", None)):
        version = registry.add(registry.weights[str(number + 1)])
        weights = show(str(version), registry.workspace).folder / WEIGHTS_IN_VERSION
        if damage is None:
            save_file({"layer.weight": torch.zeros(3)}, str(weights))
        else:
            weights.write_bytes(damage)
        settings = ServeSettings(workspace=registry.workspace.root)
        with pytest.raises(InputError, match="weights|NAFNet"):
            open_served(settings, version)


def test_the_bundled_model_answers_until_there_is_a_champion(weights: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    settings, taken = ServeSettings(workspace=workspace.root, poll_s=60), []
    served = open_served(settings)
    assert served.version is None and served.label.startswith("mobile-v1")
    follower = Follower(settings, served, hand_over=taken.append)
    follower.look()
    assert not workspace.root.exists(), "to look makes no registry"
    register(str(weights), workspace)
    follower.look()
    assert not taken
    mlflow_client(workspace).set_registered_model_alias("nafnet-deblur", "champion", "1")
    follower.look()
    follower.look()
    follower.close()
    assert [model.version for model in taken] == ["1"]


def test_a_silent_registry_changes_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    _champion(registry, 1)
    settings = ServeSettings(model=_MODEL, workspace=registry.workspace.root, poll_s=0.05)
    taken: list[object] = []
    follower = Follower(settings, open_served(settings), hand_over=taken.append)

    def silent(*_: object, **__: object) -> None:
        raise ConnectionError("nobody there")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.serve.champion.mlflow_client", silent)
        follower._client = None
        _until(lambda: follower.silent_because == "ConnectionError")
        assert not taken
    _until(lambda: follower.silent_because is None)
    _champion(registry, 2)
    _until(lambda: len(taken) == 1)
    follower.close()


def test_downloads_leave_nothing_behind(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    served = open_served(ServeSettings(workspace=registry.workspace.root), 2)
    assert served.version == "2" and served.label == "nafnet-deblur version 2"
    assert not list(tmp_path.iterdir())


def test_only_an_alias_is_followed(registry: Registry, weights: Path) -> None:
    assert followed("models:/nafnet-deblur@champion") == ("nafnet-deblur", "champion")
    assert followed("models:/nafnet-deblur/3")[0] is None
    assert followed("runs/mine@home")[0] is None
    served = open_served(ServeSettings(workspace=registry.workspace.root, model="models:/nafnet-deblur/2"))
    assert served.version == "2"
    assert open_served(ServeSettings(workspace=registry.workspace.root, model=str(weights))).version is None


def _until(happens: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
