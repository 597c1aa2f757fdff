from __future__ import annotations

import cv2
import numpy as np
import pytest

from nafnet_core.colour import colour_shift, with_colours_of
from nafnet_core.enlarging import add_enlarged
from nafnet_core.reduced import merged, reduced
from tests.nafnet_core.networks import photo


@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_CUBIC])
@pytest.mark.parametrize(
    ("size", "small"), [((700, 4300), (175, 1075)), ((37, 41), (3, 5)), ((9, 9), (1, 1))]
)
def test_blocks_are_opencvs_enlargement(
    size: tuple[int, int], small: tuple[int, int], interpolation: int
) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 2**16, (*size, 3), dtype=np.uint16)
    addend = rng.normal(0, 9000, (*small, 3)).astype(np.float32)
    expected = image + cv2.resize(addend, size[::-1], interpolation=interpolation)
    expected = np.rint(expected.clip(0, 65535))
    # `remap` knows positions to a 32nd of a pixel of the small map.
    difference = np.abs(add_enlarged(image, addend, interpolation=interpolation) - expected)
    assert np.quantile(difference, 0.99) < 9000 * 0.1 and difference.mean() < 9000 * 0.02


def test_a_panorama_is_wider_than_opencv_allows() -> None:
    image = np.full((3, 40_000, 3), 100, np.uint8)
    addend = np.linspace(0, 100, 20_000, dtype=np.float32)[None, :, None].repeat(3, axis=2)
    result = add_enlarged(image, addend, interpolation=cv2.INTER_LINEAR)
    ramp = np.linspace(100, 200, 40_000)
    assert np.abs(result.astype(float) - ramp[None, :, None]).max() <= 1


def test_colour_shift_is_in_levels_of_8_bit() -> None:
    lq = photo(40, 60)
    warmer = np.clip(lq.astype(int) + np.array([3, 0, -2]), 0, 255)
    lq, warmer = np.clip(lq, 3, 250), np.clip(lq, 3, 250) + np.array([3, 0, -2])
    assert colour_shift(lq, warmer.astype(np.uint8)) == pytest.approx((3, 0, -2))
    deep = colour_shift(lq.astype(np.uint16) * 257, warmer.astype(np.uint16) * 257)
    assert deep == pytest.approx((3, 0, -2))


def test_colours_come_back_and_detail_stays() -> None:
    lq = cv2.GaussianBlur(photo(480, 640), (0, 0), 3).clip(30, 220)
    sharp = photo(480, 640).clip(30, 220)
    sharp = np.rint(sharp + (lq.mean((0, 1)) - sharp.mean((0, 1)))).astype(np.uint8)
    strayed = (sharp.astype(int) + np.array([12, -4, -9])).clip(0, 255).astype(np.uint8)
    kept = with_colours_of(lq, strayed)
    assert max(map(abs, colour_shift(lq, strayed))) > 8
    assert max(map(abs, colour_shift(lq, kept))) < 0.5
    assert np.abs(kept.astype(int) - sharp).mean() < 2.5, "and the detail with them"


def test_a_sound_output_is_left_alone() -> None:
    lq = photo(300, 200)
    assert np.array_equal(with_colours_of(lq, lq), lq)
    tiny = photo(1, 3)
    assert np.array_equal(with_colours_of(tiny, tiny), tiny)


def test_gain_of_the_small_image_is_added() -> None:
    sharp = photo(240, 360)
    lq = cv2.GaussianBlur(sharp, (0, 0), 6)
    small = reduced(lq, 0.5)
    assert small.shape == (120, 180, 3)
    restored = merged(lq, small, reduced(sharp, 0.5))  # an ideal network
    error, before = (np.abs(image.astype(int) - sharp).mean() for image in (restored, lq))
    assert error < 0.6 * before
    assert np.array_equal(merged(lq, small, small), lq), "no gain, no change"
    deep = merged(lq.astype(np.uint16) * 257, small.astype(np.uint16) * 257, small.astype(np.uint16) * 257)
    assert np.array_equal(deep, lq.astype(np.uint16) * 257)
