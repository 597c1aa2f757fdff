from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor

from nafnet_core.losses import LOSSES, mixed_loss
from nafnet_core.metrics import psnr


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 3, 5, 7)
    return torch.rand(shape, generator=generator).to(dtype), torch.rand(shape, generator=generator).to(dtype)


def laplacian_by_hand(image: np.ndarray) -> np.ndarray:
    """One channel, smoothed by SciPy."""

    def smoothed(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            x = correlate1d(x, [0.05, 0.25, 0.4, 0.25, 0.05], axis=axis, mode="nearest")
        return x

    even = np.zeros_like(image)
    even[::2, ::2] = 1
    return image - smoothed(4 * even * smoothed(image))


def by_hand(name: str, difference: np.ndarray) -> float:
    if name == "fft":
        spectra = [np.fft.rfft2(channel, norm="ortho") for channel in difference]
        return float(np.mean([[np.abs(s.real).mean(), np.abs(s.imag).mean()] for s in spectra]))
    if name == "edge":
        laplacians = np.stack([laplacian_by_hand(channel) for channel in difference])
        return float(np.sqrt(laplacians**2 + 0.001**2).mean())
    if name == "l1":
        return float(np.abs(difference).mean())
    if name == "l2":
        return float((difference**2).mean())
    if name == "charbonnier":
        return float(np.sqrt(difference**2 + 0.001**2).mean())
    assert name == "psnr"
    return float(10 * np.log10((difference**2).mean() + 1e-8))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_image_has_the_loss_computed_by_hand(name: str) -> None:
    restored, gt = batch()
    losses = LOSSES[name](restored, gt)
    assert losses.shape == (3,)
    for i in range(3):
        expected = by_hand(name, restored[i].numpy() - gt[i].numpy())
        assert losses[i].item() == pytest.approx(expected, rel=1e-9)
    # One image's loss does not know the others: this is what lets uneven slices be weighted by count.
    torch.testing.assert_close(LOSSES[name](restored[1:2], gt[1:2]), losses[1:2])
    assert losses.unique().numel() == 3


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("l1", 0.25),
        ("l2", 0.0625),
        ("charbonnier", 0.250001999992),
        ("psnr", -12.0411993),
        # All of it in the mean: 0.25 · √16, one of 2 · 4 · 3 numbers of the half spectrum.
        ("fft", 1.0 / 24),
        # A flat difference has no edges; the replicated border of the sparse level is not flat.
        ("edge", None),
    ],
)
def test_golden_value_of_a_constant_difference(name: str, golden: float | None) -> None:
    gt = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    if golden is None:
        golden = by_hand(name, np.full((3, 4, 4), 0.25))
        assert golden < 0.15
    assert LOSSES[name](gt + 0.25, gt).tolist() == pytest.approx([golden] * 2, rel=1e-6)


def test_psnr_loss_is_the_negative_metric() -> None:
    restored, gt = batch()
    expected = -psnr(restored, gt, data_range=1.0)
    torch.testing.assert_close(LOSSES["psnr"](restored, gt), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "at_equality"),
    [("l1", 0.0), ("l2", 0.0), ("charbonnier", 0.001), ("psnr", -80.0), ("fft", 0.0), ("edge", 0.001)],
)
def test_equal_images_have_a_finite_loss_and_gradient(name: str, at_equality: float) -> None:
    gt = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    restored = gt.clone().requires_grad_()
    loss = LOSSES[name](restored, gt)
    loss.sum().backward()
    assert loss.item() == pytest.approx(at_equality, abs=1e-6)
    assert restored.grad is not None and restored.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_is_the_numerical_one(name: str) -> None:
    restored, gt = (images[:, :, :2, :2] for images in batch())
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, gt), restored.requires_grad_())


def test_mixture_is_the_weighted_sum() -> None:
    restored, gt = batch(torch.float32)
    expected = 2.0 * LOSSES["l1"](restored, gt) + 0.01 * LOSSES["psnr"](restored, gt)
    torch.testing.assert_close(mixed_loss({"l1": 2.0, "psnr": 0.01})(restored, gt), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixture_is_computed_in_fp32(dtype: torch.dtype) -> None:
    restored, gt = batch(dtype)
    loss = mixed_loss({"psnr": 1.0})(restored, gt)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES["psnr"](restored.float(), gt.float()), rtol=0, atol=0)


def test_mixture_passes_gradients_back_in_the_networks_dtype() -> None:
    restored, gt = batch(torch.bfloat16)
    restored.requires_grad_()
    mixed_loss({"charbonnier": 1.0})(restored, gt).mean().backward()
    assert restored.grad is not None and restored.grad.dtype == torch.bfloat16
    assert restored.grad.abs().max() > 0


@pytest.mark.parametrize("weights", [{"ssim": 1.0}, {"l1": 1.0, "L2": 1.0}, {}])
def test_unknown_or_no_loss_is_refused_with_the_known_ones(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="charbonnier.*l1.*l2.*psnr"):
        mixed_loss(weights)


def test_psnr_scale_is_ten_over_ln_ten() -> None:
    # A hundredfold smaller error is 20 dB less, whatever the base of the logarithm inside.
    gt = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    step = LOSSES["psnr"](gt + 0.5, gt) - LOSSES["psnr"](gt + 0.05, gt)
    assert step.item() == pytest.approx(20.0, abs=1e-4)


def test_edge_loss_hears_edges_and_not_brightness() -> None:
    gt = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    ramp = gt + torch.linspace(0, 0.2, 32, dtype=torch.float64)
    stripes = gt + 0.2 * (torch.arange(32) // 2 % 2)
    torch.testing.assert_close(LOSSES["l1"](ramp, gt), LOSSES["l1"](stripes, gt))
    assert LOSSES["edge"](stripes, gt) > 5 * LOSSES["edge"](ramp, gt)[0]
