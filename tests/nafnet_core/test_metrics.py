from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, multiprocessing
from torchmetrics.functional.image import (
    peak_signal_noise_ratio as torchmetrics_psnr,
)
from torchmetrics.functional.image import (
    structural_similarity_index_measure as torchmetrics_ssim,
)

from nafnet_core.metrics import PROTOCOL_NAME, PROTOCOL_VERSION, RunningMean, psnr, ssim, to_uint8

PHOTOS = {"astronaut": data.astronaut, "chelsea": data.chelsea}


def nchw(image_hwc: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_hwc.transpose(2, 0, 1)))[None]


def noisy(image: NDArray[np.uint8], spread: float, *, seed: int = 0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(0, spread, image.shape)
    return np.clip(image + noise, 0, 255).round().astype(np.uint8)


def skimage_ssim(restored: NDArray, gt: NDArray, data_range: float) -> float:
    return structural_similarity(
        gt,
        restored,
        data_range=data_range,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@pytest.mark.parametrize("name", sorted(PHOTOS))
@pytest.mark.parametrize("spread", [1.0, 8.0, 40.0])
def test_scores_are_scikit_images(name: str, spread: float) -> None:
    gt = PHOTOS[name]()[:200, :231]
    restored = noisy(gt, spread)
    expected = peak_signal_noise_ratio(gt, restored, data_range=255)
    assert psnr(nchw(restored), nchw(gt), data_range=255).item() == pytest.approx(expected, abs=1e-6)
    expected = skimage_ssim(restored, gt, 255)
    assert ssim(nchw(restored), nchw(gt), data_range=255).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spread", [1.0, 8.0, 40.0])
def test_scores_are_torchmetrics(spread: float) -> None:
    photos = [make()[:200, :231] for make in PHOTOS.values()]
    gt = torch.cat([nchw(photo) for photo in photos])
    restored = torch.cat([nchw(noisy(photo, spread, seed=n)) for n, photo in enumerate(photos)])
    pair = (restored.double(), gt.double())
    expected = torchmetrics_psnr(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(restored, gt, data_range=255), expected, rtol=0, atol=1e-4)
    # Its mean takes in a border that it reflected; the map inside is Wang's.
    _, ssim_map = torchmetrics_ssim(*pair, sigma=1.5, data_range=255.0, return_full_image=True)
    expected = ssim_map[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ssim(restored, gt, data_range=255), expected, rtol=0, atol=1e-4)


def test_scores_are_scikit_images_in_0_to_1() -> None:
    gt = data.chelsea()[:120, :140] / 255
    restored = noisy(data.chelsea()[:120, :140], 20) / 255
    expected = peak_signal_noise_ratio(gt, restored, data_range=1.0)
    assert psnr(nchw(restored), nchw(gt), data_range=1.0).item() == pytest.approx(expected, abs=1e-6)
    expected = skimage_ssim(restored, gt, 1.0)
    assert ssim(nchw(restored), nchw(gt), data_range=1.0).item() == pytest.approx(expected, abs=1e-9)
    as_fp32 = ssim(nchw(restored).float(), nchw(gt).float(), data_range=1.0).item()
    assert as_fp32 == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("level", [0, 3, 128, 252, 255])
def test_ssim_is_exact_on_flat_dark_and_saturated_images(level: int) -> None:
    # A night sky: E[x²] − E[x]² cancels, and in fp32 the score was off by 6e-5 and rose above 1.
    gt = np.full((48, 48, 3), level, dtype=np.uint8)
    shifted = np.full_like(gt, level + 1 if level < 255 else level - 1)
    grainy = noisy(gt, 0.7)
    for restored in (shifted, grainy):
        score = ssim(nchw(restored), nchw(gt), data_range=255).item()
        assert score == pytest.approx(skimage_ssim(restored, gt, 255), abs=1e-9)
        assert score <= 1


def test_scores_of_a_batch_are_those_of_its_images() -> None:
    gt = np.stack([photo()[:64, :80] for photo in PHOTOS.values()])
    restored = np.stack([noisy(image, 5 * i + 5) for i, image in enumerate(gt)])
    ours = torch.from_numpy(restored).permute(0, 3, 1, 2)
    theirs = torch.from_numpy(gt).permute(0, 3, 1, 2)
    for metric in (psnr, ssim):
        scores = metric(ours, theirs, data_range=255)
        alone = [metric(nchw(a), nchw(b), data_range=255).item() for a, b in zip(restored, gt, strict=True)]
        assert scores.dtype == torch.float64
        assert scores.tolist() == pytest.approx(alone, abs=1e-12)
        assert scores[0] > scores[1]


# Golden values: they hold whatever scikit-image does one day.


@pytest.mark.parametrize(
    ("difference", "golden_db"), [(1, 48.1308036087), (5, 34.1514035219), (255, 0.0), (0, math.inf)]
)
def test_golden_psnr_of_a_constant_difference(difference: int, golden_db: float) -> None:
    gt = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    score = psnr(gt + difference, gt, data_range=255).item()
    assert score == pytest.approx(golden_db, abs=1e-9)


def test_golden_ssim_of_flat_images_is_the_luminance_term() -> None:
    x, y = torch.full((1, 3, 16, 16), 100.0), torch.full((1, 3, 16, 16), 150.0)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(x, y, data_range=255).item() == pytest.approx(expected, abs=1e-9)


def test_golden_scores_of_a_ramp() -> None:
    rows, cols = np.mgrid[:24, :32]
    gt = np.stack([8 * cols, 10 * rows, (37 * rows + 11 * cols) % 256], axis=2).astype(np.uint8)
    restored = gt // 16 * 16
    assert psnr(nchw(restored), nchw(gt), data_range=255).item() == pytest.approx(30.361371627, abs=1e-6)
    assert ssim(nchw(restored), nchw(gt), data_range=255).item() == pytest.approx(0.969468466, abs=1e-6)


def test_psnr_is_over_all_pixels_and_not_a_mean_over_channels() -> None:
    gt = torch.zeros(1, 3, 4, 4)
    restored = gt.clone()
    restored[:, 0] = 0.5
    assert psnr(restored, gt, data_range=1.0).item() == pytest.approx(10 * math.log10(3 / 0.25), abs=1e-6)


def test_identical_images() -> None:
    gt = nchw(data.chelsea()[:100, :150]).repeat(3, 1, 1, 1)
    assert psnr(gt, gt, data_range=255).tolist() == [math.inf] * 3
    assert ssim(gt, gt, data_range=255).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_scores_do_not_depend_on_the_order_of_the_two() -> None:
    gt = data.astronaut()[:60, :60]
    a, b = nchw(noisy(gt, 9)), nchw(gt)
    assert psnr(a, b, data_range=255).item() == psnr(b, a, data_range=255).item()
    assert ssim(a, b, data_range=255).item() == pytest.approx(ssim(b, a, data_range=255).item(), abs=1e-12)


def test_scores_fall_with_noise() -> None:
    gt = data.astronaut()[:80, :80]
    for metric in (psnr, ssim):
        scores = [metric(nchw(noisy(gt, s)), nchw(gt), data_range=255).item() for s in (1, 4, 16, 64)]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 4


def test_data_range_scales_with_the_images() -> None:
    gt = nchw(data.astronaut()[:60, :60]).double()
    restored = nchw(noisy(data.astronaut()[:60, :60], 9)).double()
    for metric in (psnr, ssim):
        wide = metric(restored, gt, data_range=255).item()
        assert metric(restored / 255, gt / 255, data_range=1.0).item() == pytest.approx(wide, abs=1e-9)
        assert metric(restored / 255, gt / 255, data_range=255).item() != pytest.approx(wide, abs=1e-2)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(11, 20),
    width=st.integers(11, 20),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_ssim_is_scikit_images_at_any_size(height: int, width: int, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gt = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    restored = noisy(gt, 30, seed=seed)
    score = ssim(nchw(restored), nchw(gt), data_range=255).item()
    assert score == pytest.approx(skimage_ssim(restored, gt, 255), abs=1e-9)


# Misuse


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 3, 16, 16), (1, 3, 16, 17)),
        ((2, 3, 16, 16), (1, 3, 16, 16)),
        ((1, 1, 16, 16), (1, 3, 16, 16)),
        ((3, 16, 16), (3, 16, 16)),
        ((16, 16), (16, 16)),
    ],
)
def test_wrong_shapes_are_refused(metric: object, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    # Broadcasting would give a number, and a wrong one.
    with pytest.raises(ValueError, match="one shape"):
        metric(torch.zeros(first), torch.zeros(second), data_range=1.0)  # type: ignore[operator]


@pytest.mark.parametrize(("height", "width"), [(10, 64), (64, 10), (1, 1)])
def test_ssim_of_an_image_below_its_window_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="11 px"):
        ssim(torch.zeros(1, 3, height, width), torch.zeros(1, 3, height, width), data_range=1.0)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_data_range_is_never_guessed(metric: object) -> None:
    with pytest.raises(TypeError, match="data_range"):
        metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))  # type: ignore[operator]


def test_uint8_images_do_not_wrap_around() -> None:
    dark, bright = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255).byte()
    assert psnr(dark, bright, data_range=255).item() == psnr(bright, dark, data_range=255).item() == 0.0


# Rounding to 8 bits


def test_to_uint8_clips_and_rounds_half_to_even() -> None:
    image = torch.tensor([-3.0, -0.0, 0.4 / 255, 0.6 / 255, 0.5, 254.6 / 255, 1.0, 7.0])
    assert to_uint8(image).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    assert to_uint8(image).dtype == torch.uint8


def test_to_uint8_gives_back_every_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255), levels)


def test_protocol_is_named() -> None:
    # Reports carry these two; changing what is computed means raising the version.
    assert (PROTOCOL_NAME, PROTOCOL_VERSION) == ("rgb8", 1)


# Means over a data set


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-200, 200), min_size=1, max_size=40),
    batch=st.integers(1, 7),
    order=st.randoms(use_true_random=False),
)
def test_running_mean_is_the_same_to_the_last_bit_however_fed(
    values: list[float], batch: int, order: random.Random
) -> None:
    shuffled = order.sample(values, len(values))
    mean, one_by_one = RunningMean(), RunningMean()
    for start in range(0, len(values), batch):
        mean.update(torch.tensor(shuffled[start : start + batch], dtype=torch.float64))
    for value in values:
        one_by_one.update([value])
    assert mean.value == one_by_one.value == math.fsum(values) / len(values)
    assert len(mean) == len(values)


def test_running_mean_of_nothing_is_not_a_number() -> None:
    assert math.isnan(RunningMean().value)
    assert math.isnan(RunningMean().across_workers().value)


def test_running_mean_of_infinite_values_and_of_wrong_shapes() -> None:
    mean = RunningMean()
    mean.update([30.0, math.inf])  # PSNR of equal images
    assert mean.value == math.inf
    mean.update([-math.inf])
    assert math.isnan(mean.value)
    with pytest.raises(ValueError, match=r"\(N,\) values, got \(2, 2\)"):
        mean.update(torch.zeros(2, 2))


def test_running_mean_across_workers_is_that_of_one(tmp_path: Path) -> None:
    """Three real processes with 5, 2 and no values."""
    multiprocessing.spawn(_share_of_a_mean, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=3)
    alone = RunningMean()
    alone.update(_VALUES)
    assert [float((tmp_path / str(rank)).read_text()) for rank in range(3)] == [alone.value] * 3


_VALUES = [31.1, 1e-9, 27.3, -1e15, 1e15, 30.7, 0.1]


def _share_of_a_mean(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    mean = RunningMean()
    mean.update((_VALUES[:5], _VALUES[5:], [])[rank])
    Path(out, str(rank)).write_text(repr(mean.across_workers().value))
    dist.destroy_process_group()
