"""Synthetic degradation: what a camera makes of a sharp scene.

    rng = sample_rng(seed, number)
    degradation = draw_degradation(rng, kinds=("shake",), min_size_px=3, max_size_px=20, max_noise=0.004)
    lq = degrade(gt, degradation, rng)

A composition, in the camera's order: clipped highlights are given back their light, the scene is blurred in
linear light, photons and read-out add noise, the response curve is applied, and the file is compressed.
Where a data set was made otherwise, `encoded_share` follows it: GoPro's `blur` is the mean of encoded frames.
Everything follows from the generator that is handed in, so the same seed and number give the same pixels.
`Exposure` makes any part of the degraded image, at the cost of that part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core.kernels import Kernel, disc_kernel, gaussian_taps, shake_kernel, shake_path
from nafnet_core.optics import Blur, LinearImage, Size, UniformBlur, VaryingBlur, Window
from nafnet_core.transforms import Box

BlurKind = Literal["shake", "varying", "defocus", "gaussian", "measured"]
Image = NDArray[np.uint8]

GAMMA = 2.2  # Camera response assumed by GoPro's authors (Nah et al., CVPR 2017, section 2).
_MAX_SIZE_PX = 1000
_CLIPPED = 254  # From here on a value may have been anything brighter.
# JPEG compresses colour in blocks of 16 px, and smooths it over one more on the way back.
_JPEG_BLOCK_PX, _JPEG_OVERLAP_PX = 16, 2
_NUM_QUANTILES = 2**16


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
    gamma: float = GAMMA
    """Encoded values to this power are the light that is blurred; 1 blurs them as they are."""

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
    encoded_share: float = 0.0,
) -> Degradation:
    """Draw the parameters of one degradation.

    Args:
        rng: the only source of randomness.
        kinds: blur kinds, all equally likely.
        min_size_px, max_size_px: range of a shake's extent; discs take half of it, gaussians a sixth,
            which look about as strong.
        max_noise: upper end of the read noise; the shot noise variance reaches a tenth of it. 0 for none.
        min_jpeg_quality: lower end of the quality, of which 95 is the upper; None for no compression.
        encoded_share: how many are blurred as encoded, not in linear light; clipped highlights stay clipped.

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
    if not 0 <= encoded_share <= 1:
        raise ValueError(f"encoded_share must be 0…1, got {encoded_share}")
    kind = kinds[int(rng.integers(len(kinds)))]
    size = float(rng.uniform(min_size_px, max_size_px))
    share = {"defocus": 1 / 2, "gaussian": 1 / 6}.get(kind, 1.0)
    drawn = Degradation(
        kind=kind,
        size_px=size * share,
        shot_noise=float(rng.uniform(0, max_noise / 10)),
        read_noise=float(rng.uniform(0, max_noise)),
        highlight_gain=float(rng.uniform(1.0, 2.0)),
        jpeg_quality=None if min_jpeg_quality is None else int(rng.integers(min_jpeg_quality, 96)),
    )
    if encoded_share and rng.random() < encoded_share:
        return replace(drawn, gamma=1.0, highlight_gain=1.0)
    return drawn


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
    height, width = sharp_hwc_u8.shape[:2]
    exposure = Exposure.drawn(degradation, (height, width), rng, measured_kernels=measured_kernels)
    return exposure.part(sharp_hwc_u8, (0, 0, height, width), rng)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposure:
    """A degradation of one image, of which everything but the noise is drawn: it can be made part by part.

    Parts are cut from what `degrade` makes of the whole image, up to the noise, which each draws for itself.
    """

    degradation: Degradation
    blur: Blur
    size: Size
    """Height and width of the image."""

    @classmethod
    def drawn(
        cls,
        degradation: Degradation,
        size: Size,
        rng: np.random.Generator,
        *,
        measured_kernels: Sequence[Kernel] = (),
    ) -> Exposure:
        """Draw the path of a shake, or one of the measured kernels.

        Raises:
            ValueError: the kind is `measured` and there are no measured kernels.
        """
        blur = _drawn_blur(degradation, size, rng, measured_kernels)
        return cls(degradation=degradation, blur=blur, size=size)

    def needed(self, part: Box) -> Box:
        """The box of the sharp image that a part of the degraded one is made of."""
        return _widened(self._developed_box(part), self.blur.reach_px(self.size), self.size)

    def part(self, sharp_hwc_u8: Image, part: Box, rng: np.random.Generator) -> Image:
        """Make one part.

        Args:
            sharp_hwc_u8: (H, W, 3) RGB of the box that is `needed`.
            part: the box wanted.
            rng: draws the noise.

        Returns:
            (H, W, 3) uint8 of the part.
        """
        linear = to_linear(sharp_hwc_u8, self.degradation.gamma)
        if self.degradation.highlight_gain > 1:
            # A clipped pixel was brighter than white: unclipped, it smears into streaks as in night shots.
            clipped = cv2.inRange(sharp_hwc_u8, (_CLIPPED,) * 3, (255,) * 3) > 0
            linear[clipped] *= self.degradation.highlight_gain
        box = self._developed_box(part)
        window = Window(size=self.size, box=self.needed(part), linear=linear)
        developed = _developed(self.blur.of(window, box), self.degradation, rng)
        top, left = part[0] - box[0], part[1] - box[1]
        return developed[top : top + part[2], left : left + part[3]]

    def _developed_box(self, part: Box) -> Box:
        """The part, or the blocks of the whole image's JPEG that it lies in."""
        if self.degradation.jpeg_quality is None:
            return part
        top, left, height, width = _widened(part, _JPEG_OVERLAP_PX, self.size)
        first_row, first_col = (start // _JPEG_BLOCK_PX * _JPEG_BLOCK_PX for start in (top, left))
        bottom, right = (
            min(size, -(-stop // _JPEG_BLOCK_PX) * _JPEG_BLOCK_PX)
            for stop, size in zip((top + height, left + width), self.size, strict=True)
        )
        return first_row, first_col, bottom - first_row, right - first_col


def _widened(box: Box, by_px: int, size: Size) -> Box:
    """The box with so much more on each side, as far as the image goes."""
    top, left, height, width = box
    first_row, first_col = max(0, top - by_px), max(0, left - by_px)
    bottom, right = min(size[0], top + height + by_px), min(size[1], left + width + by_px)
    return first_row, first_col, bottom - first_row, right - first_col


def average_frames(
    frames_hwc_u8: Iterable[Image],
    degradation: Degradation | None = None,
    rng: np.random.Generator | None = None,
) -> Image:
    """Blur of real motion: the mean of consecutive sharp frames (Nah et al. 2017, section 2).

    Args:
        frames_hwc_u8: (H, W, 3) RGB frames of one size, one at a time; the middle one is the sharp image.
        degradation: noise and compression to add, and the `gamma` that makes light of encoded values; its
            blur and highlights are not looked at. None adds none, and averages linear light.
        rng: draws the noise; needed with `degradation`.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: no frames, frames of several sizes, or a degradation without `rng`.
    """
    if (degradation is None) != (rng is None):
        raise ValueError("`degradation` and `rng` go together")
    gamma = GAMMA if degradation is None else degradation.gamma
    total, number = None, 0
    for frame in frames_hwc_u8:
        if total is None:
            total = np.zeros(frame.shape, np.float64)
        elif frame.shape != total.shape:
            raise ValueError(f"frames of several sizes: {total.shape} and {frame.shape}")
        total += to_linear(frame, gamma)
        number += 1
    if total is None:
        raise ValueError("no frames to average")
    mean = (total / number).astype(np.float32)
    if degradation is None or rng is None:
        return from_linear(mean)
    return _developed(mean, degradation, rng)


def to_linear(image_hwc_u8: Image, gamma: float = GAMMA) -> LinearImage:
    """Encoded 0…255 → linear light, white being 1. Raises `ValueError` where it is not (H, W, 3) uint8."""
    if image_hwc_u8.dtype != np.uint8 or image_hwc_u8.ndim != 3:
        raise ValueError(f"expected (H, W, 3) uint8, got {image_hwc_u8.shape} {image_hwc_u8.dtype}")
    return cv2.LUT(image_hwc_u8, _linear_of(gamma))  # type: ignore[return-value]


def from_linear(linear: LinearImage, gamma: float = GAMMA) -> Image:
    """Linear light, clipped to 0…1 → encoded 0…255."""
    encoded = linear.clip(0, 1)
    return np.rint((encoded if gamma == 1 else encoded ** (1 / gamma)) * 255).astype(np.uint8)


def _drawn_blur(
    degradation: Degradation, size: Size, rng: np.random.Generator, measured: Sequence[Kernel]
) -> Blur:
    size_px = degradation.size_px
    match degradation.kind:
        case "shake":
            return UniformBlur(shake_kernel(rng, size_px))
        case "varying":
            return _shake_and_roll(size, size_px, rng)
        case "defocus":
            return UniformBlur(disc_kernel(size_px))
        case "gaussian":
            return UniformBlur(gaussian_taps(size_px))
        case "measured":
            if not measured:
                raise ValueError("`measured` blur needs kernels")
            return UniformBlur(measured[int(rng.integers(len(measured)))])


def _shake_and_roll(size: Size, size_px: float, rng: np.random.Generator) -> Blur:
    """A shake of up to `size_px`, of which the roll makes a random part at the corners."""
    roll_share = rng.uniform(0.3, 0.9)
    path = shake_path(rng, size_px * (1 - roll_share))
    # Along the same sort of path as a shift: smooth, with a jerk now and then.
    roll_px = shake_path(rng, size_px * roll_share).real
    corner_px = max(1.0, np.hypot(*size) / 2)
    return VaryingBlur(path, roll_px / corner_px)


def _developed(linear: LinearImage, degradation: Degradation, rng: np.random.Generator) -> Image:
    """What the sensor and the file add: noise, the response curve, compression."""
    if degradation.shot_noise or degradation.read_noise:
        sigma = np.sqrt(linear * degradation.shot_noise + degradation.read_noise**2)
        linear = linear + sigma * _normal(rng, linear.shape)
    image = from_linear(linear, degradation.gamma)
    if degradation.jpeg_quality is None:
        return image
    quality = [cv2.IMWRITE_JPEG_QUALITY, degradation.jpeg_quality]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
    assert done and decoded is not None
    return decoded  # type: ignore[return-value]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> LinearImage:
    """Normal numbers from a table of 65,536 quantiles, up to 4.3 σ: five times as fast as the generator's."""
    return _normal_quantiles().take(rng.integers(0, _NUM_QUANTILES, shape, np.uint16))


@lru_cache(maxsize=1)
def _normal_quantiles() -> NDArray[np.float32]:
    upper_half = (np.arange(_NUM_QUANTILES // 2, _NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    values = np.array([NormalDist().inv_cdf(share) for share in upper_half.tolist()], np.float32)
    return np.concatenate([-values[::-1], values])


@lru_cache(maxsize=4)
def _linear_of(gamma: float) -> LinearImage:
    return ((np.arange(256) / 255) ** gamma).astype(np.float32)
