"""PSNR and SSIM by one documented protocol, on batches of 8-bit RGB images.

Protocol `rgb8` version 1: clip to 0…1, scale to 0…255, round, and compare as 8-bit RGB with data range 255.
PSNR over all pixels and channels of an image; SSIM as Wang et al. 2004 (gaussian 11×11, σ 1.5, K 0.01 and
0.03, population covariance) averaged over the region where the window fits, which equals scikit-image's
`structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`. torchmetrics reflects
the border and averages over that too, which moves the third digit.
A data set's score is the mean of its images' scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

PROTOCOL_NAME, PROTOCOL_VERSION = "rgb8", 1
SSIM_WINDOW_PX = 11
_SSIM_SIGMA = 1.5


def to_uint8(image: Tensor) -> Tensor:
    """0…1 float of any shape → uint8 of the same shape: clipped, scaled, rounded half to even."""
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def psnr(restored: Tensor, gt: Tensor, *, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio of each image.

    Args:
        restored, gt: (N, C, H, W), same shape, any real dtype.
        data_range: the largest possible value, 255 or 1.0; never guessed.

    Returns:
        (N,) float64 in dB; infinite where the two are equal.

    Raises:
        ValueError: shapes differ.
    """
    _check_pair(restored, gt)
    mse = (restored.double() - gt.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(data_range**2 / mse)


def ssim(restored: Tensor, gt: Tensor, *, data_range: float) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), mean over channels.

    Args:
        restored, gt: (N, C, H, W), same shape, any real dtype, at least 11 px a side.
        data_range: the largest possible value, 255 or 1.0; never guessed.

    Returns:
        (N,) float64, at most 1.

    Raises:
        ValueError: shapes differ, or an image is smaller than the 11 px window.
    """
    _check_pair(restored, gt)
    if min(gt.shape[-2:]) < SSIM_WINDOW_PX:
        raise ValueError(f"SSIM needs images of at least 11 px a side, got {tuple(gt.shape[-2:])}")
    # fp64, for E[x²] − E[x]²: in fp32 dark and saturated flats are off by 6e-5, and may score above 1.
    x, y = restored.double(), gt.double()
    num_images = len(x)
    maps = torch.cat([x, y, x * x, y * y, x * y])
    mean_x, mean_y, xx, yy, xy = _gaussian_valid(maps).unflatten(0, (5, num_images)).unbind(0)
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    scores = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return scores.mean(dim=(1, 2, 3))


class RunningMean:
    """Mean of one value an image, the same to the last bit however images are batched and shared out.

    Sums of floats depend on their order; so the values are kept, eight bytes an image, and summed exactly.
    """

    def __init__(self) -> None:
        self._values: list[float] = []

    def update(self, values: Tensor | Iterable[float]) -> None:
        """Take in (N,) values. Raises `ValueError` where they have another shape."""
        if isinstance(values, Tensor) and values.dim() != 1:
            raise ValueError(f"expected (N,) values, got {tuple(values.shape)}")
        self._values += values.tolist() if isinstance(values, Tensor) else values

    def across_workers(self) -> RunningMean:
        """The mean over all workers of the process group, on each of them; every one must call it."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        shares: list[list[float]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, self._values)
        whole = RunningMean()
        for share in shares:
            whole.update(share)
        return whole

    def __len__(self) -> int:
        return len(self._values)

    @property
    def value(self) -> float:
        """The mean; NaN of nothing. An infinite value makes it infinite, two of either sign NaN."""
        if not self._values:
            return math.nan
        is_finite = all(map(math.isfinite, self._values))
        return (math.fsum(self._values) if is_finite else sum(self._values)) / len(self._values)


def _gaussian_valid(x: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=torch.float64) - SSIM_WINDOW_PX // 2
    taps = torch.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    weights = (taps / taps.sum()).tolist()
    # Sums of shifted views: `conv2d` takes ten times as long here, and unfolds fp64 input in memory.
    for dim in (-2, -1):
        length = x.shape[dim] - SSIM_WINDOW_PX + 1
        total = x.narrow(dim, 0, length) * weights[0]
        for start, weight in enumerate(weights[1:], start=1):
            total.add_(x.narrow(dim, start, length), alpha=weight)
        x = total
    return x


def _check_pair(restored: Tensor, gt: Tensor) -> None:
    if restored.shape != gt.shape or gt.dim() != 4:
        raise ValueError(
            f"expected two (N, C, H, W) batches of one shape, "
            f"got {tuple(restored.shape)} and {tuple(gt.shape)}"
        )
