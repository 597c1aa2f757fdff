from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nafnet_core.blur import (
    GAMMA,
    BlurKind,
    Degradation,
    Kernel,
    centred,
    degrade,
    disc_kernel,
    draw_degradation,
    gaussian_kernel,
    shake_kernel,
)
from tests.nafnet_core.networks import photo

KINDS: list[BlurKind] = ["shake", "defocus", "gaussian"]
# Longer to the right than down, heavier at one end: no flip or turn leaves it as it is.
HOOK = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 6, 0, 0, 0, 0, 0],
        [0, 5, 4, 3, 2, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=np.float32,
)


def blur_only(kind: BlurKind, size_px: float) -> Degradation:
    return Degradation(kind=kind, size_px=size_px, shot_noise=0.0, read_noise=0.0, highlight_gain=1.0)


def centre_of_mass(kernel: NDArray) -> tuple[float, float]:
    """(y, x) from the middle, in px."""
    weights = kernel.astype(np.float64)
    rows, cols = np.indices(kernel.shape)
    middle_y, middle_x = (kernel.shape[0] - 1) / 2, (kernel.shape[1] - 1) / 2
    y = (weights * rows).sum() / weights.sum() - middle_y
    x = (weights * cols).sum() / weights.sum() - middle_x
    return float(y), float(x)


def assert_is_a_centred_kernel(kernel: Kernel) -> None:
    assert kernel.dtype == np.float32
    assert kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    assert kernel.min() >= 0
    assert kernel.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    assert centre_of_mass(kernel) == pytest.approx((0, 0), abs=1e-3)


def linear(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return (image / 255.0) ** GAMMA


def psnr_db(a: NDArray, b: NDArray) -> float:
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


# Kernels


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), extent_px=st.floats(0, 80))
def test_shake_kernel_is_one_and_as_large_as_asked(seed: int, extent_px: float) -> None:
    kernel = shake_kernel(np.random.default_rng(seed), extent_px)
    assert_is_a_centred_kernel(kernel)
    rows, cols = np.nonzero(kernel)
    # Splatting widens the path by less than a pixel at each end of each axis.
    assert extent_px - 0.5 <= math.hypot(np.ptp(rows), np.ptp(cols)) <= extent_px + 2 * math.sqrt(2)


def test_shake_kernel_is_a_path_and_not_a_blob() -> None:
    for seed in range(10):
        kernel = shake_kernel(np.random.default_rng(seed), 40.0)
        # 256 splats of a line 40 px across touch a few hundred of the 1,800 pixels at most.
        assert 20 < np.count_nonzero(kernel > 1e-6) < 600


def test_shake_kernel_is_a_function_of_the_generator() -> None:
    first, again, other = (shake_kernel(np.random.default_rng(seed), 20.0) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_shake_kernels_point_everywhere() -> None:
    # A bias in direction would be learnt: over many draws width and height come out alike.
    spans = []
    for seed in range(60):
        rows, cols = np.nonzero(shake_kernel(np.random.default_rng(seed), 30.0))
        spans.append((np.ptp(rows), np.ptp(cols)))
    mean_height, mean_width = np.mean(spans, axis=0)
    assert mean_height == pytest.approx(mean_width, rel=0.2)


def test_shake_of_no_extent_is_a_delta() -> None:
    kernel = shake_kernel(np.random.default_rng(0), 0.0)
    assert kernel[kernel.shape[0] // 2, kernel.shape[1] // 2] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("diameter_px", [0.0, 1.0, 3.0, 6.5, 15.0, 40.0])
def test_disc_kernel(diameter_px: float) -> None:
    kernel = disc_kernel(diameter_px)
    assert_is_a_centred_kernel(kernel)
    assert np.array_equal(kernel, kernel.T) and np.array_equal(kernel, kernel[::-1])
    if diameter_px >= 3:
        # Flat inside, so its peak is one over the disc's area.
        assert kernel.max() == pytest.approx(1 / (math.pi * diameter_px**2 / 4), rel=0.1)
        assert kernel[0].max() < kernel.max()
    else:
        assert kernel.max() > 0.99


@pytest.mark.parametrize("sigma_px", [0.0, 0.3, 1.0, 2.5, 6.0])
def test_gaussian_kernel(sigma_px: float) -> None:
    kernel = gaussian_kernel(sigma_px)
    assert_is_a_centred_kernel(kernel)
    assert np.allclose(kernel, kernel.T) and np.allclose(kernel, kernel[::-1])
    side = kernel.shape[0]
    assert side >= 6 * sigma_px
    if sigma_px >= 1:
        offsets = np.arange(side) - side // 2
        spread = math.sqrt((kernel.sum(axis=0) * offsets**2).sum())
        assert spread == pytest.approx(sigma_px, rel=0.03)


# Measured kernels


@pytest.mark.parametrize("scale", [1.0, 255.0, 1e-6])
def test_measured_kernel_is_normalised_and_centred(scale: float) -> None:
    kernel = centred(HOOK * scale)
    assert_is_a_centred_kernel(kernel)
    # Its spread about the centre is kept, but for the up to ¼ px² that each bilinear splat adds.
    assert 0 <= _variance(kernel) - _variance(HOOK) <= 0.5


def _variance(kernel: NDArray) -> float:
    weights = kernel.astype(np.float64) / kernel.sum(dtype=np.float64)
    rows, cols = np.indices(kernel.shape)
    return float(sum((weights * axis**2).sum() - (weights * axis).sum() ** 2 for axis in (rows, cols)))


def test_centring_moves_by_whole_pixels_where_it_can() -> None:
    cross = np.zeros((9, 12), dtype=np.float64)
    cross[2, 4] = 4
    cross[1, 4] = cross[3, 4] = cross[2, 3] = cross[2, 5] = 1
    expected = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 8
    kernel = centred(cross)
    middle = kernel.shape[0] // 2
    np.testing.assert_allclose(kernel[middle - 1 : middle + 2, middle - 1 : middle + 2], expected, atol=1e-7)


def test_centring_twice_changes_nothing_more() -> None:
    once = centred(np.pad(disc_kernel(9.0), ((0, 5), (3, 0))))
    twice = centred(once)
    # The border of zeros may differ.
    border = (twice.shape[0] - once.shape[0]) // 2
    larger, smaller = (twice, once) if border >= 0 else (once, twice)
    np.testing.assert_allclose(larger, np.pad(smaller, abs(border)), atol=1e-5)


def test_centring_keeps_the_orientation() -> None:
    kernel = centred(HOOK)
    heaviest_y, heaviest_x = np.unravel_index(kernel.argmax(), kernel.shape)
    middle = kernel.shape[0] // 2
    # The hook is heavy at its upper left, and its tail runs to the right.
    assert heaviest_x < middle
    assert kernel[:middle, :middle].sum() > kernel[:middle, middle + 1 :].sum()
    assert np.nonzero(kernel)[1].max() - middle > middle - np.nonzero(kernel)[1].min()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_centring_takes_any_real_dtype(dtype: type) -> None:
    np.testing.assert_allclose(centred(HOOK.astype(dtype)), centred(HOOK), atol=1e-7)


@pytest.mark.parametrize(
    "kernel",
    [
        np.zeros((3, 3)),
        np.ones(5),
        np.ones((3, 3, 3)),
        np.array([[1.0, -0.1]]),
        np.array([[1.0, np.nan]]),
        np.array([[1.0, np.inf]]),
        np.zeros((0, 3)),
    ],
    ids=["zero", "1-D", "3-D", "negative", "nan", "inf", "empty"],
)
def test_what_is_no_kernel_is_refused(kernel: NDArray) -> None:
    with pytest.raises(ValueError, match="kernel|zero-size"):
        centred(kernel)


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
@pytest.mark.parametrize(("height", "width"), [(48, 64), (33, 17), (5, 7), (1, 1), (1, 40)])
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
        draw_degradation(rng, kinds=KINDS, min_size_px=1, max_size_px=2, max_noise=0).kind for _ in range(600)
    ]
    assert {kind: drawn.count(kind) for kind in KINDS} == pytest.approx(dict.fromkeys(KINDS, 200), abs=40)


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
