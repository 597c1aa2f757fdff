"""Synthetic degradation: what a camera makes of a sharp scene.

    rng = sample_rng(seed, number)
    degradation = draw_degradation(rng, kinds=("shake",), min_size_px=3, max_size_px=20, max_noise=0.004)
    lq = degrade(gt, degradation, rng)

A composition, in the camera's order: clipped highlights are given back their light, the scene is blurred in
linear light, photons and read-out add noise, the response curve is applied, and the file is compressed.
Everything follows from the generator that is handed in, so the same seed and number give the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core.kernels import Kernel, disc_kernel, gaussian_kernel, rasterized, shake_kernel, shake_path

BlurKind = Literal["shake", "varying", "defocus", "gaussian", "measured"]
Image = NDArray[np.uint8]
LinearImage = NDArray[np.float32]

GAMMA = 2.2  # Camera response assumed by GoPro's authors (Nah et al., CVPR 2017, section 2).
_MAX_SIZE_PX = 1000
_CLIPPED = 254  # From here on a value may have been anything brighter.
# Of a varying blur: kernels are interpolated between those that move a point by this much more or less.
_NODE_STEP_PX, _GRID_CELLS = 2.0, (4, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Degradation:
    """Everything drawn for one image, apart from the path and the noise themselves."""

    kind: BlurKind
    size_px: float
    """Extent of the blur: diagonal of a shake's path, diameter of a defocus disc, σ of a gaussian."""
    shot_noise: float
    """Variance of the photon noise at full white in linear light, 1.0 being white."""
    read_noise: float
    """Standard deviation of the read-out noise in linear light."""
    highlight_gain: float
    """How much brighter than white clipped highlights are taken to have been; 1 keeps them."""
    jpeg_quality: int | None = None
    """0…100; None keeps the image uncompressed."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def sample_rng(seed: int, number: int) -> np.random.Generator:
    """Generator of sample `number` of a series: a counter-based one, so that any of them comes first.

    Args:
        seed, number: 0…2⁶⁴ − 1.
    """
    # An array, because NumPy makes floats of a list with a number from 2^63 on: samples would coincide.
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def draw_degradation(
    rng: np.random.Generator,
    *,
    kinds: Sequence[BlurKind],
    min_size_px: float,
    max_size_px: float,
    max_noise: float,
    min_jpeg_quality: int | None = None,
) -> Degradation:
    """Draw the parameters of one degradation.

    Args:
        rng: the only source of randomness.
        kinds: blur kinds, all equally likely.
        min_size_px, max_size_px: range of a shake's extent; discs take half of it, gaussians a sixth,
            which look about as strong.
        max_noise: upper end of the read noise; the shot noise variance reaches a tenth of it. 0 for none.
        min_jpeg_quality: lower end of the quality, of which 95 is the upper; None for no compression.

    Raises:
        ValueError: no kinds or unknown ones, or a range that is none.
    """
    if not kinds or isinstance(kinds, str) or set(kinds) - set(get_args(BlurKind)):
        raise ValueError(f"kinds must be some of {get_args(BlurKind)}, got {kinds!r}")
    if not (0 <= min_size_px <= max_size_px < _MAX_SIZE_PX and 0 <= max_noise <= 1):
        raise ValueError(
            f"expected 0 ≤ min_size_px ≤ max_size_px < {_MAX_SIZE_PX} and 0 ≤ max_noise ≤ 1, "
            f"got {min_size_px}, {max_size_px}, {max_noise}"
        )
    if min_jpeg_quality is not None and not 1 <= min_jpeg_quality <= 95:
        raise ValueError(f"min_jpeg_quality must be 1…95, got {min_jpeg_quality}")
    kind = kinds[int(rng.integers(len(kinds)))]
    size = float(rng.uniform(min_size_px, max_size_px))
    share = {"defocus": 1 / 2, "gaussian": 1 / 6}.get(kind, 1.0)
    return Degradation(
        kind=kind,
        size_px=size * share,
        shot_noise=float(rng.uniform(0, max_noise / 10)),
        read_noise=float(rng.uniform(0, max_noise)),
        highlight_gain=float(rng.uniform(1.0, 2.0)),
        jpeg_quality=None if min_jpeg_quality is None else int(rng.integers(min_jpeg_quality, 96)),
    )


def degrade(
    sharp_hwc_u8: Image,
    degradation: Degradation,
    rng: np.random.Generator,
    *,
    measured_kernels: Sequence[Kernel] = (),
) -> Image:
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
    linear = to_linear(sharp_hwc_u8)
    if degradation.highlight_gain > 1:
        # A clipped pixel was brighter than white: unclipped, it smears into the streaks of real night shots.
        linear[sharp_hwc_u8.min(axis=2) >= _CLIPPED] *= degradation.highlight_gain
    blurred = _blurred(linear, degradation, rng, measured_kernels)
    return _developed(blurred, degradation, rng)


def average_frames(
    frames_hwc_u8: Iterable[Image],
    degradation: Degradation | None = None,
    rng: np.random.Generator | None = None,
) -> Image:
    """Blur of real motion: the mean of consecutive sharp frames in linear light (Nah et al. 2017, section 2).

    Args:
        frames_hwc_u8: (H, W, 3) RGB frames of one size, one at a time; the middle one is the sharp image.
        degradation: noise and compression to add; its blur and highlights are not looked at. None adds none.
        rng: draws the noise; needed with `degradation`.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: no frames, frames of several sizes, or a degradation without `rng`.
    """
    if (degradation is None) != (rng is None):
        raise ValueError("`degradation` and `rng` go together")
    total, number = None, 0
    for frame in frames_hwc_u8:
        if total is None:
            total = np.zeros(frame.shape, np.float64)
        elif frame.shape != total.shape:
            raise ValueError(f"frames of several sizes: {total.shape} and {frame.shape}")
        total += to_linear(frame)
        number += 1
    if total is None:
        raise ValueError("no frames to average")
    mean = (total / number).astype(np.float32)
    if degradation is None or rng is None:
        return from_linear(mean)
    return _developed(mean, degradation, rng)


def to_linear(image_hwc_u8: Image) -> LinearImage:
    """Encoded 0…255 → linear light, white being 1. Raises `ValueError` where it is not (H, W, 3) uint8."""
    if image_hwc_u8.dtype != np.uint8 or image_hwc_u8.ndim != 3:
        raise ValueError(f"expected (H, W, 3) uint8, got {image_hwc_u8.shape} {image_hwc_u8.dtype}")
    return _LINEAR_OF[image_hwc_u8]


def from_linear(linear: LinearImage) -> Image:
    """Linear light, clipped to 0…1 → encoded 0…255."""
    return np.rint(linear.clip(0, 1) ** (1 / GAMMA) * 255).astype(np.uint8)


def varying_blur(
    linear: LinearImage, path: NDArray[np.complex128], roll_rad: NDArray[np.float64]
) -> LinearImage:
    """Blur of a camera that shifts and rolls about its axis: the further from the centre, the more it turns.

    Each point moves along `path` plus its share of the roll. Kernels are taken at the nodes of a grid and
    interpolated in between, by blending the images that they make (Nagy & O'Leary, "Restoring images degraded
    by spatially variant blur", SIAM J. Sci. Comput. 1998): flat fields stay flat. The grid is as fine as
    neighbouring kernels need to be alike.

    Args:
        linear: (H, W, 3) in linear light.
        path: (T,) shift over the exposure, x + iy in pixels.
        roll_rad: (T,) angle over the exposure.

    Returns:
        (H, W, 3), nowhere shifted on average, to first order in the roll.
    """
    height, width = linear.shape[:2]
    path, roll_rad = path - path.mean(), roll_rad - roll_rad.mean()
    centre = complex((width - 1) / 2, (height - 1) / 2)
    rows, cols = (_nodes(length, float(np.ptp(roll_rad))) for length in (height, width))
    result = np.zeros_like(linear)
    for row, row_weights in zip(rows, _hats(rows, height), strict=True):
        for col, col_weights in zip(cols, _hats(cols, width), strict=True):
            kernel = rasterized(path + 1j * roll_rad * (complex(col, row) - centre))
            top, bottom = np.flatnonzero(row_weights)[[0, -1]] + [0, 1]
            left, right = np.flatnonzero(col_weights)[[0, -1]] + [0, 1]
            # With what the kernel reaches beyond, where there is more of the image.
            reach = kernel.shape[0] // 2
            first_row, first_col = max(0, top - reach), max(0, left - reach)
            piece = _filtered(linear[first_row : bottom + reach, first_col : right + reach], kernel)
            piece = piece[top - first_row : bottom - first_row, left - first_col : right - first_col]
            weights = np.outer(row_weights[top:bottom], col_weights[left:right])[..., None]
            result[top:bottom, left:right] += piece * weights.astype(np.float32)
    return result


def _nodes(length: int, roll_rad: float) -> NDArray[np.float64]:
    """Positions along an axis between which points move apart by `_NODE_STEP_PX`, within `_GRID_CELLS`."""
    cells = int(np.clip(np.ceil(roll_rad * length / _NODE_STEP_PX), *_GRID_CELLS))
    return np.linspace(0, length - 1, min(cells + 1, length))


def _hats(nodes: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """(nodes, length) weights of linear interpolation between nodes; they add up to 1 at every pixel."""
    return np.array([np.interp(np.arange(length), nodes, unit) for unit in np.eye(len(nodes))])


def _blurred(
    linear: LinearImage, degradation: Degradation, rng: np.random.Generator, measured: Sequence[Kernel]
) -> LinearImage:
    size_px = degradation.size_px
    match degradation.kind:
        case "shake":
            kernel = shake_kernel(rng, size_px)
        case "varying":
            return _shaken_and_rolled(linear, size_px, rng)
        case "defocus":
            kernel = disc_kernel(size_px)
        case "gaussian":
            kernel = gaussian_kernel(size_px)
        case "measured":
            if not measured:
                raise ValueError("`measured` blur needs kernels")
            kernel = measured[int(rng.integers(len(measured)))]
    return _filtered(linear, kernel)


def _shaken_and_rolled(linear: LinearImage, size_px: float, rng: np.random.Generator) -> LinearImage:
    """A shake of up to `size_px`, of which the roll makes a random part at the corners."""
    roll_share = rng.uniform(0.3, 0.9)
    path = shake_path(rng, size_px * (1 - roll_share))
    # Along the same sort of path as a shift: smooth, with a jerk now and then.
    roll_px = shake_path(rng, size_px * roll_share).real
    corner_px = max(1.0, np.hypot(*linear.shape[:2]) / 2)
    return varying_blur(linear, path, roll_px / corner_px)


def _filtered(linear: LinearImage, kernel: Kernel) -> LinearImage:
    return cv2.filter2D(linear, -1, cv2.flip(kernel, -1), borderType=cv2.BORDER_REFLECT_101).clip(0, None)


def _developed(linear: LinearImage, degradation: Degradation, rng: np.random.Generator) -> Image:
    """What the sensor and the file add: noise, the response curve, compression."""
    if degradation.shot_noise or degradation.read_noise:
        sigma = np.sqrt(linear * degradation.shot_noise + degradation.read_noise**2)
        linear = linear + sigma * rng.standard_normal(linear.shape, dtype=np.float32)
    image = from_linear(linear)
    if degradation.jpeg_quality is None:
        return image
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, degradation.jpeg_quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert done and decoded is not None
    return np.ascontiguousarray(decoded[..., ::-1], dtype=np.uint8)


_LINEAR_OF = ((np.arange(256) / 255) ** GAMMA).astype(np.float32)
