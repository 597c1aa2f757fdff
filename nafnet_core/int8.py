"""What int8 arithmetic makes of a convolution, in floating point: values on the grids of 8 bits.

Weights have a grid for each output channel, symmetric around zero; input and output one each, of 256 steps
between a lowest and a highest value (Krishnamoorthi 2018, "Quantizing deep convolutional networks for
efficient inference", section 2). Gradients pass as if nothing were rounded, and end where a value is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST_STEP = 1e-8
_WEIGHT_STEPS = 127
_STEPS = 255


class Int8(nn.Module):
    """The grids of one convolution.

    Attributes:
        ranges: (2, 2) fp32, lowest and highest value of the input, and of the output. Zero is among both: it
            is what stands around a map.
    """

    ranges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ranges", torch.tensor([[0.0, 1.0], [-1.0, 1.0]]))

    def input(self, x: Tensor) -> Tensor:
        """Any shape and floating dtype → the same."""
        return on_grid(x, *grid(self.ranges[0]))

    def output(self, y: Tensor) -> Tensor:
        """Any shape and floating dtype → the same."""
        return on_grid(y, *grid(self.ranges[1]))

    def weight(self, weight: Tensor) -> Tensor:
        """(C', C, K, K) → the same."""
        steps = weight_steps(weight)
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(
            weight.float(), steps, zeros, 0, -_WEIGHT_STEPS - 1, _WEIGHT_STEPS
        )
        return rounded.to(weight.dtype)


def grid(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of a lowest and a highest value, (2,) fp32, at most and at least 0: step, and the number of zero.

    Returns:
        fp32 and int32 scalars: value = (number − number of zero) × step, numbers being 0 to 255.
    """
    step = ((values[1] - values[0]) / _STEPS).clamp(min=LEAST_STEP)
    return step, (-values[0] / step).round().clamp(0, _STEPS).to(torch.int32)


def on_grid(x: Tensor, step: Tensor, zero_point: Tensor) -> Tensor:
    """Values rounded to the nearest of a `grid`, and cut beyond: any shape and floating dtype → the same."""
    return torch.fake_quantize_per_tensor_affine(x.float(), step, zero_point, 0, _STEPS).to(x.dtype)


def weight_steps(weight: Tensor) -> Tensor:
    """Step of each output channel's grid: (C', C, K, K) → (C',) fp32."""
    return (weight.detach().float().flatten(1).abs().amax(dim=1) / _WEIGHT_STEPS).clamp(min=LEAST_STEP)
