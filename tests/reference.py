"""A second NAFNet, written plainly from the paper, for the tests to compare `nafnet_core` with.

Nothing here is shared with `nafnet_core`: NCHW memory, eager fp32, a layer norm with its own backward pass,
explicit channel slices, `AdaptiveAvgPool2d`, and local statistics by summing every window. It is slow on
purpose. Only the names of the parameters are the official ones, so that one state dict fits both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _NormalizeChannels(torch.autograd.Function):
    """Channel normalisation of (N, C, H, W) whose gradient is derived by hand, not by autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        deviation = x - x.mean(dim=1, keepdim=True)
        inverse_std = (deviation.pow(2).mean(dim=1, keepdim=True) + eps).rsqrt()
        normed = deviation * inverse_std
        ctx.save_for_backward(normed, inverse_std, weight)
        return normed * weight[None, :, None, None] + bias[None, :, None, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        normed, inverse_std, weight = ctx.saved_tensors
        grad_normed = grad * weight[None, :, None, None]
        # Shifting or stretching a pixel's channels does not move the result: those two directions drop out.
        along_shift = grad_normed.mean(dim=1, keepdim=True)
        along_stretch = normed * (grad_normed * normed).mean(dim=1, keepdim=True)
        grad_x = inverse_std * (grad_normed - along_shift - along_stretch)
        return grad_x, (grad * normed).sum(dim=(0, 2, 3)), grad.sum(dim=(0, 2, 3)), None


class LayerNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _NormalizeChannels.apply(x, self.weight, self.bias, 1e-6)


def naive_local_mean(x: Tensor, window_px: int) -> Tensor:
    """Mean of every window that fits, one by one; the border repeats the nearest of them.

    A side that the window covers has its window cut to the map; if both are covered, it is the plain mean.
    """
    height, width = x.shape[-2:]
    if window_px >= height and window_px >= width:
        return x.mean(dim=(2, 3), keepdim=True)
    rows, cols = min(window_px, height), min(window_px, width)
    fitting_rows, fitting_cols = height - rows + 1, width - cols + 1
    means = x.new_empty(*x.shape[:2], fitting_rows, fitting_cols)
    for top in range(fitting_rows):
        for left in range(fitting_cols):
            means[..., top, left] = x[..., top : top + rows, left : left + cols].mean(dim=(2, 3))
    above, before = (height - fitting_rows) // 2, (width - fitting_cols) // 2
    nearest_row = (torch.arange(height) - above).clamp(0, fitting_rows - 1)
    nearest_col = (torch.arange(width) - before).clamp(0, fitting_cols - 1)
    return means[..., nearest_row, :][..., nearest_col]


class NaiveLocalPool(nn.Module):
    """Stands in for `AdaptiveAvgPool2d(1)`; its window follows from the features of a training patch."""

    def __init__(self, train_patch_px: int) -> None:
        super().__init__()
        self.train_patch_px = train_patch_px
        self.window_px: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.window_px is None:
            self.window_px = x.shape[-1] * int(1.5 * self.train_patch_px) // self.train_patch_px
        return naive_local_mean(x, self.window_px)


class ReferenceBlock(nn.Module):
    def __init__(self, channels: int, dw_expand: int, ffn_expand: int) -> None:
        super().__init__()
        dw, ffn = channels * dw_expand, channels * ffn_expand
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.norm1 = LayerNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, dw, kernel_size=1)
        self.conv2 = nn.Conv2d(dw, dw, kernel_size=3, padding=1, groups=dw)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dw // 2, dw // 2, kernel_size=1))
        self.conv3 = nn.Conv2d(dw // 2, channels, kernel_size=1)
        self.norm2 = LayerNorm2d(channels)
        self.conv4 = nn.Conv2d(channels, ffn, kernel_size=1)
        self.conv5 = nn.Conv2d(ffn // 2, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        expanded = self.conv2(self.conv1(self.norm1(x)))
        first, second = torch.chunk(expanded, 2, dim=1)
        gated = first * second
        x = x + self.beta * self.conv3(gated * self.sca(gated))
        first, second = torch.chunk(self.conv4(self.norm2(x)), 2, dim=1)
        return x + self.gamma * self.conv5(first * second)


class ReferenceNAFNet(nn.Module):
    """The whole network; arguments as in `nafnet_core.NAFNetConfig`, `**config.to_dict()` fits."""

    def __init__(
        self,
        *,
        width: int,
        enc_blk_nums: list[int],
        middle_blk_num: int,
        dec_blk_nums: list[int],
        img_channel: int = 3,
        dw_expand: int = 2,
        ffn_expand: int = 2,
    ) -> None:
        super().__init__()

        def stage(blocks: int, channels: int) -> nn.Sequential:
            return nn.Sequential(*[ReferenceBlock(channels, dw_expand, ffn_expand) for _ in range(blocks)])

        depth = len(enc_blk_nums)
        at_level = [width * 2**level for level in range(depth + 1)]
        self.multiple_px = 2**depth
        self.intro = nn.Conv2d(img_channel, width, kernel_size=3, padding=1)
        self.encoders = nn.ModuleList([stage(n, at_level[i]) for i, n in enumerate(enc_blk_nums)])
        self.downs = nn.ModuleList(
            [nn.Conv2d(at_level[i], at_level[i + 1], kernel_size=2, stride=2) for i in range(depth)]
        )
        self.middle_blks = stage(middle_blk_num, at_level[depth])
        self.ups = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(at_level[i], 2 * at_level[i], kernel_size=1, bias=False), nn.PixelShuffle(2)
                )
                for i in range(depth, 0, -1)
            ]
        )
        self.decoders = nn.ModuleList([stage(n, at_level[depth - 1 - i]) for i, n in enumerate(dec_blk_nums)])
        self.ending = nn.Conv2d(width, img_channel, kernel_size=3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        extra_rows = (self.multiple_px - height % self.multiple_px) % self.multiple_px
        extra_cols = (self.multiple_px - width % self.multiple_px) % self.multiple_px
        image = F.pad(image, (0, extra_cols, 0, extra_rows))
        x = self.intro(image)
        skips: list[Tensor] = []
        for level in range(len(self.encoders)):
            skips.append(self.encoders[level](x))
            x = self.downs[level](skips[-1])
        x = self.middle_blks(x)
        for level in range(len(self.decoders)):
            x = self.decoders[level](self.ups[level](x) + skips.pop())
        return (image + self.ending(x))[:, :, :height, :width]

    def localize(self, train_patch_px: int) -> None:
        """Replace every pool by a local one and show it a training patch, as the official conversion does."""
        for block in self.modules():
            if isinstance(block, ReferenceBlock):
                block.sca[0] = NaiveLocalPool(train_patch_px)
        with torch.no_grad():
            self(torch.zeros(1, self.intro.in_channels, train_patch_px, train_patch_px, dtype=self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return self.intro.weight.dtype
