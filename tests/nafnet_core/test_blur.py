from __future__ import annotations

import dataclasses
import io
import json
import math

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nafnet_core.blur import (
    GAMMA,
    BlurKind,
    Degradation,
    _normal,
    average_frames,
    degrade,
    draw_degradation,
    sample_rng,
)
from nafnet_core.kernels import centred, gaussian_kernel, shake_kernel
from tests.nafnet_core.networks import photo
from tests.nafnet_core.test_kernels import HOOK, centre_of_mass

KINDS: list[BlurKind] = ["shake", "varying", "defocus", "gaussian"]


def blur_only(kind: BlurKind, size_px: float) -> Degradation:
    return Degradation(kind=kind, size_px=size_px, shot_noise=0.0, read_noise=0.0, highlight_gain=1.0)


def linear(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return (image / 255.0) ** GAMMA


def psnr_db(a: NDArray, b: NDArray) -> float:
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_measured_blur_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="needs kernels"):
        degrade(photo(8, 8), blur_only("measured", 5.0), np.random.default_rng(0))


def test_measured_blur_chooses_among_the_kernels() -> None:
    image = photo(40, 40)
    kernels = [gaussian_kernel(sigma) for sigma in (0.5, 2.0)]
    results = {
        degrade(
            image, blur_only("measured", 1.0), np.random.default_rng(seed), measured_kernels=kernels
        ).tobytes()
        for seed in range(12)
    }
    assert len(results) == 2


# The degraded image


@pytest.mark.parametrize("kind", [*KINDS, "measured"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (33, 17), (5, 7), (1, 1), (1, 40), (2, 40), (40, 3)])
def test_shape_and_dtype_are_kept(kind: BlurKind, height: int, width: int) -> None:
    # Far smaller than the kernel, too.
    image = photo(height, width)
    before = image.copy()
    degradation = Degradation(kind=kind, size_px=12.0, shot_noise=1e-3, read_noise=0.01, highlight_gain=1.5)
    result = degrade(image, degradation, np.random.default_rng(0), measured_kernels=[centred(HOOK)])
    assert result.shape == image.shape and result.dtype == np.uint8
    assert np.array_equal(image, before), "the sharp image was changed"


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_the_same_pixels(kind: BlurKind) -> None:
    degradation = Degradation(kind=kind, size_px=6.0, shot_noise=1e-3, read_noise=0.01, highlight_gain=1.5)
    image = photo(48, 64)
    first, again, other = (degrade(image, degradation, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_larger_blur_is_further_from_the_sharp_image(kind: BlurKind) -> None:
    image = photo(128, 128)
    scores = [
        psnr_db(degrade(image, blur_only(kind, size_px), np.random.default_rng(5)), image)
        for size_px in (1.5, 4.0, 10.0, 24.0)
    ]
    assert all(later < earlier - 0.5 for earlier, later in zip(scores, scores[1:], strict=False)), scores


@pytest.mark.parametrize("kind", KINDS)
def test_blur_of_no_size_is_nearly_the_identity(kind: BlurKind) -> None:
    image = photo(64, 64)
    result = degrade(image, blur_only(kind, 0.0), np.random.default_rng(0))
    assert np.abs(result.astype(int) - image).max() <= 1


@pytest.mark.parametrize("level", [0, 1, 40, 200, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_flat_image_stays_flat_to_its_edges(kind: BlurKind, level: int) -> None:
    image = np.full((40, 50, 3), level, dtype=np.uint8)
    result = degrade(image, blur_only(kind, 15.0), np.random.default_rng(0))
    assert np.abs(result.astype(int) - level).max() <= 1


@pytest.mark.parametrize("kernel_of", ["hook", "shake"])
def test_a_point_of_light_becomes_the_kernel(kernel_of: str) -> None:
    # A convolution, in linear light, and not a correlation: the kernel appears as it is, not turned about.
    seed, size_px = 5, 20.0
    if kernel_of == "hook":
        kernel, degradation = centred(HOOK), blur_only("measured", 1.0)
    else:
        kernel, degradation = shake_kernel(np.random.default_rng(seed), size_px), blur_only("shake", size_px)
    half = kernel.shape[0] // 2
    image = np.zeros((2 * half + 31, 2 * half + 41, 3), dtype=np.uint8)
    y, x = half + 15, half + 12
    image[y, x] = 255
    result = degrade(image, degradation, np.random.default_rng(seed), measured_kernels=[kernel])
    patch = result[y - half : y + half + 1, x - half : x + half + 1].astype(int)
    for channel in range(3):
        assert np.abs(patch[..., channel] - 255 * kernel ** (1 / GAMMA)).max() <= 1
        turned = kernel[::-1, ::-1]
        assert np.abs(patch[..., channel] - 255 * turned ** (1 / GAMMA)).max() > 20
    result[y - half : y + half + 1, x - half : x + half + 1] = 0
    assert result.max() <= 1, "light outside the kernel"


@pytest.mark.parametrize("size_px", [4.0, 25.0])
def test_blur_moves_nothing_and_keeps_the_light(size_px: float) -> None:
    # Pairs must stay aligned: a bright spot's centre and its linear energy are those of the sharp image.
    image = np.zeros((121, 121, 3), dtype=np.uint8)
    image[56:65, 56:65] = 200
    for seed in range(5):
        result = linear(degrade(image, blur_only("shake", size_px), np.random.default_rng(seed))[..., 0])
        assert centre_of_mass(result) == pytest.approx((0, 0), abs=0.05)
        assert result.sum() == pytest.approx(linear(image[..., 0]).sum(), rel=0.03)


def test_channels_are_blurred_alike_and_apart() -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[30:34, 30:34, 1] = 255
    result = degrade(image, blur_only("gaussian", 2.0), np.random.default_rng(0))
    assert result[..., [0, 2]].max() == 0
    assert result[..., 1].max() > 0


def test_highlights_smear_further_with_gain() -> None:
    image = np.full((64, 64, 3), 30, dtype=np.uint8)
    image[28:36, 28:36] = 255
    plain = blur_only("gaussian", 4.0)
    bright = Degradation(kind="gaussian", size_px=4.0, shot_noise=0, read_noise=0, highlight_gain=2.0)
    dim, streak = (linear(degrade(image, d, np.random.default_rng(0))) for d in (plain, bright))
    assert streak.sum() > 1.2 * dim.sum()
    # A saturated channel alone is a colour, not a clipped highlight.
    image[..., 2] = 30
    assert np.array_equal(
        degrade(image, plain, np.random.default_rng(0)), degrade(image, bright, np.random.default_rng(0))
    )


@pytest.mark.parametrize(("shot_noise", "read_noise"), [(0.0, 0.01), (1e-3, 0.0), (5e-4, 0.005)])
@pytest.mark.parametrize("level", [90, 180])
def test_noise_has_the_spread_asked_for_in_linear_light(
    level: int, shot_noise: float, read_noise: float
) -> None:
    image = np.full((150, 150, 3), level, dtype=np.uint8)
    degradation = Degradation(
        kind="gaussian", size_px=0.5, shot_noise=shot_noise, read_noise=read_noise, highlight_gain=1.0
    )
    noise = linear(degrade(image, degradation, np.random.default_rng(0))) - linear(image)
    expected = math.sqrt(shot_noise * linear(image).mean() + read_noise**2)
    assert noise.std() == pytest.approx(expected, rel=0.05)
    assert abs(noise.mean()) < expected / 20
    # White: neighbouring pixels know nothing of each other.
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.02


def test_noise_is_normal() -> None:
    numbers = _normal(sample_rng(0, 0), (1000, 1000))
    assert numbers.dtype == np.float32 and abs(numbers.mean()) < 4e-3
    for sigma in (0.5, 1, 2, 3):
        expected = math.erfc(sigma / math.sqrt(2))
        # Four standard deviations of a share of a million draws.
        assert (np.abs(numbers) > sigma).mean() == pytest.approx(expected, abs=4e-3 * math.sqrt(expected))
    assert numbers.std() == pytest.approx(1, abs=3e-3) and 4 < np.abs(numbers).max() < 4.5


# Drawing the parameters


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_drawn_degradation_is_in_range_and_from_the_seed(seed: int) -> None:
    def drawn() -> Degradation:
        return draw_degradation(
            np.random.default_rng(seed),
            kinds=["shake", "defocus", "gaussian", "measured"],
            min_size_px=6.0,
            max_size_px=30.0,
            max_noise=0.02,
        )

    degradation = drawn()
    assert degradation == drawn()
    share = {"shake": 1, "measured": 1, "defocus": 2, "gaussian": 6}[degradation.kind]
    assert 6.0 - 1e-9 <= degradation.size_px * share <= 30.0 + 1e-9
    assert 0 <= degradation.shot_noise <= 0.002
    assert 0 <= degradation.read_noise <= 0.02
    assert 1 <= degradation.highlight_gain <= 2


def test_every_kind_is_drawn_and_equally_often() -> None:
    rng = np.random.default_rng(0)
    drawn = [
        draw_degradation(rng, kinds=KINDS, min_size_px=1, max_size_px=2, max_noise=0).kind for _ in range(800)
    ]
    assert {kind: drawn.count(kind) for kind in KINDS} == pytest.approx(dict.fromkeys(KINDS, 200), abs=45)


def test_no_noise_means_none() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        degradation = draw_degradation(rng, kinds=["shake"], min_size_px=3, max_size_px=9, max_noise=0)
        assert degradation.shot_noise == degradation.read_noise == 0


def test_degradation_is_written_as_plain_values() -> None:
    degradation = draw_degradation(
        np.random.default_rng(0), kinds=KINDS, min_size_px=1, max_size_px=9, max_noise=0.01
    )
    assert Degradation(**json.loads(json.dumps(degradation.to_dict()))) == degradation


# Frames, compression, and seeds


def test_frames_are_averaged_in_linear_light() -> None:
    dark, bright = (np.full((4, 5, 3), level, np.uint8) for level in (0, 255))
    assert np.all(average_frames([dark, bright]) == round(255 * 0.5 ** (1 / GAMMA)))  # 186, not 128
    frames = [photo(40, 60 + shift)[:, shift:] for shift in range(7)]
    expected = 255 * np.mean([linear(frame) for frame in frames], axis=0) ** (1 / GAMMA)
    blurred = average_frames(iter(frames))
    assert np.abs(blurred - expected).max() <= 0.51
    assert np.array_equal(average_frames([frames[3]]), frames[3])
    noise = Degradation(kind="shake", size_px=9.0, shot_noise=1e-4, read_noise=0.01, highlight_gain=1.0)
    noisy = average_frames(frames, noise, np.random.default_rng(0))
    assert 1 < np.abs(noisy.astype(int) - blurred).mean() < 20


def test_frames_that_cannot_be_averaged_are_refused() -> None:
    with pytest.raises(ValueError, match="no frames"):
        average_frames([])
    with pytest.raises(ValueError, match="several sizes"):
        average_frames([photo(8, 8), photo(8, 9)])
    with pytest.raises(ValueError, match="go together"):
        average_frames([photo(8, 8)], blur_only("shake", 1.0))


def test_jpeg_is_the_files_last_step() -> None:
    image = photo(64, 80)
    plain = degrade(image, blur_only("gaussian", 1.0), np.random.default_rng(0))
    scores = []
    for quality in (95, 60, 20):
        degradation = dataclasses.replace(blur_only("gaussian", 1.0), jpeg_quality=quality)
        found = degrade(image, degradation, np.random.default_rng(0))
        buffer = io.BytesIO(cv2.imencode(".jpg", plain[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1])
        assert np.abs(found.astype(int) - np.asarray(PIL.Image.open(buffer))).max() <= 3  # RGB, not BGR
        scores.append(psnr_db(found, plain))
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1] + 5


def test_jpeg_quality_is_drawn_only_where_asked() -> None:
    draw = {"kinds": ["shake"], "min_size_px": 1.0, "max_size_px": 5.0, "max_noise": 0.0}
    drawn = [draw_degradation(sample_rng(0, n), **draw, min_jpeg_quality=40) for n in range(300)]
    qualities = [degradation.jpeg_quality for degradation in drawn if degradation.jpeg_quality is not None]
    assert len(qualities) == 300 and min(qualities) < 45 and max(qualities) > 90
    assert all(40 <= quality <= 95 for quality in qualities)
    without = [draw_degradation(sample_rng(0, n), **draw) for n in range(300)]
    assert [dataclasses.replace(degradation, jpeg_quality=None) for degradation in drawn] == without


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**64 - 1), number=st.integers(0, 2**64 - 1))
def test_a_sample_is_a_function_of_seed_and_number(seed: int, number: int) -> None:
    first = sample_rng(seed, number).integers(2**62)
    sample_rng(seed, number ^ 1).random(100)
    assert sample_rng(seed, number).integers(2**62) == first
    assert sample_rng(seed, number ^ 1).integers(2**62) != first
    assert sample_rng(seed ^ 1, number).integers(2**62) != first


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": ()},
        {"kinds": "shake"},
        {"kinds": ["spin"]},
        {"min_size_px": 6.0},
        {"max_size_px": math.inf},
        {"max_size_px": math.nan},
        {"max_noise": -1.0},
        {"max_noise": math.nan},
        {"min_jpeg_quality": 96},
    ],
    ids=str,
)
def test_degradations_that_cannot_be_drawn_are_refused(change: dict[str, object]) -> None:
    options = {"kinds": ["shake"], "min_size_px": 1.0, "max_size_px": 5.0, "max_noise": 0.0, **change}
    with pytest.raises(ValueError, match=r"must be|expected 0 ≤"):
        draw_degradation(sample_rng(0, 0), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.uint16), np.zeros((8, 8), np.uint8)])
def test_only_8_bit_colour_is_degraded(image: NDArray) -> None:
    for take in (
        lambda: degrade(image, blur_only("shake", 3.0), sample_rng(0, 0)),
        lambda: average_frames([image]),
    ):
        with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
            take()


def test_encoded_blur_is_the_mean_of_encoded_values() -> None:
    # As GoPro's `blur`: in linear light the mean of black and white is brighter.
    black, white = (np.full((4, 4, 3), value, np.uint8) for value in (0, 200))
    draw = {"kinds": ("shake",), "min_size_px": 3, "max_size_px": 9, "max_noise": 0.0}
    encoded = draw_degradation(sample_rng(0, 0), **draw, encoded_share=1.0)
    linear = draw_degradation(sample_rng(0, 0), **draw)
    assert (average_frames([black, white], encoded, sample_rng(0, 1)) == 100).all()
    assert (average_frames([black, white], linear, sample_rng(0, 1)) > 130).all()
    assert (encoded.size_px, encoded.kind) == (linear.size_px, linear.kind) and encoded.highlight_gain == 1


def test_as_many_are_encoded_as_asked() -> None:
    draw = {"kinds": ("shake",), "min_size_px": 3, "max_size_px": 9, "max_noise": 0.0, "encoded_share": 0.25}
    gammas = [draw_degradation(sample_rng(0, number), **draw).gamma for number in range(800)]
    assert set(gammas) == {1.0, 2.2} and 0.2 < gammas.count(1.0) / 800 < 0.3
    with pytest.raises(ValueError, match="encoded_share"):
        draw_degradation(sample_rng(0, 0), **{**draw, "encoded_share": 1.5})
