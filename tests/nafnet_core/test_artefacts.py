from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nafnet_core import restore_image
from nafnet_core.artefacts import is_broken
from nafnet_core.blur import degrade, draw_degradation, sample_rng
from nafnet_core.tiling import TiledImage, TileOptions, restore_images
from tests.nafnet_core.networks import SMALL, lively_network, network_that_breaks, photo

PATCH_PX = 16
SIZE = (256, 320)


def as_floats(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(image).float()[None] / 255


def one(images: list[NDArray[np.uint8]], model: torch.nn.Module, **options: object) -> TiledImage:
    chosen = TileOptions(train_patch_px=PATCH_PX, guard=True, **options)  # type: ignore[arg-type]
    (result,) = restore_images(model, images, chosen)  # type: ignore[arg-type]
    return result


def noise(seed: int, *, sigma: float, base: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (base + sigma * torch.randn(1, *SIZE, 3, generator=generator)).clamp(0, 1)


PLAIN = {
    "black": torch.zeros(1, *SIZE, 3),
    "white": torch.ones(1, *SIZE, 3),
    "flat": torch.full((1, *SIZE, 3), 0.3),
    "noisy": noise(0, sigma=0.1),
    "dark and noisy": noise(1, sigma=0.02, base=0.02),
    "saturated": (as_floats(photo(*SIZE)) * 2.5).clamp(0, 1),
    "photo": as_floats(photo(*SIZE)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_an_input_is_sound_as_it_is_and_denoised(name: str) -> None:
    lq = PLAIN[name]
    smooth = torch.nn.functional.avg_pool2d(lq.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1)
    assert not is_broken(lq, lq).any()
    assert not is_broken(lq, smooth).any()
    assert not is_broken(smooth, lq).any()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("failure", ["mosaic", "exploded", "nan", "colour", "one corner"])
def test_failures_are_found_on_any_content(name: str, failure: str) -> None:
    lq = PLAIN[name]
    generator = torch.Generator().manual_seed(3)
    mosaic = torch.rand(1, SIZE[0] // 8, SIZE[1] // 8, 3, generator=generator).round()
    mosaic = mosaic.repeat_interleave(8, 1).repeat_interleave(8, 2)
    broken = lq.clone()
    if failure == "mosaic":
        broken[:, 64:192, 64:192] = mosaic[:, 64:192, 64:192]
    elif failure == "exploded":
        broken[:, 100:200] = 30 * (mosaic[:, 100:200] - 0.5)
    elif failure == "nan":
        broken[0, 7, 9, 1] = float("nan")
    elif failure == "colour":
        broken[..., 1] = 1 - broken[..., 1].round()
    else:
        broken[:, :64, :64] = mosaic[:, :64, :64]
    assert is_broken(torch.cat([lq, lq, lq]), torch.cat([lq, broken, lq])).tolist() == [False, True, False]


@pytest.mark.parametrize("seed", range(8))
def test_an_ideal_restoration_is_sound(seed: int) -> None:
    sharp = photo(384, 512)
    rng = sample_rng(seed, 0)
    degradation = draw_degradation(
        rng, kinds=("shake", "defocus", "gaussian"), min_size_px=10, max_size_px=60, max_noise=0.04
    )
    lq = degrade(sharp, degradation, rng)
    assert not is_broken(as_floats(lq), as_floats(sharp)).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (15, 15), (31, 200), (33, 65)])
def test_any_size(size: tuple[int, int]) -> None:
    lq = as_floats(photo(*size))
    assert not is_broken(lq, lq).any()
    assert is_broken(lq, torch.full_like(lq, float("inf"))).all()


def test_a_tile_that_breaks_is_done_again_without_local_statistics() -> None:
    lq = photo(*SIZE)
    model = network_that_breaks(lq, only_locally=True)
    with pytest.raises(AssertionError, match="sound"):
        plain = restore_image(model, lq, train_patch_px=PATCH_PX)
        assert not is_broken(as_floats(lq), as_floats(plain)).any(), "sound"
    result = one([lq], model)
    assert (result.num_tiles, result.num_redone, result.num_kept) == (1, 1, 0)
    assert np.array_equal(result.restored, restore_image(model, lq, train_patch_px=None))
    assert not np.array_equal(result.restored, lq)


def test_a_tile_that_breaks_whatever_is_done_stays_as_it_was() -> None:
    lq = photo(*SIZE)
    model = network_that_breaks(lq, only_locally=False)
    result = one([lq], model)
    assert (result.num_redone, result.num_kept) == (0, 1)
    assert np.array_equal(result.restored, lq)
    tiled = one([photo(300, 500)], model, tile_px=256)
    assert tiled.num_tiles > 1 and tiled.num_kept == tiled.num_tiles
    assert np.array_equal(tiled.restored, photo(300, 500))


def test_sound_tiles_are_left_alone() -> None:
    model = lively_network(SMALL)
    lq = photo(300, 500)
    result = one([lq], model, tile_px=256)
    assert (result.num_redone, result.num_kept) == (0, 0)
    assert np.array_equal(result.restored, restore_image(model, lq, train_patch_px=PATCH_PX, tile_px=256))
