from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nafnet_core import PRESETS, NAFNet, NAFNetConfig, restore_image
from nafnet_core.canvas import tiles
from nafnet_core.local_stats import LocalMean
from nafnet_core.tiling import MAX_TILE_PX, MIN_OVERLAP_PX, default_overlap_px
from tests.nafnet_core.networks import (
    DEEP,
    SMALL,
    assert_network_acts,
    lively_network,
    photo,
    photo_nchw,
    reference_of,
)

TRAIN_PATCH_PX = 32  # A window of 48 px: from within the overlap it sees the tile and no further.


def psnr_db(a: NDArray, b: NDArray) -> float:
    mse = np.mean((a.astype(float) - b) ** 2)
    return math.inf if mse == 0 else 10 * math.log10(np.iinfo(a.dtype).max ** 2 / mse)


def identity_network(config: NAFNetConfig = SMALL) -> NAFNet:
    """Adds nothing to its input: what comes out is what the tiling and rounding did."""
    model = NAFNet(config).eval()
    with torch.no_grad():
        model.ending.weight.zero_()
        model.ending.bias.zero_()
    return model


LIVELY = lively_network(SMALL)

# Whole and tiled


@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["small", "deep"])
@pytest.mark.parametrize(
    ("height", "width", "tile_px"),
    [
        (256, 320, 192),
        (310, 390, 192),  # no tile ends where the image does, and the last ones start off the regular grid
        (211, 333, 200),  # a tile that is no multiple of the stride
        (100, 400, 192),  # one row of tiles
        (400, 100, 192),
    ],
)
def test_tiles_give_the_whole_image(config: NAFNetConfig, height: int, width: int, tile_px: int) -> None:
    model = lively_network(config)
    image = photo(height, width)
    assert_network_acts(model, photo_nchw(height, width))
    whole = restore_image(model, image, train_patch_px=TRAIN_PATCH_PX)
    tiled = restore_image(model, image, train_patch_px=TRAIN_PATCH_PX, tile_px=tile_px)
    assert not np.array_equal(whole, image)
    assert psnr_db(tiled, whole) >= 45
    # A tile that downsamples on another grid than the whole image shows in single pixels first.
    assert np.abs(tiled.astype(int) - whole).max() <= 6


@pytest.mark.parametrize("config", [SMALL, DEEP, PRESETS["mobile"]], ids=["small", "deep", "mobile"])
def test_default_tiles_of_a_large_photo_give_the_whole_image(config: NAFNetConfig) -> None:
    model = lively_network(config)
    image = photo(1100, 1400)
    whole = restore_image(model, image, train_patch_px=256, tile_px=None)
    tiled = restore_image(model, image, train_patch_px=256, tile_px=MAX_TILE_PX)
    assert psnr_db(whole, image) < 30
    assert psnr_db(tiled, whole) >= 50
    step = np.abs(np.diff(tiled.astype(float) - whole, axis=1)).mean(axis=(0, 2))
    overlap_px = default_overlap_px(256, MAX_TILE_PX)
    edges = {
        edge
        for tile in tiles(1100, 1400, MAX_TILE_PX, overlap_px, config.stride_px)
        for edge in (tile.left, tile.left + tile.width)
        if 0 < edge < 1400
    }
    assert len(edges) == 2
    # Over the overlap, where windows are cut, the error swells and ebbs: an edge must not show beside that.
    for edge in edges:
        beside = [*step[edge - 13 : edge - 3], *step[edge + 1 : edge + 11]]
        assert step[edge - 2 : edge + 1].max() <= 1.25 * max(beside)


def test_seams_are_no_worse_than_elsewhere() -> None:
    model = lively_network(SMALL)
    image = photo(256, 448)
    assert_network_acts(model, photo_nchw(256, 448))

    def jumps(train_patch_px: int | None, overlap_px: int) -> tuple[float, float]:
        """Mean step of the error from column to column: at the tiles' edges, and elsewhere."""
        whole = restore_image(model, image, train_patch_px=train_patch_px).astype(float)
        tiled = restore_image(model, image, train_patch_px=train_patch_px, tile_px=192, overlap_px=overlap_px)
        step = np.abs(np.diff(tiled - whole, axis=1)).mean(axis=(0, 2))
        edges = {
            edge
            for tile in tiles(256, 448, 192, overlap_px, SMALL.stride_px)
            for edge in (tile.left, tile.left + tile.width)
            if 0 < edge < 448
        }
        at_edges = np.isin(np.arange(1, 448), sorted(edges))
        return float(step[at_edges].mean()), float(step[~at_edges].mean())

    at_seams, elsewhere = jumps(TRAIN_PATCH_PX, MIN_OVERLAP_PX)
    assert at_seams <= elsewhere + 0.1
    # With global statistics the tiles truly differ by a level; blending must still leave no edge to be seen.
    at_seams, elsewhere = jumps(None, MIN_OVERLAP_PX)
    assert at_seams <= elsewhere + 0.1
    # Without overlap there is one, or this test measures nothing.
    at_seams, elsewhere = jumps(None, 0)
    assert at_seams > elsewhere + 5


def test_without_local_statistics_tiles_differ() -> None:
    # The reason for TLC, and the check that the networks here do react to their statistics.
    model = lively_network(SMALL)
    image = photo(256, 320)
    assert_network_acts(model, photo_nchw(256, 320))

    def agreement(train_patch_px: int | None) -> float:
        whole = restore_image(model, image, train_patch_px=train_patch_px)
        return psnr_db(restore_image(model, image, train_patch_px=train_patch_px, tile_px=192), whole)

    assert agreement(None) < agreement(TRAIN_PATCH_PX) - 5


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    tile_px=st.integers(8, 64),
    overlap_share=st.floats(0, 1),
)
def test_tiling_and_blending_alone_change_nothing(
    height: int, width: int, tile_px: int, overlap_share: float
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    overlap_px = int(overlap_share * ((tile_px - 1) // 2))
    tiled = restore_image(
        identity_network(), image, train_patch_px=16, tile_px=tile_px, overlap_px=overlap_px
    )
    assert np.array_equal(tiled, image)


def test_an_image_that_fits_one_tile_is_run_whole() -> None:
    model = lively_network(SMALL)
    image = photo(100, 120)
    whole = restore_image(model, image, train_patch_px=TRAIN_PATCH_PX)
    assert np.array_equal(restore_image(model, image, train_patch_px=TRAIN_PATCH_PX, tile_px=160), whole)


# Sizes and dtypes


@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["small", "deep"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (37, 3), (17, 16), (50, 70), (127, 129)])
def test_any_size_is_the_references(config: NAFNetConfig, height: int, width: int) -> None:
    model = lively_network(config)
    image = photo(height, width)
    assert_network_acts(model, photo_nchw(64, 64))
    restored = restore_image(model, image, train_patch_px=None)
    bottom, right = -height % config.stride_px, -width % config.stride_px
    # Reflected where there is enough to reflect, else the edge is repeated.
    mode = "reflect" if bottom < height and right < width else "edge"
    padded = np.pad(image.astype(np.float32) / 255, ((0, bottom), (0, right), (0, 0)), mode=mode)
    with torch.no_grad():
        expected = reference_of(model)(torch.from_numpy(padded.transpose(2, 0, 1)[None].copy()))
    expected = expected[0, :, :height, :width].clip(0, 1).numpy().transpose(1, 2, 0) * 255
    assert restored.shape == image.shape and restored.dtype == np.uint8
    # Rounding, of a value that agrees to 1e-5.
    assert np.abs(restored - expected).max() <= 0.51


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    channels=st.sampled_from([None, 3, 4]),
    train_patch_px=st.sampled_from([None, 16, 40]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_size_dtype_and_layout_is_the_references(
    height: int, width: int, dtype: type, channels: int | None, train_patch_px: int | None, seed: int
) -> None:
    white = np.iinfo(dtype).max
    shape = (height, width) if channels is None else (height, width, channels)
    image = np.random.default_rng(seed).integers(0, white + 1, shape, dtype)
    restored = restore_image(LIVELY, image, train_patch_px=train_patch_px)
    assert restored.shape == image.shape and restored.dtype == dtype
    rgb = np.stack([image] * 3, axis=2) if channels is None else image[..., :3]
    bottom, right = -height % SMALL.stride_px, -width % SMALL.stride_px
    mode = "reflect" if bottom < height and right < width else "edge"
    padded = np.pad(rgb.astype(np.float32) / white, ((0, bottom), (0, right), (0, 0)), mode=mode)
    reference = reference_of(LIVELY)
    if train_patch_px is not None:
        reference.localize(train_patch_px)
    with torch.no_grad():
        expected = reference(torch.from_numpy(padded.transpose(2, 0, 1)[None].copy()))
    expected = expected[0, :, :height, :width].clip(0, 1).numpy().transpose(1, 2, 0).astype(float) * white
    tolerance = 0.51 if dtype == np.uint8 else 2
    if channels is None:
        expected = expected.round().mean(axis=2)
        tolerance += 0.17  # one channel of three may be rounded to the other side
    assert np.abs(restored[..., :3] - expected if channels else restored - expected).max() <= tolerance
    if channels == 4:
        assert np.array_equal(restored[..., 3], image[..., 3])


@pytest.mark.parametrize("tile_px", [None, 96])
def test_uint16_is_uint8_with_finer_steps(tile_px: int | None) -> None:
    model = lively_network(SMALL)
    image = photo(120, 130)
    assert_network_acts(model, photo_nchw(120, 130))
    options = {"train_patch_px": TRAIN_PATCH_PX, "tile_px": tile_px, "overlap_px": 32}
    coarse = restore_image(model, image, **options)  # type: ignore[arg-type]
    fine = restore_image(model, image.astype(np.uint16) * 257, **options)  # type: ignore[arg-type]
    assert fine.dtype == np.uint16
    assert np.abs(fine / 257 - coarse).max() <= 0.51
    assert np.unique(fine % 257).size > 200, "only 8-bit levels came out"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_level_survives(dtype: type) -> None:
    levels = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
    image = np.stack([levels, levels[::-1], np.roll(levels, 77)], axis=1).reshape(-1, 256, 3)
    for tile_px in (None, 128):
        restored = restore_image(
            identity_network(), image, train_patch_px=None, tile_px=tile_px, overlap_px=16
        )
        assert np.array_equal(restored, image)


def test_result_is_clipped() -> None:
    model = identity_network()
    with torch.no_grad():
        model.ending.bias.copy_(torch.tensor([2.0, -2.0, 0.0]))
    image = photo(20, 20)
    restored = restore_image(model, image, train_patch_px=None)
    assert (restored[..., 0] == 255).all() and (restored[..., 1] == 0).all()
    assert np.array_equal(restored[..., 2], image[..., 2])


def test_grey_network() -> None:
    config = NAFNetConfig(width=8, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,), img_channel=1)
    model = lively_network(config)
    image = photo(80, 90)[..., :1]
    restored = restore_image(model, image, train_patch_px=16, tile_px=64, overlap_px=24)
    assert restored.shape == (80, 90, 1)
    assert not np.array_equal(restored, image)


@pytest.mark.parametrize("tile_px", [None, 48])
def test_input_may_be_a_view_and_is_not_changed(tile_px: int | None) -> None:
    model = lively_network(SMALL)
    image = photo(60, 70)
    view = image[::-1, ::-1].transpose(1, 0, 2)
    before = image.copy()
    image.setflags(write=False)
    options = {"train_patch_px": 16, "tile_px": tile_px, "overlap_px": 16}
    restored = restore_image(model, view, **options)  # type: ignore[arg-type]
    assert np.array_equal(restored, restore_image(model, view.copy(), **options))  # type: ignore[arg-type]
    assert np.array_equal(image, before)
    restored[0] = 0  # the caller's own, to write to


def test_same_input_gives_the_same_pixels() -> None:
    model = lively_network(SMALL)
    image = photo(100, 150)
    first, again = (
        restore_image(model, image, train_patch_px=16, tile_px=64, overlap_px=16) for _ in range(2)
    )
    assert np.array_equal(first, again)


def test_bf16_is_close_to_fp32() -> None:
    model = lively_network(SMALL)
    image = photo(100, 120)
    assert_network_acts(model, photo_nchw(100, 120))
    full, half = (
        restore_image(model, image, train_patch_px=TRAIN_PATCH_PX, autocast=autocast)
        for autocast in (False, True)
    )
    assert not np.array_equal(full, half), "autocast did nothing"
    assert psnr_db(half, full) > 40


@pytest.mark.parametrize("tile_px", [None, 64])
def test_model_keeps_its_global_statistics(tile_px: int | None) -> None:
    model = lively_network(SMALL)
    restore_image(model, photo(80, 80), train_patch_px=16, tile_px=tile_px, overlap_px=16)
    assert {pool.window_px for pool in model.modules() if isinstance(pool, LocalMean)} == {None}


# Misuse


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 0), np.uint8),
        np.zeros((8, 8, 5), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 0, 3), np.uint8),
    ],
    ids=lambda image: "x".join(map(str, image.shape)),
)
def test_wrong_shape_is_refused(image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) or \(H, W\)"):
        restore_image(NAFNet(SMALL), image, train_patch_px=None)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.bool_, np.uint32])
def test_wrong_dtype_is_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match="uint8 or uint16"):
        restore_image(NAFNet(SMALL), np.zeros((8, 8, 3), dtype), train_patch_px=None)


@pytest.mark.parametrize("overlap_px", [-1, 32, 33, 64, 500])
def test_overlap_that_is_not_below_half_a_tile_is_refused(overlap_px: int) -> None:
    with pytest.raises(ValueError, match=f"overlap {overlap_px} px"):
        restore_image(NAFNet(SMALL), photo(80, 80), train_patch_px=None, tile_px=64, overlap_px=overlap_px)


def test_tile_below_the_networks_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="stride, 16 px"):
        restore_image(NAFNet(DEEP), photo(80, 80), train_patch_px=None, tile_px=20, overlap_px=8)


@pytest.mark.parametrize("options", [{"train_patch_px": 0}, {"train_patch_px": -1}, {"tile_px": 0}])
def test_sides_below_one_are_refused(options: dict[str, int]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        restore_image(NAFNet(SMALL), photo(80, 80), **{"train_patch_px": 16, **options})


def test_statistics_come_back_after_a_refusal() -> None:
    model = NAFNet(SMALL)
    with pytest.raises(ValueError, match="overlap"):
        restore_image(model, photo(80, 80), train_patch_px=16, tile_px=64, overlap_px=64)
    assert {pool.window_px for pool in model.modules() if isinstance(pool, LocalMean)} == {None}
