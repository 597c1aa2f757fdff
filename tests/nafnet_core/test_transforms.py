from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nafnet_core.transforms import channel_order, crop, crop_corners, cutblur, dihedral, dihedral_into

VARIANTS = range(8)


def marked() -> np.ndarray:
    """No two pixels alike, so that no two different moves look the same."""
    return np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


# Flips and quarter turns


def test_the_eight_variants_differ_and_zero_changes_nothing() -> None:
    image = marked()
    assert np.array_equal(dihedral(image, 0), image)
    assert len({dihedral(image, variant).tobytes() for variant in VARIANTS}) == 8


def test_variants_are_flips_and_a_transpose() -> None:
    image = marked()
    assert np.array_equal(dihedral(image, 1), np.fliplr(image))
    assert np.array_equal(dihedral(image, 2), np.flipud(image))
    assert np.array_equal(dihedral(image, 3), np.rot90(image, 2))
    assert np.array_equal(dihedral(image, 4), np.swapaxes(image, 0, 1))
    # Flips come first, the transpose last.
    assert np.array_equal(dihedral(image, 5), np.swapaxes(np.fliplr(image), 0, 1))


def test_variants_include_every_quarter_turn() -> None:
    image = marked()
    moved = {dihedral(image, variant).tobytes() for variant in VARIANTS}
    assert {np.rot90(image, turns).tobytes() for turns in range(4)} <= moved


def test_variants_are_a_group() -> None:
    image = marked()
    name = {dihedral(image, variant).tobytes(): variant for variant in VARIANTS}
    table = [[name[dihedral(dihedral(image, a), b).tobytes()] for b in VARIANTS] for a in VARIANTS]
    # Each row and column holds every variant: each has exactly one inverse.
    for a in VARIANTS:
        assert sorted(table[a]) == list(VARIANTS)
        assert sorted(row[a] for row in table) == list(VARIANTS)
    # Turning is not flipping: the group is not commutative.
    assert any(table[a][b] != table[b][a] for a in VARIANTS for b in VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_stay_together(variant: int) -> None:
    image = marked()
    pixels = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
    assert {tuple(pixel) for pixel in dihedral(image, variant).reshape(-1, 3).tolist()} == pixels


@pytest.mark.parametrize("variant", VARIANTS)
def test_oblong_images_are_transposed_too(variant: int) -> None:
    image = np.zeros((2, 5, 3), dtype=np.uint8)
    assert dihedral(image, variant).shape == ((5, 2, 3) if variant & 4 else (2, 5, 3))


# Colour and CutBlur


def test_the_six_orders_of_the_channels_differ_and_zero_changes_nothing() -> None:
    image = marked()
    orders = [channel_order(image, variant) for variant in range(6)]
    assert np.array_equal(orders[0], image)
    assert len({order.tobytes() for order in orders}) == 6
    for order in orders:
        assert np.array_equal(np.sort(order, axis=2), image)  # `marked` rises over the channels
    assert np.array_equal(orders[5], image[..., ::-1])


def test_cutblur_takes_each_pixel_from_one_of_the_two() -> None:
    lq, gt = marked(), marked() + 100
    before = lq.copy()
    mixed = cutblur(lq, gt, (1, 0, 2, 3), sharp_inside=True)
    inside = np.zeros((4, 4), bool)
    inside[1:3, 0:3] = True
    assert np.array_equal(mixed[inside], gt[inside]) and np.array_equal(mixed[~inside], lq[~inside])
    mixed = cutblur(lq, gt, (1, 0, 2, 3), sharp_inside=False)
    assert np.array_equal(mixed[inside], lq[inside]) and np.array_equal(mixed[~inside], gt[~inside])
    assert np.array_equal(lq, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transforms_are_views(variant: int) -> None:
    # Readers move thousands of patches a second; a copy would be made once, when the batch is put together.
    image = marked()
    assert np.shares_memory(dihedral(image, variant), image)
    assert np.shares_memory(crop(image, 1, 1, 2), image)


# Crops


def test_crop_is_the_square_at_the_corner() -> None:
    image = np.arange(6 * 8 * 3).reshape(6, 8, 3).astype(np.uint8)
    assert np.array_equal(crop(image, 1, 3, 2), image[[1, 2]][:, [3, 4]])
    assert crop(image, 0, 0, 6).shape == (6, 6, 3)


@pytest.mark.parametrize(
    ("length_px", "crop_px", "stride_px", "min_remainder_px", "expected"),
    [
        (1280, 512, 256, 0, [0, 256, 512, 768]),  # GoPro's width: nothing remains
        (720, 512, 256, 0, [0, 208]),  # and its height: 208 px remain
        (720, 512, 256, 208, [0]),  # a remainder up to the limit is dropped,
        (720, 512, 256, 207, [0, 208]),  # one above it is not
        (512, 512, 256, 0, [0]),
        (513, 512, 256, 0, [0, 1]),
        (10, 4, 3, 0, [0, 3, 6]),
        (11, 4, 3, 0, [0, 3, 6, 7]),
        (10, 4, 4, 0, [0, 4, 6]),
        (1, 1, 1, 0, [0]),
    ],
)
def test_crop_corners_by_hand(
    length_px: int, crop_px: int, stride_px: int, min_remainder_px: int, expected: list[int]
) -> None:
    assert crop_corners(length_px, crop_px, stride_px, min_remainder_px) == expected


@given(
    crop_px=st.integers(1, 60),
    surplus_px=st.integers(0, 200),
    stride_share=st.floats(0, 1),
    min_remainder_px=st.integers(0, 40),
)
def test_crops_cover_the_axis(
    crop_px: int, surplus_px: int, stride_share: float, min_remainder_px: int
) -> None:
    stride_px = max(1, round(stride_share * crop_px))
    length_px = crop_px + surplus_px
    starts = crop_corners(length_px, crop_px, stride_px, min_remainder_px)
    assert starts == sorted(set(starts))
    covered = {position for start in starts for position in range(start, start + crop_px)}
    assert covered <= set(range(length_px))
    uncovered = set(range(length_px)) - covered
    assert len(uncovered) <= min_remainder_px
    # Only the end may be left out: a hole in the middle would be a bug.
    assert not uncovered or min(uncovered) > max(covered)


@pytest.mark.parametrize("variant", range(8))
def test_dihedral_into_writes_what_dihedral_shows(variant: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    image.flags.writeable = False  # as a memory map is
    window, out = image[5:37, 9:41], np.zeros((2, 32, 32, 3), np.uint8)
    dihedral_into(out[1], window, variant)
    assert np.array_equal(out[1], dihedral(window, variant)) and not out[0].any()
