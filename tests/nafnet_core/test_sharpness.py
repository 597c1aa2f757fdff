"""Sharpness against scikit-image, and the strength of a blur on images where it is known."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import data
from skimage.measure import blur_effect

from nafnet_core.sharpness import detail_lost, luma, sharpness


def _photo(name: str = "astronaut", height: int = 200, width: int = 301) -> NDArray[np.uint8]:
    return luma(np.ascontiguousarray(getattr(data, name)()[:height, :width]))


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
@pytest.mark.parametrize("sigma", [0.0, 0.8, 2.5])
def test_sharpness_is_one_minus_the_blur_effect(name: str, sigma: float) -> None:
    image = _photo(name)
    image = image if not sigma else cv2.GaussianBlur(image, (0, 0), sigma)
    assert sharpness(image) == pytest.approx(1 - blur_effect(image), abs=1e-9)


def test_the_worse_direction_counts() -> None:
    image = _photo()
    shaken = cv2.blur(image, (15, 1))
    assert sharpness(shaken) == pytest.approx(1 - blur_effect(shaken), abs=1e-9)
    assert sharpness(shaken) == pytest.approx(sharpness(np.ascontiguousarray(shaken.T)), abs=1e-12)
    assert sharpness(shaken) < 0.6 * sharpness(image)


@pytest.mark.parametrize("shape", [(4, 4), (5, 40), (13, 11)])
def test_small_images_have_a_sharpness(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert sharpness(image) == pytest.approx(1 - blur_effect(image), abs=1e-9)


def test_without_an_edge_there_is_none() -> None:
    assert math.isnan(sharpness(np.full((20, 20), 7, np.uint8)))
    assert math.isnan(sharpness(np.zeros((3, 3), np.uint8)))
    assert math.isnan(detail_lost(np.zeros((20, 20), np.uint8), np.full((20, 20), 7, np.uint8)))


def test_detail_lost_of_a_wave_is_how_much_weaker_it_is() -> None:
    wave = np.sin(np.arange(400) / 3) * np.ones((100, 1))
    strong, weak = ((128 + 100 * share * wave).round().astype(np.uint8) for share in (1, 0.35))
    assert detail_lost(weak, strong) == pytest.approx(0.65, abs=0.01)
    assert detail_lost(strong, strong) == 0
    assert detail_lost(strong, weak) < -1


def test_detail_lost_tells_strength_and_not_contrast_or_place() -> None:
    sharp = _photo()
    losses = [detail_lost(cv2.GaussianBlur(sharp, (0, 0), sigma), sharp) for sigma in (0.5, 1, 2, 4)]
    assert losses == sorted(losses) and 0 < losses[0] < losses[-1] < 1
    blurred = cv2.GaussianBlur(sharp, (0, 0), 2)
    pale = [(image * 0.4 + 60).round().astype(np.uint8) for image in (blurred, sharp)]
    assert detail_lost(*pale) == pytest.approx(losses[2], abs=0.02)
    assert detail_lost(blurred[:, 3:-5], sharp[:, 8:]) == pytest.approx(losses[2], abs=0.02)


def test_detail_lost_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="one size"):
        detail_lost(np.zeros((3, 4), np.uint8), np.zeros((4, 3), np.uint8))


def test_the_number_of_threads_changes_nothing() -> None:
    image, found = _photo(height=512, width=512), set()
    before = cv2.getNumThreads()
    try:
        for number in (1, 2, 5):
            cv2.setNumThreads(number)
            found.add((sharpness(image), detail_lost(cv2.blur(image, (3, 3)), image)))
    finally:
        cv2.setNumThreads(before)
    assert len(found) == 1
