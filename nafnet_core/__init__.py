"""NAFNet image deblurring: the network, its losses, metrics and data transforms. No Ray, no MLflow.

    from nafnet_core import load_model, restore_image
    model, metadata = load_model("model.safetensors")
    restored = restore_image(model, rgb_hwc_u8, train_patch_px=metadata["train_patch_px"])

Names are imported on first use: readers of patches and the command line's help need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nafnet_core.errors import (
    CapabilityError,
    GateError,
    InputError,
    NAFNetError,
    StoppedError,
)

if TYPE_CHECKING:
    from nafnet_core.model import PRESETS, NAFNet, NAFNetConfig, randomize_residual_scales
    from nafnet_core.tiling import restore_image
    from nafnet_core.weights import load_model, save_model, save_official

__all__ = [
    "PRESETS",
    "CapabilityError",
    "GateError",
    "InputError",
    "NAFNet",
    "NAFNetConfig",
    "NAFNetError",
    "StoppedError",
    "load_model",
    "randomize_residual_scales",
    "restore_image",
    "save_model",
    "save_official",
]

_HOMES = {
    "PRESETS": "model",
    "NAFNet": "model",
    "NAFNetConfig": "model",
    "randomize_residual_scales": "model",
    "restore_image": "tiling",
    "load_model": "weights",
    "save_model": "weights",
    "save_official": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
