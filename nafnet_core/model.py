"""NAFNet, as in Chen et al., "Simple Baselines for Image Restoration", ECCV 2022.

    from nafnet_core import NAFNet, PRESETS
    model = NAFNet(PRESETS["width32"])

Module names, and so state-dict keys, are those of the official code, so its weights load as they are.
Tensors are NCHW in shape and NHWC (`channels_last`) in memory: 1×1 convolutions, the norm over channels
and the gate then all read contiguous channels, which measures faster than NCHW on CPU and GPU alike. Inside a
block they are NHWC in shape too: to turn a view for each layer took 4 % of a step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nafnet_core.int8 import Int8
from nafnet_core.local_stats import LocalMean, spread


@dataclass(frozen=True, kw_only=True, slots=True)
class NAFNetConfig:
    """Shape of a network; everything that its weights do not say by themselves.

    Raises `ValueError` where the numbers cannot be a network.
    """

    width: int
    """Channels after `intro`; doubled at each encoder stage."""
    enc_blk_nums: tuple[int, ...]
    """Blocks in each encoder stage; one 2× downsampling follows each."""
    middle_blk_num: int
    """Blocks at the lowest resolution."""
    dec_blk_nums: tuple[int, ...]
    """Blocks in each decoder stage, lowest resolution first; as many stages as the encoder has."""
    img_channel: int = 3
    """Image channels: 3 for RGB."""
    dw_expand: int = 2
    """Channel expansion before the depthwise convolution."""
    ffn_expand: int = 2
    """Channel expansion of the feed-forward half."""
    dw_channels: tuple[int, ...] | None = None
    """Channels behind the first gate of each block, in the order of the forward pass, where pruning took
    some; None: half of the expanded channels, in all of them."""
    ffn_channels: tuple[int, ...] | None = None
    """The same of the second gate."""
    int8_layers: tuple[str, ...] | None = None
    """Names of the convolutions, as modules, that compute on grids of 8 bits; None: none does."""

    def __post_init__(self) -> None:
        for name in ("enc_blk_nums", "dec_blk_nums", "dw_channels", "ffn_channels", "int8_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.enc_blk_nums) != len(self.dec_blk_nums):
            raise ValueError(
                f"encoder and decoder need as many stages: {self.enc_blk_nums} and {self.dec_blk_nums}"
            )
        if min(self.width, self.img_channel, self.dw_expand, self.ffn_expand) < 1:
            raise ValueError(f"width, channels and expansions must be at least 1: {self}")
        if self.width * self.dw_expand % 2 or self.width * self.ffn_expand % 2:
            raise ValueError(f"the gate halves the expanded channels, which must be even: {self}")
        if min(self.middle_blk_num, *self.enc_blk_nums, *self.dec_blk_nums, 0) < 0:
            raise ValueError(f"block counts cannot be negative: {self}")
        for name in ("dw_channels", "ffn_channels"):
            channels = getattr(self, name)
            if channels is not None and (len(channels) != self.num_blocks or min(channels, default=1) < 1):
                raise ValueError(f"{name} needs {self.num_blocks} numbers of at least 1: {channels}")

    @property
    def num_blocks(self) -> int:
        """In the whole network."""
        return sum(self.enc_blk_nums) + self.middle_blk_num + sum(self.dec_blk_nums)

    def gated_channels(self) -> list[tuple[int, int, int]]:
        """Of each block, in the order of the forward pass: its channels, and those behind its two gates."""
        stages = len(self.enc_blk_nums)
        widths = [
            self.width * 2**level
            for level, number in (
                *enumerate(self.enc_blk_nums),
                (stages, self.middle_blk_num),
                *((stages - 1 - stage, number) for stage, number in enumerate(self.dec_blk_nums)),
            )
            for _ in range(number)
        ]
        dw = self.dw_channels or [width * self.dw_expand // 2 for width in widths]
        ffn = self.ffn_channels or [width * self.ffn_expand // 2 for width in widths]
        return list(zip(widths, dw, ffn, strict=True))

    @property
    def stride_px(self) -> int:
        """Height and width are padded to a multiple of this inside `forward`."""
        return 2 ** len(self.enc_blk_nums)

    def num_macs(self, height_px: int, width_px: int) -> int:
        """Multiply-accumulates of the convolutions for one image, which is what papers count."""
        stride = self.stride_px
        pixels = -(-height_px // stride) * stride * -(-width_px // stride) * stride
        total = 2 * 9 * self.img_channel * self.width * pixels  # intro, ending
        # Down, 2×2 pixels into one, and up, 1×1 before the shuffle, take as many at each level.
        total += len(self.enc_blk_nums) * 4 * self.width**2 * pixels
        for channels, dw, ffn in self.gated_channels():
            at_level = pixels * self.width**2 // channels**2
            total += at_level * (3 * channels * (dw + ffn) + 18 * dw) + dw**2  # attention on one pixel
        return total

    def to_dict(self) -> dict[str, object]:
        """Plain values, as written beside weights; of pruning and quantisation only where there was some."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value is not None
        }


PRESETS: dict[str, NAFNetConfig] = {
    # Official GoPro networks (megvii-research/NAFNet, options/train/GoPro): 17.1 M and 67.9 M parameters.
    "width32": NAFNetConfig(
        width=32, enc_blk_nums=(1, 1, 1, 28), middle_blk_num=1, dec_blk_nums=(1, 1, 1, 1)
    ),
    "width64": NAFNetConfig(
        width=64, enc_blk_nums=(1, 1, 1, 28), middle_blk_num=1, dec_blk_nums=(1, 1, 1, 1)
    ),
    # 0.79 M parameters: for phones, CPUs and the demo. Not a network of the paper.
    "mobile": NAFNetConfig(width=16, enc_blk_nums=(2, 2, 4), middle_blk_num=4, dec_blk_nums=(2, 2, 2)),
    # 0.78 M, the bundled model's: no blocks at the image's own resolution, half of the time of `mobile`.
    # After as many samples 0.06 dB less, in 0.43 of the time: benchmarks/mobile_v1.
    "compact": NAFNetConfig(width=16, enc_blk_nums=(0, 2, 4), middle_blk_num=4, dec_blk_nums=(2, 2, 0)),
}


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel (the paper's LN; section 3.2).

    Statistics are taken in fp32 whatever the input's dtype.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """(N, H, W, C) → same shape and dtype."""
        shape = self.normalized_shape
        # Under autocast a norm would return fp32, and every later sum with it: keep the input's dtype.
        if input.device.type == "cpu":
            # What CPU autocast leaves alone, and what takes fp32 weights with a bf16 map.
            return torch.native_layer_norm(input, shape, self.weight, self.bias, self.eps)[0]
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, shape, weight, bias, self.eps)


class SimpleGate(nn.Module):
    """Product of the two halves of the channels (section 3.3): (N, H, W, 2C) → (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return first * second


class Conv(nn.Conv2d):
    """A convolution that may compute on grids of 8 bits.

    Attributes:
        int8: its grids; None: it computes in its own precision.
    """

    def __init__(
        self, *sizes: int, stride: int = 1, padding: int = 0, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(*sizes, stride=stride, padding=padding, groups=groups, bias=bias)
        self.int8: Int8 | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        return self._convolved(input, self.padding)

    def _convolved(self, input: Tensor, padding: str | tuple[int, ...]) -> Tensor:
        if self.int8 is None:
            return F.conv2d(input, self.weight, self.bias, self.stride, padding, groups=self.groups)
        input, weight = self.int8.input(input), self.int8.weight(self.weight)
        return self.int8.output(F.conv2d(input, weight, self.bias, self.stride, padding, groups=self.groups))


class PointwiseConv(Conv):
    """1×1 convolution whose result may be scaled by channel at no cost: the scale goes into the weights."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, input: Tensor, scale: Tensor | None = None) -> Tensor:
        """(N, H, W, C) → (N, H, W, C'), times `scale` of shape (1, C', 1, 1)."""
        if self.int8 is not None:
            rounded = self._convolved(input.permute(0, 3, 1, 2), self.padding).permute(0, 2, 3, 1)
            return rounded if scale is None else rounded * scale.flatten()
        matrix, bias = self.weight.flatten(1), self.bias
        if scale is not None:
            matrix = matrix * scale.reshape(-1, 1)
            bias = None if bias is None else bias * scale.flatten()
        if _is_sooner_as_product(input):
            return F.linear(input, matrix, bias)
        return F.conv2d(input.permute(0, 3, 1, 2), matrix[..., None, None], bias).permute(0, 2, 3, 1)


class DepthwiseConv(Conv):
    """3×3 convolution of each channel by itself, zeros around the map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, input: Tensor, *, has_rows: bool = False) -> Tensor:
        """(N, H, W, C) → same shape; (N, H − 2, W, C) where the rows around the map are in it already."""
        padding = (0, 1) if has_rows else self.padding
        return self._convolved(input.permute(0, 3, 1, 2), padding).permute(0, 2, 3, 1)


class Upsample(nn.Sequential):
    """Twice the sides and half the channels: (N, C, H, W) → (N, C / 2, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(PointwiseConv(channels, 2 * channels, bias=False), nn.PixelShuffle(2))

    def forward(self, input: Tensor) -> Tensor:
        expand, shuffle = self
        return shuffle(expand(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def _is_sooner_as_product(x: Tensor) -> bool:
    """Whether a matrix product beats oneDNN's convolution, which rearranges its weights at every call.

    Measured forward and backward with 16 to 512 channels: 2 to 3 times at a few pixels. In bf16 still 1.3
    times at 512 pixels and 1.2 at 9,216, but 0.9 at 32,768; in fp32 it loses from 128 pixels on.
    """
    if torch.compiler.is_exporting():  # an exported graph takes any size
        return False
    if x.device.type != "cpu":
        # Then the bias is added on the way out, not in a pass of its own. In fp32 cuDNN takes TF32 unasked.
        return x.dtype != torch.float32 or bool(torch.backends.cuda.matmul.allow_tf32)
    num_pixels = x.shape[0] * x.shape[1] * x.shape[2]
    return num_pixels <= (16_384 if x.dtype == torch.bfloat16 else 16)


class NAFBlock(nn.Module):
    """One block (figure 3c): a gated depthwise half with channel attention, then a gated pointwise half.

    Args:
        channels: of its input and output.
        dw, ffn: channels behind the first and the second gate; in the paper as many as `channels`.
    """

    def __init__(self, channels: int, dw: int, ffn: int) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels)
        self.conv1 = PointwiseConv(channels, 2 * dw)
        self.conv2 = DepthwiseConv(2 * dw)
        self.sg = SimpleGate()
        # Simplified channel attention: a linear layer on the channel means ("dynamic weights").
        self.sca = nn.Sequential(LocalMean(), PointwiseConv(dw, dw))
        self.conv3 = PointwiseConv(dw, channels)
        self.norm2 = ChannelLayerNorm(channels)
        self.conv4 = PointwiseConv(channels, 2 * ffn)
        self.conv5 = PointwiseConv(ffn, channels)
        # Zero at the start: the block is the identity. A test that does not redraw these tests nothing.
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → same shape."""
        x = x.permute(0, 2, 3, 1)
        y = self.sg(self.conv2(self.conv1(self.norm1(x))))
        # 1×1 convolution first, repetition towards the border after: the same values on fewer pixels.
        x = x + self.conv3(y * spread(self.sca(y), y.shape), scale=self.beta)
        x = x + self.conv5(self.sg(self.conv4(self.norm2(x))), scale=self.gamma)
        return x.permute(0, 3, 1, 2)


class NAFNet(nn.Module):
    """The whole U-shaped network; it predicts the correction added to its input.

    Args:
        config: its shape; see `PRESETS`. Raises `ValueError` where `int8_layers` names what it does not have.

    Attributes:
        checkpoint_activations: in training keep only what enters each block and compute the rest again in the
            backward pass (Chen et al. 2016): less memory for more time.
    """

    def __init__(self, config: NAFNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False

        shapes = iter(config.gated_channels())

        def blocks(number: int) -> nn.Sequential:
            return nn.Sequential(*(NAFBlock(*next(shapes)) for _ in range(number)))

        channels = config.width
        self.intro = Conv(config.img_channel, channels, 3, padding=1)
        self.ending = Conv(channels, config.img_channel, 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        for number in config.enc_blk_nums:
            self.encoders.append(blocks(number))
            self.downs.append(Conv(channels, 2 * channels, 2, stride=2))
            channels *= 2
        self.middle_blks = blocks(config.middle_blk_num)
        for number in config.dec_blk_nums:
            self.ups.append(Upsample(channels))
            channels //= 2
            self.decoders.append(blocks(number))
        for module in self.modules():
            # Convolutions only, and no matrices: others would get strides that their gradients do not have,
            # and DDP copies.
            if isinstance(module, nn.Conv2d) and not isinstance(module, PointwiseConv):
                module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        convolutions = self.convolutions
        if unknown := set(config.int8_layers or ()) - set(convolutions):
            raise ValueError(f"no convolutions of this network: {', '.join(sorted(unknown))}")
        for name in config.int8_layers or ():
            convolutions[name].int8 = Int8()

    def forward(self, lq: Tensor) -> Tensor:
        """Restore a batch.

        Args:
            lq: (N, C, H, W) float, RGB in 0…1, any height and width of at least 1 px. Sizes that are no
                multiple of `config.stride_px` are padded with zeros at the right and bottom and cropped
                afterwards, as the official code does.

        Returns:
            The restored batch in the input's shape, not clipped.
        """
        height, width = lq.shape[-2:]
        stride = self.config.stride_px
        padded = F.pad(lq, (0, -width % stride, 0, -height % stride))
        x = self.intro(padded.contiguous(memory_format=torch.channels_last))
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = self._through(encoder, x)
            skips.append(x)
            x = down(x)
        x = self._through(self.middle_blks, x)
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            x = self._through(decoder, up(x) + skip)
        return (self.ending(x) + padded)[..., :height, :width]

    def _through(self, blocks: nn.Module, x: Tensor) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return blocks(x)
        for block in blocks.children():
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
        return x

    @property
    def convolutions(self) -> dict[str, Conv]:
        """All convolutions by name, as modules are registered."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Conv)}

    @property
    def is_recordable(self) -> bool:
        """Whether passes can become CUDA graphs: torch checks grids of 8 bits on the host."""
        return not self.config.int8_layers

    @property
    def blocks(self) -> list[NAFBlock]:
        """All blocks, in the order of the forward pass."""
        stages = (*self.encoders, self.middle_blks, *self.decoders)
        return [block for stage in stages for block in stage.children() if isinstance(block, NAFBlock)]

    @property
    def num_parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(parameter.numel() for parameter in self.parameters())


def randomize_residual_scales(model: nn.Module, *, seed: int, scale: float = 0.5) -> None:
    """Draw every block's `beta` and `gamma` from N(0, scale²), in place.

    A fresh network is the identity (they start at zero), so a check of parity, tiling or precision on it
    proves nothing. This is for such checks, and for timing with realistic values.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] in ("beta", "gamma"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
