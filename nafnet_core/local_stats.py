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
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW_PER_PATCH = 1.5  # Chu et al., section 5.1, and the official `base_size`.
_BLOCK_BYTES = 2**20  # rows summed at a time: about a core's second-level cache
_BAND_ROWS = 256  # sums that one product gives, on a GPU


class LocalMean(nn.Module):
    """Mean over height and width: of everything, or in a sliding window once `window_px` is set.

    Attributes:
        window_px: window side in pixels of *this* feature map, or None for the global mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window_px: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Mean of every window that lies inside the map.

        Args:
            x: (N, H, W, C) float.

        Returns:
            (N, 1, 1, C) for the global mean or a window that covers the map, else
            (N, H − window + 1, W − window + 1, C); `spread` brings it to the map's size.
        """
        height, width = x.shape[1:3]
        if self.window_px is None or (self.window_px >= height and self.window_px >= width):
            return _mean(x)
        return window_means(x, self.window_px)


def _mean(x: Tensor) -> Tensor:
    """(N, H, W, C) → (N, 1, 1, C), added up in fp32 whatever the dtype."""
    if x.device.type != "cpu" or x.shape[-1] < 32 or torch.compiler.is_exporting():
        return x.mean(dim=(1, 2), keepdim=True)
    # `mean` copies a bf16 map to fp32 first, and divides a whole map of gradients afterwards: forward and
    # backward 1.2 to 1.7 times as long. With fewer channels the repeated gradient is slow to add.
    return x.sum(dim=(1, 2), keepdim=True) * (1 / (x.shape[1] * x.shape[2]))


def window_means(x: Tensor, window_px: int) -> Tensor:
    """Mean of every square window that lies inside the map.

    An integral image would need fp64: in fp32 its running sums over a 20-megapixel map keep about three
    digits of a window's mean. Here only sums of one window are ever taken; rounding stays at some 1e-7.

    Args:
        x: (N, H, W, C) float.
        window_px: side of the window; cut to the map's size.

    Returns:
        (N, H − window + 1, W − window + 1, C), dtype of `x`.
    """
    rows, cols = (min(window_px, side) for side in x.shape[1:3])
    if not x.requires_grad:
        return (_sliding_means if x.device.type == "cpu" else _banded_means)(x, rows, cols)
    precise = x if x.dtype == torch.float64 else x.float()
    return (_window_sums(_window_sums(precise, rows, dim=1), cols, dim=2) / (rows * cols)).to(x.dtype)


def spread(means: Tensor, size: torch.Size) -> Tensor:
    """Repeat the outermost windows' values up to the map's border, as the official code does.

    Args:
        means: (N, h, w, C), what `LocalMean` returned, or something of it pixel by pixel.
        size: the map's, (N, H, W, C).

    Returns:
        (N, H, W, C), or `means` itself where it broadcasts.
    """
    if means.shape[1:3] in ((1, 1), size[1:3]):
        return means
    missing = [side - inner for side, inner in zip(size[1:3], means.shape[1:3], strict=True)]
    top, left = (number // 2 for number in missing)
    margins = (left, missing[1] - left, top, missing[0] - top)
    return F.pad(means.permute(0, 3, 1, 2), margins, mode="replicate").permute(0, 2, 3, 1)


def scale_by_windows_(rows: Tensor, means: Tensor, top: int, height: int) -> None:
    """Multiply some rows of a map by `spread(means)`, in place and without making it.

    Args:
        rows: (N, h, W, C): rows `top` to `top + h` of a map of `height` rows.
        means: what `LocalMean` returned of that map, or something of it pixel by pixel.
    """
    if means.shape[1:3] == (1, 1):
        rows.mul_(means)
        return
    num_rows, width = rows.shape[1:3]
    for row, source_row in _sources(top, top + num_rows, height, means.shape[1]):
        for col, source_col in _sources(0, width, width, means.shape[2]):
            rows[:, row, col].mul_(means[:, source_row, source_col])


def _sources(start: int, stop: int, length: int, inner: int) -> Iterator[tuple[slice, slice]]:
    """Which of `inner` window means belong to pixels `start` to `stop` of an axis of `length`.

    Up to three pieces, before, on and beyond the windows' centres: positions from `start` on, and means.
    """
    first = (length - inner) // 2
    last = first + inner
    for low, high, source in (
        (start, min(stop, first), None),
        (max(start, first), min(stop, last), slice(max(start, first) - first, min(stop, last) - first)),
        (max(start, last), stop, None),
    ):
        if low < high:
            edge = slice(0, 1) if high <= first else slice(inner - 1, inner)
            yield slice(low - start, high - start), source or edge


def _sliding_means(x: Tensor, rows: int, cols: int) -> Tensor:
    """Window means of a map in host memory, a few rows at a time, so that every pass but one is in cache.

    Down the map a row of sums slides: one row of pixels comes in, one goes out. It is summed anew once a
    window's height, else rounding would pile up.
    """
    batch, height, width, channels = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_rows, num_cols = height - rows + 1, width - cols + 1
    means = x.new_empty(batch, num_rows, num_cols, channels)
    block = max(1, _BLOCK_BYTES // (batch * width * channels * dtype.itemsize))
    sums = torch.empty(batch, min(block, num_rows), width, channels, dtype=dtype)
    before = sums[:, 0]
    for first in range(0, num_rows, block):
        last = min(first + block, num_rows)
        coming = x[:, first + rows - 1 : last + rows - 1].to(dtype)
        leaving = x[:, max(0, first - 1) : last - 1].to(dtype)
        for row in range(first, last):
            now = sums[:, row - first]
            if row % rows == 0:
                torch.sum(x[:, row : row + rows], dim=1, dtype=dtype, out=now)
            else:
                torch.add(before, coming[:, row - first], out=now)
                now.sub_(leaving[:, row - max(1, first)])
            before = now
        inside = _window_sums(sums[:, : last - first], cols, dim=2)
        means[:, first:last] = torch.mul(inside, 1 / (rows * cols), out=inside)
    return means


def _banded_means(x: Tensor, rows: int, cols: int) -> Tensor:
    """Window means as products with matrices of zeros and ones: few kernels, and those a GPU's fastest.

    Products add up in fp32. The sums down the map are rounded to the map's dtype, and so are the means.
    """
    batch, height, width, channels = x.shape
    with torch.autocast(x.device.type, enabled=False):
        down = _band_sums(x.reshape(batch, height, width * channels), rows)
        across = _band_sums(down.reshape(-1, width, channels), cols)
    return across.reshape(batch, height - rows + 1, width - cols + 1, channels) * (1 / (rows * cols))


def _band_sums(x: Tensor, window: int) -> Tensor:
    """Sum over every run of `window` entries of the middle axis: (B, L, K) → (B, L − window + 1, K).

    A product a block of sums, with the few entries it needs: work grows with the map, not with its square.
    """
    length = x.shape[1] - window + 1
    # A CUDA graph has to make its own: the cache may drop one while the graph still reads there.
    is_recorded = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    make = _band.__wrapped__ if is_recorded else _band
    band = make(min(_BAND_ROWS, length), window, x.dtype, x.device)
    sums = []
    for start in range(0, length, _BAND_ROWS):
        number = min(_BAND_ROWS, length - start)
        entries = number + window - 1
        block = band[:number, :entries].expand(len(x), -1, -1)
        sums.append(torch.bmm(block, x[:, start : start + entries]))
    return torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]


@lru_cache(maxsize=64)
def _band(number: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(number, number + window − 1): row i is one from i to i + window − 1."""
    with torch.inference_mode(False):
        ones = torch.ones(number, number + window - 1, dtype=dtype, device=device)
        return ones.triu().tril(window - 1)


def _window_sums(x: Tensor, window: int, *, dim: int) -> Tensor:
    """Sum over every run of `window` entries along `dim`, from sums over runs of 1, 2, 4, … entries.

    Additions only, log2(window) of them an entry: no cancellation, and no error that grows with the map.
    """
    length = x.shape[dim] - window + 1
    total, done, run, run_length = None, 0, x, 1
    while True:
        if window & run_length:
            part = run.narrow(dim, done, length)
            total = part if total is None else total + part
            done += run_length
        if done == window:
            assert total is not None
            return total
        kept = run.shape[dim] - run_length
        run = run.narrow(dim, 0, kept) + run.narrow(dim, run_length, kept)
        run_length *= 2


@contextmanager
def local_statistics(model: nn.Module, train_patch_px: int | None) -> Iterator[None]:
    """Run `model` with TLC inside the `with` block; the statistics used before come back afterwards.

    Args:
        model: a NAFNet.
        train_patch_px: side of the patches that it was trained on; None turns TLC off.
    """
    pools = list(_pools_with_stride(model))
    windows_before = [pool.window_px for pool, _ in pools]
    try:
        for pool, stride in pools:
            pool.window_px = train_patch_px and max(1, int(train_patch_px * WINDOW_PER_PATCH) // stride)
        yield
    finally:
        for (pool, _), window_px in zip(pools, windows_before, strict=True):
            pool.window_px = window_px


def _pools_with_stride(model: nn.Module) -> Iterator[tuple[LocalMean, int]]:
    """Each pool with the downsampling at its place, read from the module's name; there may be none."""
    for name, module in model.named_modules():
        if isinstance(module, LocalMean):
            num_stages = len(model.encoders)  # type: ignore[arg-type]
            part, _, rest = name.partition(".")
            stage = int(rest.split(".", 1)[0])
            level = {"encoders": stage, "middle_blks": num_stages, "decoders": num_stages - 1 - stage}
            yield module, 2 ** level[part]
