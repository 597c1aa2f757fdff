from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nafnet_core import NAFNet, NAFNetConfig, restore_image
from nafnet_core.local_stats import (
    LocalMean,
    _banded_means,
    _sliding_means,
    local_statistics,
    spread,
    window_means,
)
from nafnet_core.strips import forward_in_strips
from tests.nafnet_core.networks import (
    DEEP,
    SMALL,
    assert_network_acts,
    lively_network,
    photo,
    photo_nchw,
    reference_of,
)
from tests.reference import naive_local_mean


def windows(model: NAFNet) -> dict[str, int | None]:
    return {name: pool.window_px for name, pool in model.named_modules() if isinstance(pool, LocalMean)}


# The mean itself: of NHWC maps


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def spread_means(x: torch.Tensor, mean: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(N, C, H, W) → the same shape, each pixel with its window's mean."""
    return spread(mean(nhwc(x)), nhwc(x).shape).permute(0, 3, 1, 2)


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 14), width=st.integers(1, 14), window_px=st.integers(1, 17))
def test_local_mean_is_the_naive_one(height: int, width: int, window_px: int) -> None:
    generator = torch.Generator().manual_seed(height * 1000 + width * 20 + window_px)
    x = torch.randn(2, 3, height, width, generator=generator)
    expected = naive_local_mean(x, window_px)
    pool = LocalMean()
    pool.window_px = window_px
    torch.testing.assert_close(spread_means(x, pool), expected, rtol=0, atol=1e-6)
    # The way that is taken on a GPU, and the one with gradients.
    rows, cols = min(window_px, height), min(window_px, width)
    banded = spread_means(x, lambda x: _banded_means(x, rows, cols))
    torch.testing.assert_close(banded, expected, rtol=0, atol=1e-6)
    other = spread_means(x.requires_grad_(), pool)
    assert other.requires_grad
    torch.testing.assert_close(other.detach(), expected, rtol=0, atol=1e-6)


def test_means_of_several_blocks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nafnet_core.local_stats._BAND_ROWS", 4)
    x = torch.randn(2, 3, 13, 17, generator=torch.Generator().manual_seed(0))
    means = spread_means(x, lambda x: _banded_means(x, 3, 5))
    torch.testing.assert_close(means, spread_means(x, lambda x: _sliding_means(x, 3, 5)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread_of_values", [0.0, 0.3])
def test_means_of_a_gpu_in_bf16_are_rounded_twice(spread_of_values: float) -> None:
    noise = torch.randn(1, 300, 400, 4, generator=torch.Generator().manual_seed(0))
    x = (0.7 + spread_of_values * noise).bfloat16()
    means = _banded_means(x, 48, 56)
    assert means.dtype == torch.bfloat16
    torch.testing.assert_close(means.float(), _sliding_means(x.float(), 48, 56), rtol=2.0**-7, atol=0)


def test_means_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 0.0]])[None, None]
    assert window_means(nhwc(x), 2)[0, ..., 0].tolist() == [[2.5, 3.0]]
    # One row of windows fits, of two columns: it is repeated below, and the second one to the right.
    means = spread_means(x, lambda x: window_means(x, 2))
    assert means[0, 0].tolist() == [[2.5, 3.0, 3.0], [2.5, 3.0, 3.0]]


def test_gradient_of_local_means_is_the_naive_ones() -> None:
    x = torch.randn(1, 2, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(1, 2, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    ours = partial(spread_means, mean=lambda x: window_means(x, 3))
    for mean in (ours, lambda x: naive_local_mean(x, 3)):
        leaf = x.clone().requires_grad_()
        (mean(leaf) * weight).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_local_mean_follows_the_image() -> None:
    step = torch.cat([torch.zeros(1, 1, 8, 20), torch.ones(1, 1, 8, 20)], dim=3)
    pool = LocalMean()
    assert pool(nhwc(step)).flatten().tolist() == [0.5]
    pool.window_px = 5
    local = spread_means(step, pool)[0, 0, 4]
    assert local[5] == 0 and local[34] == 1
    assert 0 < local[19] < local[20] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_means_keep_the_dtype(dtype: torch.dtype) -> None:
    x = torch.rand(1, 9, 9, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    mean = window_means(x, 3)
    assert mean.dtype == dtype
    torch.testing.assert_close(mean.double(), window_means(x.double(), 3), rtol=0, atol=2**-8)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("window_px", [96, 384])
def test_means_of_20_megapixels_are_exact(window_px: int, with_gradient: bool) -> None:
    # An integral image of this map reaches 8e7: in fp32 its differences lose digits, as shown below.
    x = torch.randn(1, 1, 3648, 5472, generator=torch.Generator().manual_seed(1)) + 4
    means = window_means(nhwc(x.requires_grad_(with_gradient)), window_px).detach()[0, ..., 0].double()
    x = x.detach()
    sums = F.pad(x[0, 0].double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    exact = _differences(sums, window_px)
    assert (means - exact).abs().max() < 4e-6  # 1e-6 of the mean
    sums = F.pad(x[0, 0].cumsum(0).cumsum(1), (1, 0, 1, 0))
    assert (_differences(sums, window_px).double() - exact).abs().max() > 1e-4


def _differences(sums: torch.Tensor, side: int) -> torch.Tensor:
    corners = sums[side:, side:] + sums[:-side, :-side] - sums[side:, :-side] - sums[:-side, side:]
    return corners / side**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (97, 101)])
def test_global_mean_is_added_up_in_fp32(dtype: torch.dtype, height: int, width: int) -> None:
    # In bf16, of 8 bits, a sum of ones would come to a halt at 256.
    x = torch.ones(2, height, width, 32) + 0.1 * torch.rand(2, height, width, 32)
    mean, exact = LocalMean()(x.to(dtype)), x.to(dtype).double().mean((1, 2), keepdim=True)
    assert mean.dtype == dtype
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)


# In the network


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 70), (127, 129), (1, 1)])
@pytest.mark.parametrize(
    ("config", "train_patch_px"), [(SMALL, 32), (SMALL, 20), (DEEP, 32)], ids=["small", "odd", "deep"]
)
def test_output_is_the_references(config: NAFNetConfig, train_patch_px: int, height: int, width: int) -> None:
    model = lively_network(config)
    lq = photo_nchw(height, width)
    assert_network_acts(model, photo_nchw(64, 64))
    reference = reference_of(model)
    reference.localize(train_patch_px)
    with torch.no_grad(), local_statistics(model, train_patch_px):
        restored = model(lq)
    with torch.no_grad():
        torch.testing.assert_close(restored, reference(lq), rtol=0, atol=1e-5)
        if min(height, width) > 1:
            assert (restored - model(lq)).abs().max() > 0.01, "local and global statistics do not differ"


@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["small", "deep"])
@pytest.mark.parametrize("train_patch_px", [None, 64])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (255, 257), (720, 1280)])
def test_large_outputs_are_the_references(
    monkeypatch: pytest.MonkeyPatch,
    config: NAFNetConfig,
    train_patch_px: int | None,
    height: int,
    width: int,
) -> None:
    """Against fp64, whose integral images can be taken for exact."""
    model = lively_network(config)
    lq = photo_nchw(height, width)
    reference = reference_of(model).double()
    if train_patch_px is not None:
        reference.localize(train_patch_px)
        monkeypatch.setattr("tests.reference.naive_local_mean", _integral_local_mean)
    with torch.no_grad(), local_statistics(model, train_patch_px):
        expected = reference(lq.double())
        assert (expected - lq).abs().mean() > 0.01
        torch.testing.assert_close(model(lq).double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(forward_in_strips(model, lq).double(), expected, rtol=0, atol=1e-5)


def _integral_local_mean(x: torch.Tensor, window_px: int) -> torch.Tensor:
    height, width = x.shape[-2:]
    rows, cols = min(window_px, height), min(window_px, width)
    sums = F.pad(x.cumsum(dim=-1).cumsum(dim=-2), (1, 0, 1, 0))
    means = (
        sums[..., rows:, cols:]
        + sums[..., :-rows, :-cols]
        - sums[..., rows:, :-cols]
        - sums[..., :-rows, cols:]
    ) / (rows * cols)
    top, left = (height - means.shape[-2]) // 2, (width - means.shape[-1]) // 2
    below, right = height - means.shape[-2] - top, width - means.shape[-1] - left
    return F.pad(means, (left, right, top, below), mode="replicate")


def test_integral_judge_is_the_naive_one() -> None:
    x = torch.rand(1, 2, 23, 40, dtype=torch.float64)
    for window_px in (5, 8, 30):
        torch.testing.assert_close(_integral_local_mean(x, window_px), naive_local_mean(x, window_px))


@pytest.mark.parametrize(("height", "width"), [(20, 120), (120, 20)])
def test_window_that_covers_one_side_only(height: int, width: int) -> None:
    model = lively_network(SMALL)
    lq = photo_nchw(height, width)
    assert_network_acts(model, lq)
    reference = reference_of(model)
    reference.localize(32)
    with torch.no_grad(), local_statistics(model, 32):
        torch.testing.assert_close(model(lq), reference(lq), rtol=0, atol=1e-5)


def test_window_that_covers_everything_is_the_global_mean() -> None:
    model = lively_network(SMALL)
    lq = photo_nchw(48, 96)
    assert_network_acts(model, lq)
    with torch.no_grad():
        plain = model(lq)
        with local_statistics(model, 64):
            assert torch.equal(model(lq), plain)
        with local_statistics(model, 60):
            assert not torch.equal(model(lq), plain)


def test_windows_are_one_and_a_half_patches_at_each_scale() -> None:
    model = NAFNet(DEEP)
    with local_statistics(model, 64):
        sides = windows(model)
    assert sides == {
        "encoders.0.0.sca.0": 96,
        "encoders.1.0.sca.0": 48,
        "encoders.2.0.sca.0": 24,
        "encoders.3.0.sca.0": 12,
        "encoders.3.1.sca.0": 12,
        "middle_blks.0.sca.0": 6,
        "decoders.0.0.sca.0": 12,
        "decoders.1.0.sca.0": 24,
        "decoders.2.0.sca.0": 48,
        "decoders.3.0.sca.0": 96,
    }


def test_window_is_never_empty() -> None:
    model = lively_network(DEEP)
    with torch.no_grad(), local_statistics(model, 4):
        assert min(side for side in windows(model).values() if side is not None) == 1
        assert model(photo_nchw(48, 48)).isfinite().all()


# The context


def test_global_statistics_come_back() -> None:
    model = lively_network(SMALL)
    lq = photo_nchw(60, 60)
    with torch.no_grad():
        before = model(lq)
        with local_statistics(model, 16):
            within = model(lq)
        after = model(lq)
    assert set(windows(model).values()) == {None}
    assert torch.equal(after, before)
    assert not torch.equal(within, before)


def test_global_statistics_come_back_after_an_exception() -> None:
    model = NAFNet(SMALL)
    with pytest.raises(KeyboardInterrupt), local_statistics(model, 16):
        assert None not in windows(model).values()
        raise KeyboardInterrupt
    assert set(windows(model).values()) == {None}


def test_outer_statistics_come_back_after_an_inner_use() -> None:
    # `restore_image` sets its own; a caller's block around it must hold afterwards.
    model = lively_network(SMALL)
    with local_statistics(model, 16):
        outer = windows(model)
        restore_image(model, photo(40, 40), train_patch_px=32)
        assert windows(model) == outer
    assert set(windows(model).values()) == {None}


def test_none_leaves_global_statistics() -> None:
    model = NAFNet(SMALL)
    with local_statistics(model, None):
        assert set(windows(model).values()) == {None}


def test_statistics_add_nothing_to_the_weights() -> None:
    model = NAFNet(SMALL)
    keys = set(model.state_dict())
    with local_statistics(model, 16):
        assert set(model.state_dict()) == keys


def test_tiles_and_whole_image_use_the_same_window() -> None:
    model = lively_network(SMALL)
    image = photo(150, 200)
    middle = (slice(60, 90), slice(80, 120))
    crop = np.ascontiguousarray(image[20:132, 40:160])
    whole = restore_image(model, image, train_patch_px=16)[middle].astype(int)
    part = restore_image(model, crop, train_patch_px=16)[40:70, 40:80].astype(int)
    assert np.abs(whole - part).max() <= 1
    # With global statistics the two do differ: the test would notice.
    whole = restore_image(model, image, train_patch_px=None)[middle].astype(int)
    part = restore_image(model, crop, train_patch_px=None)[40:70, 40:80].astype(int)
    assert np.abs(whole - part).max() > 1
