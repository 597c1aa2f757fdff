from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nafnet_core import InputError, restore_image, save_model
from nafnet_core.colour import colour_shift
from nafnet_core.reduced import merged, reduced
from pipelines import Restorer
from pipelines.models import open_model
from pipelines.restorer import RestoreSettings
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, lively_network, network_that_breaks, photo

FP32 = RestoreSettings(precision="fp32")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(lively_network(SMALL), path, metadata={"train_patch_px": 32})
    return path


def test_an_array_in_and_the_same_out(weights: Path) -> None:
    image = photo(90, 130)
    restored = Restorer(str(weights), FP32)(image)
    assert restored.shape == image.shape and restored.dtype == np.uint8
    assert np.array_equal(restored, restore_image(lively_network(SMALL), image, train_patch_px=32))
    assert not np.array_equal(restored, image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_alpha_and_16_bit(weights: Path, dtype: type) -> None:
    restore = Restorer(str(weights), FP32)
    image = (photo(40, 60).astype(np.uint16) * 257).astype(np.uint16) if dtype == np.uint16 else photo(40, 60)
    for each in (image[..., 0], np.dstack([image, image[..., 0]])):
        restored = restore(each)
        assert np.array_equal(restored, restore_image(lively_network(SMALL), each, train_patch_px=32))
        assert restored.shape == each.shape and restored.dtype == dtype


@pytest.mark.parametrize("shape", [(5,), (4, 4, 2), (1, 4, 4, 3)])
def test_other_shapes_are_refused(weights: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Restorer(str(weights))(np.zeros(shape, np.uint8))


def test_an_opened_model_and_its_patch(weights: Path, tmp_path: Path) -> None:
    loaded = open_model(str(weights), Workspace.find(tmp_path), train_patch_px=0)
    image = photo(150, 150)
    restored = Restorer(loaded, FP32)(image)
    assert np.array_equal(restored, restore_image(lively_network(SMALL), image, train_patch_px=None))
    assert np.array_equal(restored, Restorer(str(weights), FP32, train_patch_px=0)(image))
    assert not np.array_equal(restored, Restorer(str(weights), FP32)(image))


def test_at_reduced_size(weights: Path) -> None:
    image = photo(120, 160)
    restored = Restorer(str(weights), RestoreSettings(precision="fp32", scale=0.5))(image)
    small = reduced(image, 0.5)
    expected = merged(image, small, restore_image(lively_network(SMALL), small, train_patch_px=32))
    assert np.array_equal(restored, expected)
    assert not np.array_equal(restored, image)


def test_colours_are_told_and_kept(weights: Path) -> None:
    image = photo(512, 512)
    (plain,) = Restorer(str(weights), FP32).stream([image])
    (kept,) = Restorer(str(weights), RestoreSettings(precision="fp32", keep_colour=True)).stream([image])
    assert plain.colour_shift == pytest.approx(colour_shift(image, plain.image))
    assert kept.colour_shift == plain.colour_shift, "what the network did is told, not what was mended"
    assert max(map(abs, plain.colour_shift)) > 1
    assert max(map(abs, colour_shift(image, kept.image))) < 0.1 * max(map(abs, plain.colour_shift)) + 0.5


def test_what_was_broken_is_told(tmp_path: Path) -> None:
    image = photo(256, 320)
    for only_locally, expected in ((True, (1, 0)), (False, (0, 1))):
        path = tmp_path / f"{only_locally}.safetensors"
        model = network_that_breaks(image, only_locally=only_locally)
        save_model(model, path, metadata={"train_patch_px": 16})
        (result,) = Restorer(str(path), FP32).stream([image])
        assert (result.num_redone, result.num_kept) == expected


def test_time_is_the_networks_and_not_that_of_those_around(weights: Path) -> None:
    import time

    def slowly() -> Any:
        for _ in range(3):
            time.sleep(0.3)
            yield photo(32, 32)

    seconds = []
    for result in Restorer(str(weights), FP32).stream(slowly()):
        time.sleep(0.3)
        seconds.append(result.seconds)
    assert 0 < sum(seconds) < 0.6, "1.8 s were spent outside"


@pytest.mark.parametrize(
    "wrong", [{"tile_px": 128}, {"tile_batch": 0}, {"precision": "int8"}, {"scale": 0.0}, {"scale": 1.5}]
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RestoreSettings(**wrong)
