from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nafnet_core import save_model
from pipelines import registry
from pipelines.models import REGISTERED_NAME, alias_version
from pipelines.registry.connection import asking
from pipelines.registry.moves import carry_out
from pipelines.registry.versions import CHAMPION
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, lively_network
from tests.pipelines.serve.services import Command

PATCH_PX = 32
MAX_MIB, MAX_MEGAPIXELS, MAX_QUEUE = 2, 4, 12


def write_model(path: Path, seed: int) -> Path:
    """A network whose blocks act, and of which each seed gives other pixels."""
    save_model(lively_network(SMALL, seed=seed), path, metadata={"train_patch_px": PATCH_PX})
    return path


@dataclass(frozen=True, kw_only=True)
class Registry:
    """Two good versions, of which the first is the champion."""

    workspace: Workspace
    weights: dict[str, Path]
    """By version."""

    def promote(self, version: int) -> None:
        """Move the alias as `nafnet registry promote` does, without its gate, which takes seconds."""
        with asking(self.workspace) as client:
            carry_out(
                client,
                self.workspace,
                {"action": "force", "from": alias_version(client, CHAMPION), "to": version},
                obstacle=lambda: None,
                commit=lambda: client.set_registered_model_alias(REGISTERED_NAME, CHAMPION, str(version)),
            )

    def add(self, path: Path) -> int:
        return registry.register(str(path), self.workspace).version


def make_registry(folder: Path) -> Registry:
    workspace, weights = Workspace(folder / "workspace"), {}
    for number in (1, 2):
        path = write_model(folder / f"{number}.safetensors", seed=number)
        registry.register(str(path), workspace)
        weights[str(number)] = path
    made = Registry(workspace=workspace, weights=weights)
    made.promote(1)
    return made


@pytest.fixture(autouse=True, scope="session")
def no_server() -> Iterator[None]:
    """The registry of a test is its workspace's, whatever the environment of the tests says."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "NAFNET_TOKEN", "NAFNET_WORKSPACE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model. Shared: look, do not touch."""
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors", seed=1)


@pytest.fixture(scope="package")
def champions(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The registry that `command` follows."""
    return make_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="package")
def command(champions: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """`nafnet serve` on the champion, with small limits."""
    limits = ("--max-mib", str(MAX_MIB), "--max-megapixels", str(MAX_MEGAPIXELS))
    log = tmp_path_factory.mktemp("serve") / "log"
    running = Command(champions.workspace.root, log, *limits, "--max-queue", str(MAX_QUEUE), "--threads", "1")
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()
