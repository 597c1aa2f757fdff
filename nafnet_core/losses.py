"""Training losses on (N, C, H, W) batches in 0…1; each returns one value an image.

Per-image values let uneven slices of a global batch be weighted by count (see `mixed_loss`).
Losses are computed in fp32 whatever the network's precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def l1(restored: Tensor, gt: Tensor) -> Tensor:
    """Mean absolute error of each image: (N, C, H, W) ×2 → (N,)."""
    return (restored - gt).abs().mean(dim=(1, 2, 3))


def l2(restored: Tensor, gt: Tensor) -> Tensor:
    """Mean squared error of each image: (N, C, H, W) ×2 → (N,)."""
    return (restored - gt).square().mean(dim=(1, 2, 3))


def charbonnier(restored: Tensor, gt: Tensor) -> Tensor:
    """√(d² + ε²) with ε = 1e-3, as in Lai et al. 2017 and MPRNet: (N, C, H, W) ×2 → (N,)."""
    return ((restored - gt).square() + 1e-6).sqrt().mean(dim=(1, 2, 3))


def psnr_loss(restored: Tensor, gt: Tensor) -> Tensor:
    """Negative PSNR in dB of each image, with 1e-8 in the logarithm as in the official `PSNRLoss`."""
    return (10 / math.log(10)) * (l2(restored, gt) + 1e-8).log()


LOSSES: dict[str, Loss] = {
    "l1": l1,
    "l2": l2,
    "charbonnier": charbonnier,
    "psnr": psnr_loss,
}


def mixed_loss(weights: Mapping[str, float]) -> Loss:
    """Weighted sum of named losses.

    Args:
        weights: name to weight, for example `{"l1": 1.0, "psnr": 0.01}`.

    Returns:
        A function (restored, gt) → (N,) fp32.

    Raises:
        ValueError: an unknown name, or no loss at all.
    """
    unknown = sorted(set(weights) - set(LOSSES))
    if unknown or not weights:
        raise ValueError(f"unknown losses {unknown}; known: {sorted(LOSSES)}")

    def total(restored: Tensor, gt: Tensor) -> Tensor:
        restored, gt = restored.float(), gt.float()
        terms = [weight * LOSSES[name](restored, gt) for name, weight in weights.items()]
        return torch.stack(terms).sum(dim=0)

    return total
