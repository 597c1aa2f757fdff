"""Test-time local statistics (TLC): Chu et al., "Improving Image Restoration by Revisiting Global
Information Aggregation", ECCV 2022.

Channel attention averages over the whole input. Trained on patches and run on a full image, it meets
statistics that it never saw. TLC replaces that mean by one over a window of 1.5 × the training patch
(the official `NAFNetLocal`). The window is fixed in pixels of the network's input, so a tile and the
whole image use the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW_PER_PATCH = 1.5  # Chu et al., section 5.1, and the official `base_size`.


class LocalMean(nn.Module):
    """Mean over height and width: of everything, or in a sliding window once `window_px` is set.

    Attributes:
        window_px: window side in pixels of *this* feature map, or None for the global mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window_px: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, 1, 1) for the global mean, else (N, C, H, W)."""
        height, width = x.shape[-2:]
        if self.window_px is None or (self.window_px >= height and self.window_px >= width):
            return x.mean(dim=(2, 3), keepdim=True)
        return box_mean(x, self.window_px)


def box_mean(x: Tensor, window_px: int) -> Tensor:
    """Mean over the square window around each pixel, replicated where the window leaves the image.

    The integral image is built in fp64: in fp32 the running sums of a 20-megapixel map keep about three
    digits of a window's mean.

    Args:
        x: (N, C, H, W) float.
        window_px: side of the window; cut to the map's size.

    Returns:
        (N, C, H, W), dtype of `x`.
    """
    height, width = x.shape[-2:]
    rows, cols = min(window_px, height), min(window_px, width)
    integral = F.pad(x.double().cumsum(-1).cumsum_(-2), (1, 0, 1, 0))
    inner = (
        integral[..., rows:, cols:]
        + integral[..., :-rows, :-cols]
        - integral[..., :-rows, cols:]
        - integral[..., rows:, :-cols]
    ) / (rows * cols)
    top, left = (height - inner.shape[-2]) // 2, (width - inner.shape[-1]) // 2
    padding = (
        left,
        width - inner.shape[-1] - left,
        top,
        height - inner.shape[-2] - top,
    )
    inner = inner.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return F.pad(inner, padding, mode="replicate")


@contextmanager
def local_statistics(model: nn.Module, train_patch_px: int | None) -> Iterator[None]:
    """Run `model` with TLC inside the `with` block; the statistics used before come back afterwards.

    Args:
        model: a NAFNet.
        train_patch_px: side of the patches that it was trained on; None leaves TLC off.
    """
    if train_patch_px is None:
        yield
        return
    pools = list(_pools_with_stride(model))
    windows_before = [pool.window_px for pool, _ in pools]
    try:
        for pool, stride in pools:
            pool.window_px = max(1, int(train_patch_px * WINDOW_PER_PATCH) // stride)
        yield
    finally:
        for (pool, _), window_px in zip(pools, windows_before, strict=True):
            pool.window_px = window_px


def _pools_with_stride(model: nn.Module) -> Iterator[tuple[LocalMean, int]]:
    """Each pool with the downsampling at its place, read from the module's name."""
    num_stages = len(model.encoders)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if isinstance(module, LocalMean):
            part, _, rest = name.partition(".")
            stage = int(rest.split(".", 1)[0])
            level = {"encoders": stage, "middle_blks": num_stages, "decoders": num_stages - 1 - stage}
            yield module, 2 ** level[part]
