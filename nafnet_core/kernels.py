"""Blur kernels: camera shake, defocus, gaussian, and measured ones made ready to use.

Each is (K, K) float32 with K odd, non-negative, of sum 1, its centre of mass in the middle. A gaussian's taps
are (K,), of sum 1: the kernel is their outer product.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Kernel = NDArray[np.float32]
Taps = NDArray[np.float32]
Path = NDArray[np.complex128]

_SHAKE_STEPS = 256
_OVERSAMPLING = 4


def shake_kernel(rng: np.random.Generator, extent_px: float) -> Kernel:
    """Kernel of a hand-held exposure, the same all over the image; see `shake_path`.

    Args:
        rng: draws the trajectory.
        extent_px: diagonal of the path's bounding box, at least 0.
    """
    return rasterized(shake_path(rng, extent_px))


def shake_path(rng: np.random.Generator, extent_px: float) -> Path:
    """Where a point moves in a hand-held exposure: its direction drifts, and now and then it jerks.

    After the trajectory model of Boracchi & Foi 2012 ("Modeling the performance of image restoration from
    motion blur", section III): constant speed, a random force, a pull back to the start, rare jerks. The
    path is scaled to `extent_px` afterwards, so that the strength is known whatever way it winds.

    Args:
        rng: draws the trajectory.
        extent_px: diagonal of the path's bounding box, at least 0.

    Returns:
        (256,) complex, x + iy in pixels, of mean 0: equal times apart.
    """
    anxiety = rng.uniform(0, 0.12)
    pull = rng.uniform(0, 0.7) / _SHAKE_STEPS
    jerk_probability = rng.uniform(0, 1.5) / _SHAKE_STEPS
    tremor = rng.standard_normal((_SHAKE_STEPS, 2)) @ np.array([1, 1j])
    jerks = rng.random(_SHAKE_STEPS) < jerk_probability
    turns = np.exp(1j * rng.uniform(0, 2 * np.pi, _SHAKE_STEPS))
    velocity, path = turns[0], np.zeros(_SHAKE_STEPS, dtype=np.complex128)
    for step in range(1, _SHAKE_STEPS):
        velocity += anxiety * (tremor[step] - pull * path[step - 1])
        if jerks[step]:
            velocity += 2 * turns[step]
        velocity /= max(abs(velocity), 1e-9)
        path[step] = path[step - 1] + velocity
    extent = abs(complex(np.ptp(path.real), np.ptp(path.imag)))
    path *= extent_px / max(extent, 1e-9)
    return path - path.mean()


def disc_kernel(diameter_px: float) -> Kernel:
    """Kernel of a defocused lens: an anti-aliased disc; (K, K) float32."""
    side = _odd_side(diameter_px)
    grid = (np.arange(side * _OVERSAMPLING) + 0.5) / _OVERSAMPLING - side / 2
    disc = (grid[:, None] ** 2 + grid[None, :] ** 2 <= (max(diameter_px, 1.0) / 2) ** 2).astype(np.float32)
    return _normalized(
        disc.reshape(side, _OVERSAMPLING, side, _OVERSAMPLING).mean(axis=(1, 3), dtype=np.float32)
    )


def gaussian_kernel(sigma_px: float) -> Kernel:
    """Isotropic gaussian cut at 3 σ; (K, K) float32."""
    taps = gaussian_taps(sigma_px)
    return _normalized(np.outer(taps, taps))


def gaussian_taps(sigma_px: float) -> Taps:
    """One row of the gaussian, cut at 3 σ; (K,) float32."""
    side = _odd_side(6 * sigma_px)
    taps = cv2.getGaussianKernel(side, max(sigma_px, 1e-3), cv2.CV_32F)
    return _normalized(taps[:, 0].astype(np.float32))


def centred(kernel: NDArray[np.floating]) -> Kernel:
    """Normalise a measured kernel: sum 1, centre of mass moved to the middle (sub-pixel), odd side.

    Raises:
        ValueError: it is not two-dimensional, has a negative or non-finite value, or is all zero.
    """
    if (
        kernel.ndim != 2
        or not kernel.size
        or not np.isfinite(kernel).all()
        or kernel.min() < 0
        or kernel.sum() <= 0
    ):
        raise ValueError("a blur kernel is a 2-D array of non-negative numbers, not all zero")
    rows, cols = np.nonzero(kernel)
    weights = kernel[rows, cols].astype(np.float64)
    points = (cols + 1j * rows) - np.average(cols + 1j * rows, weights=weights)
    return rasterized(points, weights)


def rasterized(points: Path, weights: NDArray[np.float64] | None = None) -> Kernel:
    """Kernel that spreads a point over `points` (x + iy, around 0), splatted bilinearly."""
    reach = max(np.abs(points.real).max(), np.abs(points.imag).max())
    half = int(np.ceil(reach)) + 1
    side = 2 * half + 1
    x, y = points.real + half, points.imag + half
    left, top = np.floor(x), np.floor(y)
    right_share, bottom_share = x - left, y - top
    top_left = (top * side + left).astype(np.intp)
    upper, lower = 1 - bottom_share, bottom_share
    if weights is not None:
        upper, lower = weights * upper, weights * lower
    places = np.concatenate([top_left, top_left + 1, top_left + side, top_left + side + 1])
    shares = [upper * (1 - right_share), upper * right_share, lower * (1 - right_share), lower * right_share]
    kernel = np.bincount(places, np.concatenate(shares), minlength=side * side)
    return _normalized(kernel.astype(np.float64).reshape(side, side))


def _normalized(kernel: NDArray[np.floating]) -> Kernel:
    return (kernel / kernel.sum()).astype(np.float32)


def _odd_side(extent_px: float) -> int:
    return 2 * int(np.ceil(max(extent_px, 1.0) / 2)) + 1
