"""Blur of parts: as if cut from the whole image, wherever the part lies."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nafnet_core.blur import (
    BlurKind,
    Degradation,
    Exposure,
    degrade,
    from_linear,
    to_linear,
)
from nafnet_core.kernels import Kernel, centred, gaussian_kernel, gaussian_taps, shake_kernel, shake_path
from nafnet_core.optics import Blur, LinearImage, UniformBlur, VaryingBlur, Window
from nafnet_core.transforms import Box
from tests.nafnet_core.networks import photo
from tests.nafnet_core.test_blur import KINDS, blur_only, linear, psnr_db
from tests.nafnet_core.test_kernels import HOOK, centre_of_mass

ALL_KINDS = [*KINDS, "measured"]


def whole(blur: Blur, image: LinearImage) -> LinearImage:
    height, width = image.shape[:2]
    box = (0, 0, height, width)
    return blur.of(Window(size=(height, width), box=box, linear=image), box)


def varying(path: NDArray[np.complex128], roll_rad: NDArray[np.float64]) -> VaryingBlur:
    return VaryingBlur(path - path.mean(), roll_rad - roll_rad.mean())


def cut(image: NDArray, box: Box) -> NDArray:
    top, left, height, width = box
    return image[top : top + height, left : left + width]


# Parts


def part_of(image: NDArray[np.uint8], part: Box, degradation: Degradation, seed: int) -> NDArray[np.uint8]:
    """One part, made of no more of the sharp image than it needs."""
    rng = np.random.default_rng(seed)
    exposure = Exposure.drawn(degradation, image.shape[:2], rng, measured_kernels=[centred(HOOK)])
    return exposure.part(np.ascontiguousarray(cut(image, exposure.needed(part))), part, rng)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(ALL_KINDS),
    size_px=st.floats(0, 20),
    jpeg_quality=st.none() | st.integers(30, 95),
    seed=st.integers(0, 2**32),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_a_part_is_cut_from_the_blurred_whole(
    kind: BlurKind, size_px: float, jpeg_quality: int | None, seed: int, shares: tuple[float, ...]
) -> None:
    image = photo(90, 140)
    degradation = Degradation(
        kind=kind, size_px=size_px, shot_noise=0, read_noise=0, highlight_gain=1.7, jpeg_quality=jpeg_quality
    )
    height, width = 1 + int(shares[0] * 89), 1 + int(shares[1] * 139)
    part = (int(shares[2] * (90 - height)), int(shares[3] * (140 - width)), height, width)
    found = part_of(image, part, degradation, seed)
    rng = np.random.default_rng(seed)
    expected = cut(degrade(image, degradation, rng, measured_kernels=[centred(HOOK)]), part)
    assert found.shape == expected.shape and np.array_equal(found, expected)


def test_a_part_of_a_very_large_blur_is_the_wholes_to_a_level() -> None:
    image, part, degradation = photo(160, 200), (50, 70, 60, 40), blur_only("defocus", 60.0)
    found = part_of(image, part, degradation, 0)
    expected = cut(degrade(image, degradation, np.random.default_rng(0)), part)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_without_what_lies_around_a_part_its_edges_differ(kind: BlurKind) -> None:
    image, part = photo(160, 160), (40, 50, 64, 64)
    degradation = blur_only(kind, 3.0 if kind == "gaussian" else 12.0)
    alone = np.ascontiguousarray(cut(image, part))
    rng = np.random.default_rng(3)
    alone = degrade(alone, degradation, rng, measured_kernels=[centred(HOOK)])
    found = part_of(image, part, degradation, 3)
    difference = np.abs(found.astype(int) - alone)
    assert difference[:2].max() > 8
    if kind != "varying":  # which turns about the centre of what it is given
        assert difference[20:44, 20:44].max() == 0


def test_no_more_is_needed_than_the_kernel_reaches() -> None:
    exposure = Exposure.drawn(blur_only("gaussian", 2.0), (200, 300), np.random.default_rng(0))
    assert exposure.needed((50, 60, 20, 30)) == (44, 54, 32, 42)
    assert exposure.needed((0, 290, 20, 10)) == (0, 284, 26, 16)
    assert exposure.needed((0, 0, 200, 300)) == (0, 0, 200, 300)
    # Compressed, a part lies in whole blocks of the image's own grid.
    packed = Degradation(
        kind="gaussian", size_px=2.0, shot_noise=0, read_noise=0, highlight_gain=1, jpeg_quality=70
    )
    exposure = Exposure.drawn(packed, (200, 300), np.random.default_rng(0))
    assert exposure.needed((50, 60, 20, 30)) == (48 - 6, 48 - 6, 32 + 12, 48 + 12)


@pytest.mark.parametrize("roll_share", [0.3, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_a_varying_blur_reaches_no_further_than_it_says(seed: int, roll_share: float) -> None:
    rng, size = np.random.default_rng(seed), (90, 140)
    roll_rad = shake_path(rng, 30 * roll_share).real / (np.hypot(*size) / 2)
    blur = varying(shake_path(rng, 30 * (1 - roll_share)), roll_rad)
    for y, x in ((0, 0), (89, 139), (0, 139), (45, 70)):
        point = np.zeros((*size, 3), np.float32)
        point[y, x] = 1
        rows, cols = np.nonzero(whole(blur, point)[..., 0])
        assert max(np.abs(rows - y).max(), np.abs(cols - x).max()) <= blur.reach_px(size)


def test_noise_of_a_part_is_as_strong_as_that_of_the_whole() -> None:
    image = np.full((200, 200, 3), 120, np.uint8)
    degradation = Degradation(
        kind="gaussian", size_px=1.0, shot_noise=5e-4, read_noise=0.005, highlight_gain=1
    )
    found = part_of(image, (20, 30, 100, 100), degradation, 0)
    expected = degrade(image, degradation, np.random.default_rng(0))
    assert found.std() == pytest.approx(expected.std(), rel=0.03) and found.std() > 1


# Convolution


@pytest.mark.parametrize("side", [1, 3, 11, 13, 31, 45])
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_convolution_against_one_in_double_precision(side: int, share: float) -> None:
    rng = np.random.default_rng(side)
    kernel = rng.random((side, side)) * (rng.random((side, side)) < share)
    kernel[side // 2, side // 2] = 1
    kernel = (kernel / kernel.sum()).astype(np.float32)
    image = to_linear(photo(40, 50))
    padded = np.pad(image.astype(np.float64), [(side // 2, side // 2)] * 2 + [(0, 0)], mode="reflect")
    expected = np.zeros(image.shape)
    for (row, col), weight in np.ndenumerate(kernel):
        expected += padded[side - 1 - row :, side - 1 - col :][:40, :50] * weight
    assert np.abs(whole(UniformBlur(kernel), image) - expected).max() < 1e-6


@pytest.mark.parametrize("sigma_px", [0.0, 0.4, 1.0, 5.0])
def test_taps_of_a_gaussian_are_its_kernel(sigma_px: float) -> None:
    taps, kernel, image = gaussian_taps(sigma_px), gaussian_kernel(sigma_px), to_linear(photo(40, 50))
    assert taps.shape == (len(kernel),) and taps.dtype == np.float32
    assert np.abs(np.outer(taps, taps) - kernel).max() < 1e-7
    difference = whole(UniformBlur(taps), image) - whole(UniformBlur(kernel), image)
    assert np.abs(difference).max() < 1e-6


@pytest.mark.parametrize("kernel", [gaussian_kernel(6.0), shake_kernel(np.random.default_rng(0), 60.0)])
def test_no_light_is_negative(kernel: Kernel) -> None:
    # Above a number of taps through a Fourier transform, which rounds below 0.
    image = np.zeros((80, 80, 3), np.float32)
    image[20:30, 20:60] = 1.0
    assert whole(UniformBlur(kernel), image).min() >= 0


# Blur that varies over the image


def test_without_roll_the_blur_is_the_same_everywhere() -> None:
    image = photo(90, 130)
    path = shake_path(np.random.default_rng(3), 14.0)
    expected = degrade(image, blur_only("shake", 14.0), np.random.default_rng(3))
    found = from_linear(whole(varying(path, np.zeros(len(path))), to_linear(image)))
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("roll", [0.04, 0.12])
def test_roll_is_the_mean_of_turned_images(roll: float) -> None:
    image = to_linear(photo(200, 260))
    steps = np.linspace(-1, 1, 129)
    path, roll_rad = 4 * steps + 2j * steps**2, roll * steps
    path = path - path.mean()
    height, width = image.shape[:2]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    expected = np.zeros_like(image)
    for shift, angle in zip(path, roll_rad, strict=True):
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        offset = centre - turn @ centre + [shift.real, shift.imag]
        matrix = np.column_stack([turn, offset])
        expected += cv2.warpAffine(
            image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        ) / len(path)
    found = from_linear(whole(varying(path, roll_rad), image))
    inner = (slice(20, -20), slice(20, -20))
    uniform = from_linear(whole(varying(path, 0 * roll_rad), image))
    assert psnr_db(found[inner], from_linear(expected)[inner]) > 38
    assert psnr_db(uniform[inner], from_linear(expected)[inner]) < 33


def test_varying_blur_is_strongest_away_from_the_centre_and_moves_nothing() -> None:
    image = np.zeros((241, 321, 3), dtype=np.uint8)
    spots = {"centre": (120, 160), "edge": (120, 300), "corner": (20, 20)}
    for y, x in spots.values():
        image[y - 1 : y + 2, x - 1 : x + 2] = 255
    roll_rad = np.linspace(-0.05, 0.05, 101)
    result = linear(from_linear(whole(varying(np.zeros(101, complex), roll_rad), to_linear(image)))[..., 0])
    spreads = {}
    for name, (y, x) in spots.items():
        around = result[y - 20 : y + 21, x - 20 : x + 21]
        assert centre_of_mass(around) == pytest.approx((0, 0), abs=0.35)
        rows, cols = np.nonzero(around > 0.02)
        spreads[name] = (np.ptp(rows), np.ptp(cols))
    assert max(spreads["centre"]) <= 4
    # On the right the turn is up and down: 140 px times 0.1 rad.
    assert 12 <= spreads["edge"][0] <= 18 and spreads["edge"][1] <= 6
    assert min(spreads["corner"]) >= 8
