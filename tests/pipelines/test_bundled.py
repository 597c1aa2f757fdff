"""The model that comes with the package: found where nothing else is, and worth having."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from skimage import data

from nafnet_core import PRESETS, InputError
from nafnet_core.blur import degrade, draw_degradation, sample_rng
from pipelines import Restorer
from pipelines.models import BUNDLED, BUNDLED_NAME, find_weights, is_model, open_model
from pipelines.restorer import RestoreSettings
from pipelines.scoring.image import score_image
from pipelines.workspace import Workspace

_MAX_MIB = 3.1
# Not trained on.
_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return Restorer(BUNDLED_NAME)


def test_it_is_small_and_says_what_it_is() -> None:
    assert BUNDLED.stat().st_size <= _MAX_MIB * 2**20
    loaded = open_model(BUNDLED_NAME, Workspace(Path("nowhere")))
    assert loaded.model.config == PRESETS["compact"] and loaded.train_patch_px
    assert BUNDLED_NAME in loaded.label


def test_it_is_taken_where_there_is_no_champion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = Workspace(tmp_path / "workspace")
    assert find_weights(None, workspace) == find_weights(BUNDLED_NAME, workspace)
    assert not workspace.root.exists(), "to look for a champion makes no registry"
    with pytest.raises(InputError, match="no version is the champion yet"):
        find_weights("models:/nafnet-deblur@champion", Workspace(tmp_path))


def test_a_file_or_run_of_its_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path / "workspace")
    assert is_model(BUNDLED_NAME, workspace)
    Path(BUNDLED_NAME).write_bytes(BUNDLED.read_bytes())
    assert not is_model(BUNDLED_NAME, workspace), "as any name that is here and might be a store"
    assert find_weights(BUNDLED_NAME, workspace)[1] == Path(BUNDLED_NAME)


def test_it_sharpens_shaken_photos_that_it_has_not_seen(restorer: Restorer) -> None:
    gains = []
    for number, name in enumerate(_PHOTOS):
        photo, rng = getattr(data, name)(), sample_rng(3, number)
        drawn = draw_degradation(rng, kinds=("shake",), min_size_px=6, max_size_px=10, max_noise=0.002)
        blurred = degrade(photo, drawn, rng)
        gains.append(score_image(name, "", blurred, restorer(blurred), photo).gain_db)
    assert min(gains) > 0.2 and np.mean(gains) > 0.7


def test_it_leaves_sharp_photos_nearly_as_they_are(restorer: Restorer) -> None:
    photos = [getattr(data, name)() for name in _PHOTOS]
    scores = [score_image("", "", photo, restorer(photo), photo).psnr_restored_db for photo in photos]
    # `rocket` is a soft photo, which it sharpens.
    assert min(scores) > 34 and np.mean(scores) > 40


def test_tiles_give_the_whole_photo(restorer: Restorer) -> None:
    photo = np.tile(data.astronaut(), (2, 2, 1))[:700, :900]
    tiled = Restorer(restorer.loaded, RestoreSettings(tile_px=512))(photo)
    # Not equal: at a tile's border the windows of local statistics, 288 px, lie otherwise.
    assert score_image("", "", photo, tiled, restorer(photo)).psnr_restored_db > 48


@pytest.mark.parametrize("value", [0, 7, 128, 255])
def test_flat_images_stay_flat(restorer: Restorer, value: int) -> None:
    flat = np.full((70, 90, 3), value, np.uint8)
    assert np.abs(restorer(flat).astype(int) - value).max() <= 4


@pytest.mark.skipif("NAFNET_DATA" not in os.environ, reason="NAFNET_DATA names no folder of real pairs")
def test_it_gains_on_real_motion_blur(restorer: Restorer) -> None:
    from pipelines.images import read_rgb_u8

    files = sorted((Path(os.environ["NAFNET_DATA"]) / "gopro").glob("**/blur/*.png"))[::4]
    scores = [
        score_image(
            file.stem, "", blurred, restorer(blurred), read_rgb_u8(file.parents[1] / "sharp" / file.name)
        )
        for file in files
        for blurred in [read_rgb_u8(file)]
    ]
    assert np.mean([score.psnr_restored_db - score.psnr_blurred_db for score in scores]) > 0
