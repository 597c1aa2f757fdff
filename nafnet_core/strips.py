"""Run a NAFNet on a large map in host memory, a strip of rows at a time.

Done layer by layer, a 1280×720 photo at width 32 writes some forty maps of 118 or 236 MB to memory and reads
them back, and the kernel has to hand out fresh pages for each. Here two maps a level are kept, the block's
stream and its gated half, and all that lies between is computed on strips that stay in the caches. The
result is `model(lq)`, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nafnet_core.local_stats import scale_by_windows_
from nafnet_core.model import NAFBlock, NAFNet, PointwiseConv

_STRIP_BYTES = 4 * 2**20  # measured at 1, 2, 4, 8 and 16 MiB: flat around this


@torch.inference_mode()
def forward_in_strips(model: NAFNet, lq: Tensor) -> Tensor:
    """What `model(lq)` returns, with less memory and sooner.

    Args:
        model: the network, on the CPU; its convolutions may be in bf16 (`convolutions_in_bf16`).
        lq: (N, C, H, W) float, RGB in 0…1; one image at a time, N = 1, is what it is fast for.

    Returns:
        (N, C, H, W), as the network's own forward returns it.
    """
    height, width = lq.shape[-2:]
    stride = model.config.stride_px
    padded = F.pad(lq, (0, -width % stride, 0, -height % stride)).contiguous(
        memory_format=torch.channels_last
    )
    x = model.intro(padded.to(model.intro.weight.dtype))
    skips = []
    for encoder, down in zip(model.encoders, model.downs, strict=True):
        _run_blocks(encoder, x)
        skips.append(x)
        x = down(x)
    _run_blocks(model.middle_blks, x)
    for decoder, up in zip(model.decoders, model.ups, strict=True):
        skip = skips.pop()
        for top, bottom in _strips(x.permute(0, 2, 3, 1), 2 * x.shape[1]):
            skip[:, :, 2 * top : 2 * bottom] += up(x[:, :, top:bottom])
        x = skip
        del skip
        _run_blocks(decoder, x)
    return (model.ending(x) + padded)[..., :height, :width]


def convolutions_in_bf16(model: NAFNet) -> NAFNet:
    """A copy of a network whose convolutions are in bf16, and nothing else.

    It computes what autocast makes of the fp32 network, which converts the weights at every call: with 16
    channels that takes as long as bf16 saves. On a processor that computes in bf16, 1×1 convolutions also
    have their weights laid out beforehand; the copy is then to be run, and not to be trained or saved.
    """
    copy = deepcopy(model)
    for module in copy.modules():
        if isinstance(module, nn.Conv2d):
            for parameter in module.parameters():  # not buffers: grids of 8 bits are in fp32
                parameter.data = parameter.data.to(torch.bfloat16)
    if _PackedPointwise.is_supported():
        for parent in list(copy.modules()):
            for name, child in parent.named_children():
                if isinstance(child, PointwiseConv) and child.int8 is None:
                    setattr(parent, name, _PackedPointwise(child))
    return copy


class _PackedPointwise(nn.Module):
    """A 1×1 convolution in bf16 on the CPU, its weights in the layout that oneDNN multiplies by.

    By `F.linear` oneDNN arranges them at every call, and torch writes the bias to memory to have it added to:
    in the blocks of `width32` 1.2 times as long.
    """

    def __init__(self, conv: PointwiseConv) -> None:
        super().__init__()
        self.out_channels = conv.out_channels
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(conv.weight.detach().flatten(1).contiguous())

    @staticmethod
    def is_supported() -> bool:
        """Whether this torch and this processor have it: the operators are those that Inductor calls."""
        operators = torch.ops.mkldnn
        return (
            torch.backends.mkldnn.is_available()
            and hasattr(operators, "_linear_pointwise")
            and hasattr(operators, "_reorder_linear_weight")
            and operators._is_mkldnn_bf16_supported()
        )

    def forward(self, input: Tensor) -> Tensor:
        """(N, H, W, C) → (N, H, W, C')."""
        return torch.ops.mkldnn._linear_pointwise(input, self._weight, self._bias, "none", [], "")


def _run_blocks(blocks: nn.Module, x: Tensor) -> None:
    for block in blocks.children():
        assert isinstance(block, NAFBlock)
        _run_block(block, x.permute(0, 2, 3, 1))


def _run_block(block: NAFBlock, x: Tensor) -> None:
    """`x`, (N, H, W, C), becomes what `block` makes of it, in place."""
    height = x.shape[1]
    conv2, half = block.conv2, block.conv2.out_channels // 2
    gated = x.new_empty(*x.shape[:3], half)
    for top, bottom in _strips(x, conv2.out_channels):
        first, last = max(0, top - 1), min(height, bottom + 1)
        y = block.conv1(block.norm1(x[:, first:last]))
        # The depthwise convolution sees one row beyond the strip, and zeros beyond the map: there it is given
        # them on both sides, and the row that only neighbours the strip is dropped.
        is_at_border = first == top or last == bottom
        y = conv2(y, has_rows=not is_at_border)
        if is_at_border:
            y = y[:, top - first : bottom - first]
        torch.mul(*y.split(half, dim=-1), out=gated[:, top:bottom])
    attention = block.sca(gated)
    beta, gamma = (scale.flatten().to(x.dtype) for scale in (block.beta, block.gamma))
    for top, bottom in _strips(x, block.conv4.out_channels):
        stream, y = x[:, top:bottom], gated[:, top:bottom]
        scale_by_windows_(y, attention, top, height)
        stream.addcmul_(block.conv3(y), beta)
        y = block.conv5(block.sg(block.conv4(block.norm2(stream))))
        stream.addcmul_(y, gamma)


def _strips(x: Tensor, channels: int) -> Iterator[tuple[int, int]]:
    """First and last row of strips of (N, H, W, C) whose widest map stays in the caches."""
    height, width = x.shape[1:3]
    rows = max(8, _STRIP_BYTES // (width * channels * x.element_size()))
    for top in range(0, height, rows):
        yield top, min(top + rows, height)
