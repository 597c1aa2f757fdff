from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pytest

from pipelines import restore
from pipelines.models import LoadedModel
from pipelines.png import encode_png
from pipelines.restore import RestoreConfig, RestoreResult
from pipelines.restorer import RestoreSettings
from tests.pipelines.pairs import piece
from tests.pipelines.restore.results import loaded_network

_SETTINGS = ("tile_px", "tile_batch", "precision", "scale", "ensemble", "keep_colour")


class RestoreFiles(Protocol):
    def __call__(
        self, inputs: Path | str | list[str], loaded: LoadedModel, out: Path | str, **options: Any
    ) -> RestoreResult: ...


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A small network that is no identity."""
    return loaded_network(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos in two levels."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["a.png", "sub/b.png", "sub/deep/c.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_png(piece(number, 32, 40)))
    return folder


@pytest.fixture(scope="session")
def restore_files() -> RestoreFiles:
    """Restores in fp32, with settings and options by name."""

    def restored(
        inputs: Path | str | list[str], loaded: LoadedModel, out: Path | str, **options: Any
    ) -> RestoreResult:
        chosen = {name: options.pop(name) for name in _SETTINGS if name in options}
        settings = RestoreSettings(**{"precision": "fp32", **chosen})
        progress = {"on_progress": options.pop("on_progress")} if "on_progress" in options else {}
        names = inputs if isinstance(inputs, list) else [str(inputs)]
        config = RestoreConfig(inputs=names, out=str(out), settings=settings, **options)
        return restore.run(config, loaded, **progress)

    return restored
