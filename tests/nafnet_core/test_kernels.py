from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nafnet_core.kernels import Kernel, centred, disc_kernel, gaussian_kernel, shake_kernel

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
