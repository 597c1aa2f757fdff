from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nafnet_core import PRESETS, NAFNet, restore_image, tiling
from nafnet_core.tiling import MIN_TILE_PX, default_overlap_px, tile_px_for
from tests.nafnet_core.networks import (
    SMALL,
    lively_network,
    photo,
)

TRAIN_PATCH_PX = 32  # A window of 48 px: from within the overlap it sees the tile and no further.


# Tile size for a memory


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_more_memory_never_means_smaller_tiles(preset: str) -> None:
    with torch.device("meta"):
        model = NAFNet(PRESETS[preset])
    sides = [tile_px_for(model, memory_mib) for memory_mib in (0, 1, 64, 100, 500, 2_000, 8_000, 80_000)]
    assert sides == sorted(sides) and sides[-1] > sides[0] == MIN_TILE_PX
    assert all(side % 64 == 0 for side in sides)


def test_wider_networks_get_smaller_tiles() -> None:
    with torch.device("meta"):
        sides = [tile_px_for(NAFNet(PRESETS[name]), 1_000) for name in ("mobile", "width32", "width64")]
    assert sides[0] > sides[1] > sides[2]


def test_smallest_tile_can_be_used_with_the_default_overlap() -> None:
    model = lively_network(SMALL)
    tile_px = tile_px_for(model, 0)
    restored = restore_image(model, photo(200, 220), train_patch_px=TRAIN_PATCH_PX, tile_px=tile_px)
    assert restored.shape == (200, 220, 3)


def test_a_tile_stays_within_the_memory_it_was_chosen_for() -> None:
    model = NAFNet(PRESETS["mobile"]).eval()
    memory_mib = 100.0
    side = tile_px_for(model, memory_mib)
    assert side > MIN_TILE_PX
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        restore_image(model, photo(side, side), train_patch_px=64)
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    peak_mib = np.cumsum([event.nbytes() for event in allocations]).max() / 2**20
    # Above half of it would also do; far below, and large photos are cut into needless pieces.
    assert memory_mib / 4 < peak_mib < memory_mib


@pytest.mark.parametrize(
    ("train_patch_px", "tile_px", "overlap_px"),
    [(None, 1024, 64), (96, 1024, 64), (256, 1024, 128), (384, 1024, 192), (256, 192, 64), (256, 320, 106)],
)
def test_overlap_follows_the_patch(train_patch_px: int | None, tile_px: int, overlap_px: int) -> None:
    assert default_overlap_px(train_patch_px, tile_px) == overlap_px
    assert 2 * overlap_px < tile_px


# Gray, alpha, memory


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_is_restored_as_rgb_and_averaged(dtype: type) -> None:
    model = lively_network(SMALL)
    gray = (photo(60, 70)[..., 1].astype(np.uint32) * (np.iinfo(dtype).max // 255)).astype(dtype)
    restored = restore_image(model, gray, train_patch_px=TRAIN_PATCH_PX)
    assert restored.shape == gray.shape and restored.dtype == dtype
    rgb = restore_image(model, np.dstack([gray] * 3), train_patch_px=TRAIN_PATCH_PX)
    assert np.array_equal(restored, rgb.mean(axis=2).round().astype(dtype))
    assert not np.array_equal(restored, gray)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_put_back(dtype: type) -> None:
    model = lively_network(SMALL)
    rgba = np.dstack([photo(60, 70), photo(60, 70)[..., :1].transpose(0, 1, 2)[::-1]]).astype(dtype)
    before = rgba.copy()
    restored = restore_image(model, rgba, train_patch_px=TRAIN_PATCH_PX)
    assert restored.dtype == dtype and np.array_equal(restored[..., 3], rgba[..., 3])
    colours = np.ascontiguousarray(rgba[..., :3])
    assert np.array_equal(restored[..., :3], restore_image(model, colours, train_patch_px=TRAIN_PATCH_PX))
    assert np.array_equal(rgba, before)


def test_auto_takes_tiles_that_fit_into_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_network(SMALL)
    lq = photo(300, 420)
    small_mib = 2 * 192 * 192 * 4 * SMALL.width * 6 / 2**20
    for free_mib, tile_px in ((1e6, None), (small_mib, 192)):
        monkeypatch.setattr(tiling, "free_memory_mib", lambda device, free_mib=free_mib: free_mib)
        auto = restore_image(model, lq, train_patch_px=TRAIN_PATCH_PX)
        assert np.array_equal(
            auto, restore_image(model, lq, train_patch_px=TRAIN_PATCH_PX, tile_px=tile_px)
        ), tile_px


def test_tiles_are_halved_where_a_gpu_runs_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = lively_network(SMALL)
    lq = photo(500, 700)
    run, tried = tiling._run, []

    def limited(model: NAFNet, patch: np.ndarray, *rest: object) -> torch.Tensor:
        tried.append(max(patch.shape[1:3]))
        if tried[-1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(model, patch, *rest)  # type: ignore[arg-type]

    expected = restore_image(model, lq, train_patch_px=TRAIN_PATCH_PX, tile_px=192)
    monkeypatch.setattr(tiling, "_run", limited)
    restored = restore_image(model, lq, train_patch_px=TRAIN_PATCH_PX, tile_px=None)
    # 700 px whole, tiles of at most 320, then of 192: a multiple of 64 at or below half, not less than 192.
    assert tried[0] == 700 and 200 < tried[1] <= 320 and max(tried[2:]) <= 192
    assert np.array_equal(restored, expected)
    assert "tiles of 192 px" in caplog.text
    tried.clear()
    batched = restore_image(model, lq, train_patch_px=TRAIN_PATCH_PX, tile_px=256, tile_batch=4)
    assert len(tried) == 3 + len(tried[3:]) and tried[2] > 200 >= max(tried[3:])  # 4, 2, 1 of 256, then 192
    assert np.abs(batched.astype(int) - expected).max() <= 1
    monkeypatch.setattr(tiling, "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError):
        restore_image(model, lq, train_patch_px=TRAIN_PATCH_PX, tile_px=None)
