from __future__ import annotations

from pathlib import Path

import pytest

from nafnet_core import save_model
from pipelines.models import LoadedModel, open_model
from pipelines.store import PairStore
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, lively_network
from tests.pipelines.pairs import make_store, write_pairs


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs/ and store/ of the same six pairs, three scenes, and {a,b}.safetensors."""
    root = tmp_path_factory.mktemp("evaluate")
    source = write_pairs(root / "pairs", ["a/1", "a/2", "a/3", "b/1", "b/2", "c/1"])
    make_store(source, root / "store", crop_px=None, split="test")
    for seed, name in enumerate("ab"):
        save_model(
            lively_network(SMALL, seed=seed), root / f"{name}.safetensors", metadata={"train_patch_px": 32}
        )
    return root


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace").make()


@pytest.fixture
def model(places: Path, workspace: Workspace) -> LoadedModel:
    return open_model(str(places / "a.safetensors"), workspace)


@pytest.fixture
def other(places: Path, workspace: Workspace) -> LoadedModel:
    return open_model(str(places / "b.safetensors"), workspace)


@pytest.fixture
def whole_store(places: Path) -> PairStore:
    return PairStore(places / "store")
