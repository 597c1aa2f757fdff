"""Training losses on (N, C, H, W) batches in 0…1; each returns one value an image.

Per-image values let uneven slices of a global batch be weighted by count (see `mixed_loss`).
Losses are computed in fp32 whatever the network's precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
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


def fft(restored: Tensor, gt: Tensor) -> Tensor:
    """Mean absolute difference of the spectra's real and imaginary parts: (N, C, H, W) ×2 → (N,).

    The frequency loss of MIMO-UNet (Cho et al. 2021), on an orthonormal transform, so that its size does not
    depend on the patch's: a weight of 0.1 on unscaled spectra is one of 0.1 · √(H·W) here.
    """
    spectrum = torch.view_as_real(torch.fft.rfft2(restored - gt, norm="ortho"))
    return spectrum.abs().mean(dim=(1, 2, 3, 4))


def edge(restored: Tensor, gt: Tensor) -> Tensor:
    """Charbonnier loss of the Laplacians: (N, C, H, W) ×2 → (N,).

    The edge loss of MPRNet (Zamir et al. 2021): the Laplacian is what the first level of a
    pyramid (Burt & Adelson 1983) takes away, and linear, so one of the difference will do.
    """
    difference = restored - gt
    coarse = torch.zeros_like(difference)
    coarse[..., ::2, ::2] = 4 * _smoothed(difference)[..., ::2, ::2]
    laplacian = difference - _smoothed(coarse)
    return (laplacian.square() + 1e-6).sqrt().mean(dim=(1, 2, 3))


def _smoothed(x: Tensor) -> Tensor:
    channels = x.shape[1]
    kernel = _burt_adelson(x.dtype, x.device).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=channels)


@lru_cache(maxsize=8)
def _burt_adelson(dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept, for a copy to a GPU waits for all that runs there.
    with torch.inference_mode(False):
        taps = torch.tensor([0.05, 0.25, 0.4, 0.25, 0.05], dtype=dtype, device=device)
        return torch.outer(taps, taps)


LOSSES: dict[str, Loss] = {
    "l1": l1,
    "l2": l2,
    "charbonnier": charbonnier,
    "psnr": psnr_loss,
    "fft": fft,
    "edge": edge,
}


def mixed_loss(weights: Mapping[str, float], *, perceptual: Loss | None = None) -> Loss:
    """Weighted sum of named losses.

    Args:
        weights: name to weight, for example `{"l1": 1.0, "fft": 0.1}`.
        perceptual: the loss of that name (see `nafnet_core.perceptual`), which needs a network's weights.

    Returns:
        A function (restored, gt) → (N,) fp32.

    Raises:
        ValueError: an unknown name, or no loss at all.
    """
    losses = LOSSES if perceptual is None else {**LOSSES, "perceptual": perceptual}
    unknown = sorted(set(weights) - set(losses))
    if unknown or not weights:
        raise ValueError(f"unknown losses {unknown}; known: {sorted(losses)}")

    def total(restored: Tensor, gt: Tensor) -> Tensor:
        restored, gt = restored.float(), gt.float()
        terms = [weight * losses[name](restored, gt) for name, weight in weights.items()]
        return torch.stack(terms).sum(dim=0)

    return total
