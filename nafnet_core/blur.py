"""Synthetic degradation: blur kernels, and the camera that records through them.

A sharp photo is taken to linear light, blurred by a kernel, given shot and read noise, and brought back.
Everything is a function of the generator that is handed in, so the same seed gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Kernel = NDArray[np.float32]
BlurKind = Literal["shake", "defocus", "gaussian", "measured"]

GAMMA = 2.2  # Camera response assumed by GoPro's authors (Nah et al., CVPR 2017, section 2).
_SHAKE_STEPS = 256
_OVERSAMPLING = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Degradation:
    """Everything drawn for one image, apart from the noise itself."""

    kind: BlurKind
    size_px: float
    """Extent of the blur: diagonal of a shake's path, diameter of a defocus disc, σ of a gaussian."""
    shot_noise: float
    """Variance of the photon noise at full white in linear light, 1.0 being white."""
    read_noise: float
    """Standard deviation of the read-out noise in linear light."""
    highlight_gain: float
    """How much brighter than white clipped highlights are taken to have been; 1 keeps them."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def draw_degradation(
    rng: np.random.Generator,
    *,
    kinds: Sequence[BlurKind],
    min_size_px: float,
    max_size_px: float,
    max_noise: float,
) -> Degradation:
    """Draw the parameters of one degradation.

    Args:
        rng: the only source of randomness.
        kinds: blur kinds, all equally likely.
        min_size_px, max_size_px: range of a shake's extent; discs take half of it, gaussians a sixth,
            which look about as strong.
        max_noise: upper end of the read noise; the shot noise variance reaches a tenth of it. 0 for none.
    """
    kind = kinds[int(rng.integers(len(kinds)))]
    size = float(rng.uniform(min_size_px, max_size_px))
    share = {"shake": 1.0, "measured": 1.0, "defocus": 1 / 2, "gaussian": 1 / 6}[kind]
    return Degradation(
        kind=kind,
        size_px=size * share,
        shot_noise=float(rng.uniform(0, max_noise / 10)),
        read_noise=float(rng.uniform(0, max_noise)),
        highlight_gain=float(rng.uniform(1.0, 2.0)),
    )


def degrade(
    sharp_hwc_u8: NDArray[np.uint8],
    degradation: Degradation,
    rng: np.random.Generator,
    *,
    measured_kernels: Sequence[Kernel] = (),
) -> NDArray[np.uint8]:
    """Blur one image as a camera would.

    Args:
        sharp_hwc_u8: (H, W, 3) RGB, 0…255.
        degradation: what to do; see `draw_degradation`.
        rng: draws the shake's path and the noise.
        measured_kernels: kernels to choose from where `kind` is `measured`.

    Returns:
        (H, W, 3) uint8, aligned with the input: kernels are centred on their centre of mass.

    Raises:
        ValueError: `kind` is `measured` and there are no measured kernels.
    """
    linear = (sharp_hwc_u8.astype(np.float32) / 255) ** GAMMA
    if degradation.highlight_gain > 1:
        # A clipped pixel was brighter than white: unclipped, it smears into the streaks of real night shots.
        linear[sharp_hwc_u8.min(axis=2) >= 254] *= degradation.highlight_gain
    kernel = _kernel_for(degradation, rng, measured_kernels)
    blurred = cv2.filter2D(linear, -1, cv2.flip(kernel, -1), borderType=cv2.BORDER_REFLECT_101).clip(0, None)
    if degradation.shot_noise or degradation.read_noise:
        sigma = np.sqrt(blurred * degradation.shot_noise + degradation.read_noise**2)
        blurred += sigma * rng.standard_normal(blurred.shape, dtype=np.float32)
    encoded = blurred.clip(0, 1) ** (1 / GAMMA)
    return np.rint(encoded * 255).astype(np.uint8)


def shake_kernel(rng: np.random.Generator, extent_px: float) -> Kernel:
    """Kernel of a hand-held exposure: a smooth path whose direction drifts and now and then jerks.

    After the trajectory model of Boracchi & Foi 2012 ("Modeling the performance of image restoration from
    motion blur", section III): constant speed, a random force, a pull back to the start, rare jerks. The
    path is scaled to `extent_px` afterwards, so that the strength is known whatever way it winds.

    Args:
        rng: draws the trajectory.
        extent_px: diagonal of the path's bounding box, at least 0.

    Returns:
        (K, K) float32 with K odd, non-negative, sum 1, centre of mass in the middle.
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
    return _rasterize(path - path.mean())


def disc_kernel(diameter_px: float) -> Kernel:
    """Kernel of a defocused lens: an anti-aliased disc; (K, K) float32, sum 1."""
    side = _odd_side(diameter_px)
    grid = (np.arange(side * _OVERSAMPLING) + 0.5) / _OVERSAMPLING - side / 2
    disc = (grid[:, None] ** 2 + grid[None, :] ** 2 <= (max(diameter_px, 1.0) / 2) ** 2).astype(np.float32)
    return _normalized(
        disc.reshape(side, _OVERSAMPLING, side, _OVERSAMPLING).mean(axis=(1, 3), dtype=np.float32)
    )


def gaussian_kernel(sigma_px: float) -> Kernel:
    """Isotropic gaussian cut at 3 σ; (K, K) float32, sum 1."""
    side = _odd_side(6 * sigma_px)
    taps = cv2.getGaussianKernel(side, max(sigma_px, 1e-3), cv2.CV_32F)
    return _normalized(taps @ taps.T)


def centred(kernel: NDArray[np.floating]) -> Kernel:
    """Normalise a measured kernel: sum 1, centre of mass moved to the middle (sub-pixel), odd side.

    Raises:
        ValueError: it is not two-dimensional, has a negative or non-finite value, or is all zero.
    """
    if kernel.ndim != 2 or not np.isfinite(kernel).all() or kernel.min() < 0 or kernel.sum() <= 0:
        raise ValueError("a blur kernel is a 2-D array of non-negative numbers, not all zero")
    rows, cols = np.nonzero(kernel)
    weights = kernel[rows, cols].astype(np.float64)
    points = (cols + 1j * rows) - np.average(cols + 1j * rows, weights=weights)
    return _rasterize(points, weights)


def _kernel_for(degradation: Degradation, rng: np.random.Generator, measured: Sequence[Kernel]) -> Kernel:
    match degradation.kind:
        case "shake":
            return shake_kernel(rng, degradation.size_px)
        case "defocus":
            return disc_kernel(degradation.size_px)
        case "gaussian":
            return gaussian_kernel(degradation.size_px)
        case "measured":
            if not measured:
                raise ValueError("`measured` blur needs kernels")
            return measured[int(rng.integers(len(measured)))]


def _rasterize(points: NDArray[np.complex128], weights: NDArray[np.float64] | None = None) -> Kernel:
    """Splat points (x + iy, around 0) bilinearly into the smallest odd square that holds them."""
    reach = max(np.abs(points.real).max(), np.abs(points.imag).max())
    half = int(np.ceil(reach)) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1), dtype=np.float64)
    x, y = points.real + half, points.imag + half
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    weights = np.ones(points.shape) if weights is None else weights
    for dy, wy in ((0, 1 - (y - top)), (1, y - top)):
        for dx, wx in ((0, 1 - (x - left)), (1, x - left)):
            np.add.at(kernel, (top + dy, left + dx), weights * wy * wx)
    return _normalized(kernel)


def _normalized(kernel: NDArray[np.floating]) -> Kernel:
    return (kernel / kernel.sum()).astype(np.float32)


def _odd_side(extent_px: float) -> int:
    return 2 * int(np.ceil(max(extent_px, 1.0) / 2)) + 1
