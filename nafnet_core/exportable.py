"""The network as one graph that other runtimes take: any size, no branches, nothing but standard operators.

    form = Exportable(model, train_patch_px=192)
    program = torch.export.export(form, (torch.zeros(1, 3, 64, 64),), dynamic_shapes=…)

What differs from `NAFNet.forward`, with the same values to rounding:

- The norm is one layer normalisation over the last axis, which ONNX has an operator for; spelt out in means
  and squares, half precision overflows (NVIDIA/TensorRT#3897, roboflow/rf-detr#176).
- Local statistics are running sums, of which each pixel takes the difference at the ends of its window; a
  window larger than the map is the map. A pooling operator with a fixed window fails there
  (axinc-ai/ailia-models#1087), and takes a time that grows with the window. The sums are of integers.
- Residual scales lie in the weights of the convolutions before them; not behind grids of 8 bits, which are
  those of the values before the scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nafnet_core.int8 import Int8, grid, on_grid, weight_steps
from nafnet_core.local_stats import WINDOW_PER_PATCH
from nafnet_core.model import Conv, NAFBlock, NAFNet

MEANS = "means"
"""Name of the module in each block whose values a graph in fp16 has to keep in fp32."""
_EXAMPLE_PX = (48, 56)  # neither side nor their ratio stays in a graph
_LEAST = 1e-6  # of the largest value that sums are scaled by: a map of zeros has none


class Exportable(nn.Module):
    """A trained network for `torch.export`.

    Args:
        model: the network; its weights are copied.
        train_patch_px: side of the patches that it was trained on, for local statistics; None: global ones.
        takes_bytes: whether images are (N, H, W, 3) uint8 RGB in and out, instead of (N, 3, H, W) float in
            0…1: then sizes are padded by reflection, and the result is rounded.
        size_px: height and width of all images, where a graph takes one size and one image alone; None: any.
        channels_last: whether running sums are of maps with channels last: for ONNX Runtime, which takes the
            values of a row one by one, and in int8 has all else in that order. OpenVINO sums rows soonest.
        round_outputs: whether convolutions in int8 round what they make, and not only what they are given:
            ONNX Runtime has no others; OpenVINO would go on in int8 through what follows, and lose more.
    """

    def __init__(
        self,
        model: NAFNet,
        *,
        train_patch_px: int | None,
        takes_bytes: bool = False,
        size_px: tuple[int, int] | None = None,
        channels_last: bool = True,
        round_outputs: bool = True,
    ) -> None:
        super().__init__()
        self.takes_bytes, self.size_px, self.stride_px = takes_bytes, size_px, model.config.stride_px

        def blocks(stage: nn.Module, level: int) -> nn.Sequential:
            window = train_patch_px and max(1, int(train_patch_px * WINDOW_PER_PATCH) >> level)
            return nn.Sequential(
                *(
                    _Block(block, _means(window, channels_last=channels_last, any_size=size_px is None))
                    for block in stage.children()
                    if isinstance(block, NAFBlock)
                )
            )

        stages = len(model.encoders)
        self.intro, self.ending = _copied(model.intro), _copied(model.ending)
        self.encoders = nn.ModuleList(blocks(stage, level) for level, stage in enumerate(model.encoders))
        self.downs = nn.ModuleList(_copied(down) for down in model.downs)
        self.middle_blks = blocks(model.middle_blks, stages)
        self.ups = nn.ModuleList(nn.Sequential(_copied(up[0]), nn.PixelShuffle(2)) for up in model.ups)  # type: ignore[index]
        self.decoders = nn.ModuleList(
            blocks(stage, stages - 1 - number) for number, stage in enumerate(model.decoders)
        )
        if not round_outputs:
            for module in self.modules():
                if isinstance(module, _RoundedConv):
                    module.made = nn.Identity()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Restore a batch: shapes and ranges as said above."""
        if not self.takes_bytes:
            height, width = images.shape[-2:]
            lq = F.pad(images, (0, -width % self.stride_px, 0, -height % self.stride_px))
            return self._cropped(self._restored(lq), height, width)
        height, width = images.shape[1:3]
        rows, cols = (_reflected(size, self.stride_px, images.device) for size in (height, width))
        lq = images.index_select(1, rows).index_select(2, cols).permute(0, 3, 1, 2).float() / 255
        restored = self._cropped(self._restored(lq), height, width).permute(0, 2, 3, 1)
        return (restored * 255).round().clamp(0, 255).to(torch.uint8)

    def example(self) -> tuple[Tensor, tuple[int, ...]]:
        """An input to trace with, and its free axes: batch, height and width, or none."""
        batch, (height, width) = (2, _EXAMPLE_PX) if self.size_px is None else (1, self.size_px)
        if self.takes_bytes:
            example, free = torch.zeros(batch, height, width, 3, dtype=torch.uint8), (0, 1, 2)
        else:
            example, free = torch.zeros(batch, 3, height, width), (0, 2, 3)
        return example, free if self.size_px is None else ()

    def _restored(self, lq: Tensor) -> Tensor:
        x = self.intro(lq)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            x = decoder(up(x) + skip)
        return self.ending(x) + lq

    def _cropped(self, x: Tensor, height: int, width: int) -> Tensor:
        """The upper left corner. Of any size not by slices: torch.export fixes whether those take all."""
        if self.size_px is not None:
            return x[:, :, :height, :width]
        rows, cols = (torch.arange(size, device=x.device) for size in (height, width))
        return x.index_select(2, rows).index_select(3, cols)


class _Block(nn.Module):
    """`NAFBlock`, (N, C, H, W) in and out, with fixed window."""

    def __init__(self, block: NAFBlock, means: nn.Module) -> None:
        super().__init__()
        self.means = means
        self.norm1, self.norm2 = _norm(block.norm1), _norm(block.norm2)
        self.conv1, self.conv2, self.conv4 = (
            _copied(layer) for layer in (block.conv1, block.conv2, block.conv4)
        )
        self.attention = _copied(block.sca[1])
        self.conv3 = _copied(block.conv3, scale=block.beta)
        self.conv5 = _copied(block.conv5, scale=block.gamma)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv2(self.conv1(_over_channels(self.norm1, x))).chunk(2, dim=1)
        y = first * second
        x = x + self.conv3(y * self.attention(self.means(y)))
        first, second = self.conv4(_over_channels(self.norm2, x)).chunk(2, dim=1)
        return x + self.conv5(first * second)


def _means(window_px: int | None, *, channels_last: bool, any_size: bool) -> nn.Module:
    if window_px is None:
        return _GlobalMeans()
    if any_size:
        return _WindowMeans(window_px, channels_last=channels_last)
    return _FixedWindowMeans(window_px)


class _GlobalMeans(nn.Module):
    """Means over height and width: (N, C, H, W) → (N, C, 1, 1)."""

    def forward(self, y: Tensor) -> Tensor:
        return y.mean(dim=(2, 3), keepdim=True)


class _WindowMeans(nn.Module):
    """Means over height and width: of a window around each pixel, at the border of the last that fits.

    Running sums are of integers, and so exact in any precision of the graph: in bf16 a sum of floats stands
    still after some hundred pixels. What overflows wraps around, and the difference of two is right again.
    """

    def __init__(self, window_px: int, *, channels_last: bool = False) -> None:
        super().__init__()
        self.window_px, self.channels_last = window_px, channels_last

    def forward(self, y: Tensor) -> Tensor:
        """(N, C, H, W) → same shape."""
        if self.channels_last:
            return self._along(self._along(y.permute(0, 2, 3, 1), 1), 2).permute(0, 3, 1, 2)
        return self._along(self._along(y, 2).transpose(2, 3), 2).transpose(2, 3)

    def _along(self, x: Tensor, dim: int) -> Tensor:
        length = x.shape[dim]
        # As tensors: sizes are symbols in a graph, and comparing these would fix them.
        window, whole = (torch.full((1,), size, device=x.device) for size in (self.window_px, length))
        window = torch.minimum(window, whole)
        first = torch.arange(length, device=x.device) - (self.window_px - 1) // 2
        first = torch.minimum(torch.maximum(first, torch.zeros_like(first)), length - window)
        sums, scale = self._sums(x, dim)
        total = sums.index_select(dim, first + window) - sums.index_select(dim, first)
        return total.to(x.dtype) / (scale * window.to(x.dtype))

    def _sums(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Running sums of whole numbers, one more than there are values, and what these were scaled by."""
        # The sum over a window is below 2³⁰, whatever the sums before it are.
        # In two steps, for a converter to fp16 cuts constants to what that holds, wherever they are used.
        largest = x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=_LEAST)
        scale = 2.0**15 / largest * (2.0**15 / self.window_px)
        steps = (x * scale).round().to(torch.int32).cumsum(dim, dtype=torch.int32)
        return F.pad(steps, [0, 0] * (x.dim() - 1 - dim) + [1, 0]), scale


class _FixedWindowMeans(_WindowMeans):
    """The same for maps of one size: an axis that a window covers has one mean, the others are slices."""

    def forward(self, y: Tensor) -> Tensor:
        """(N, C, H, W) → same shape, or 1 along an axis that has one mean."""
        return self._along(self._along(y, 2), 3)

    def _along(self, x: Tensor, dim: int) -> Tensor:
        length, window = x.shape[dim], self.window_px
        if window >= length:
            return x.mean(dim, keepdim=True)
        sums, scale = self._sums(x, dim)
        num_inside = length - window + 1
        total = sums.narrow(dim, window, num_inside) - sums.narrow(dim, 0, num_inside)
        means = total.to(x.dtype) / (scale * window)
        before = (window - 1) // 2
        borders = (means.narrow(dim, 0, 1), before), (means.narrow(dim, -1, 1), window - 1 - before)
        first, last = (border.expand(*_sized(x, dim, size)) for border, size in borders)
        return torch.cat([first, means, last], dim)


def _reflected(length: int, stride: int, device: torch.device) -> Tensor:
    """Which pixels of an axis stand for its pixels up to the next multiple of `stride`."""
    positions = torch.arange(length + -length % stride, device=device)
    mirrored = (length - 1) - (positions - (length - 1)).abs()
    return torch.maximum(mirrored, torch.zeros_like(mirrored))


def _sized(x: Tensor, dim: int, size: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = size
    return shape


def _over_channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)  # type: ignore[arg-type]
    plain.load_state_dict(norm.state_dict())
    return plain


def _copied(conv: nn.Module, *, scale: Tensor | None = None) -> nn.Module:
    """A plain convolution with the same weights, times `scale` of shape (1, C, 1, 1)."""
    assert isinstance(conv, Conv)
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.load_state_dict({name: value for name, value in conv.state_dict().items() if "int8" not in name})
    if conv.int8 is not None:
        return _RoundedConv(plain, conv.int8, scale)
    if scale is not None:
        with torch.no_grad():
            plain.weight.mul_(scale.detach().reshape(-1, 1, 1, 1))
            if plain.bias is not None:
                plain.bias.mul_(scale.detach().flatten())
    return plain


class _RoundedConv(nn.Module):
    """A convolution on grids of 8 bits: in ONNX one of bytes, between operators that say their grids."""

    weight: Tensor
    steps: Tensor
    zeros: Tensor
    scale: Tensor | None

    def __init__(self, plain: nn.Conv2d, int8: Int8, scale: Tensor | None) -> None:
        super().__init__()
        self.stride, self.padding, self.groups = plain.stride, plain.padding, plain.groups
        self.bias = plain.bias
        self.given: nn.Module = _Grid(int8.ranges[0])
        self.made: nn.Module = _Grid(int8.ranges[1])
        steps = weight_steps(plain.weight)
        numbers = (plain.weight.detach() / steps.reshape(-1, 1, 1, 1)).round()
        self.register_buffer("weight", numbers.to(torch.int8))
        self.register_buffer("steps", steps)
        self.register_buffer("zeros", torch.zeros_like(steps, dtype=torch.int8))
        self.register_buffer("scale", None if scale is None else scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        weight = _as_values(self.weight, self.steps, self.zeros)
        y = F.conv2d(self.given(x), weight, self.bias, self.stride, self.padding, groups=self.groups)  # type: ignore[arg-type]
        return self.made(y) if self.scale is None else self.made(y) * self.scale


class _Grid(nn.Module):
    """Rounds to the grid of 8 bits between a lowest and a highest value, (2,)."""

    step: Tensor
    zero_point: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        step, zero_point = grid(values)
        self.register_buffer("step", step)
        self.register_buffer("zero_point", zero_point.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return on_grid(x, self.step, self.zero_point.to(torch.int32))
        inputs = (x, self.step, self.zero_point)
        numbers = torch.onnx.ops.symbolic("QuantizeLinear", inputs, dtype=torch.uint8, shape=x.shape)
        return _as_values(numbers, self.step, self.zero_point)


def _as_values(numbers: Tensor, steps: Tensor, zero_points: Tensor) -> Tensor:
    """Whole numbers as what they stand for; with as many steps as there are channels, those are of axis 0."""
    if torch.onnx.is_in_onnx_export():
        inputs = (numbers, steps, zero_points)
        of: dict[str, Any] = {"axis": 0} if steps.dim() else {}
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", inputs, of, dtype=torch.float32, shape=numbers.shape
        )
    return numbers.float() * steps.reshape(-1, 1, 1, 1)
