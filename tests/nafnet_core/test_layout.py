"""What a training step's speed hangs on: pointwise convolutions, and the memory layout of gradients."""

from __future__ import annotations

import pytest
import torch

from nafnet_core import PRESETS, NAFNet, randomize_residual_scales
from nafnet_core.model import NAFBlock, PointwiseConv


@pytest.mark.parametrize("side", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolution_is_a_scaled_convolution_at_any_size(
    side: int, dtype: torch.dtype, bias: bool
) -> None:
    conv = PointwiseConv(6, 10, bias=bias)
    scale = torch.randn(1, 10, 1, 1)
    x = torch.randn(2, 6, side, side, requires_grad=True)
    expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias) * scale
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = conv(x.to(dtype).permute(0, 2, 3, 1), scale=scale).permute(0, 3, 1, 2)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, **tolerance)
    inputs = [x, conv.weight]
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(y, inputs, upstream.to(dtype))
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).norm() < 10 * tolerance["rtol"] * expected_gradient.norm()


def test_gradients_of_a_block_stay_nhwc() -> None:
    """One gradient in NCHW among them makes every sum after it strided: some 1.5 ms each at 2×32×128×128."""
    block = NAFBlock(8, 8, 8)
    randomize_residual_scales(block, seed=0)
    layouts = []
    for module in block.modules():
        if not list(module.children()):
            module.register_full_backward_hook(lambda _, grads, __: layouts.append(grads[0]))
    x = torch.rand(2, 8, 24, 16, requires_grad=True).to(memory_format=torch.channels_last)
    block(x).square().sum().backward()
    assert len(layouts) > 10
    for gradient in layouts:
        is_broadcast = gradient.stride()[1:3] == (0, 0)  # that of the mean
        assert is_broadcast or gradient.is_contiguous(), gradient.stride()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("side", [16, 64])
def test_gradients_have_the_strides_of_their_parameters(bf16: bool, side: int) -> None:
    """Else DDP warns, and copies each into its bucket."""
    model = NAFNet(PRESETS["mobile"])
    randomize_residual_scales(model, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        model(torch.rand(2, 3, side, side)).sum().backward()
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or parameter.grad.stride() != parameter.stride()
    ]
    assert not wrong
