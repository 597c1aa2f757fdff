"""NAFNet image deblurring: the network, its losses, metrics and data transforms. No Ray, no MLflow.

from nafnet_core import load_model, restore_image
model, metadata = load_model("model.safetensors")
restored = restore_image(model, rgb_hwc_u8, train_patch_px=metadata["train_patch_px"])
"""

from nafnet_core.errors import (
    CapabilityError,
    GateError,
    InputError,
    NAFNetError,
    StoppedError,
)
from nafnet_core.model import PRESETS, NAFNet, NAFNetConfig, randomize_residual_scales
from nafnet_core.tiling import restore_image
from nafnet_core.weights import load_model, save_model

__all__ = [
    "PRESETS",
    "CapabilityError",
    "GateError",
    "InputError",
    "StoppedError",
    "NAFNet",
    "NAFNetConfig",
    "NAFNetError",
    "load_model",
    "randomize_residual_scales",
    "restore_image",
    "save_model",
]
