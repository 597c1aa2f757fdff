"""Does an exported file compute what the network computes in torch? Asked on real pairs, at odd sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nafnet_core import GateError, InputError, NAFNet
from nafnet_core.local_stats import local_statistics
from nafnet_core.metrics import psnr
from nafnet_core.strips import forward_in_strips
from nafnet_core.tiling import restore_image
from pipelines.export.formats import Precision, Runner
from pipelines.turns import times_in_turns

Image = NDArray[np.uint8]
# Sides of the crops: no multiples of the stride, smaller and larger than a window of local statistics.
SIZES_PX = ((1, 1), (37, 53), (64, 64), (131, 97), (255, 321))
# One crop as large as a tile, mirrored where the pairs are smaller: what adds up over a map shows there.
LARGE_PX = (640, 1152)
SCORED_PX = 64  # the mean of scores would be that of single pixels else
_TIMED_PX = (256, 256)
_TIMED_RUNS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What a precision may lose."""

    difference: float
    """Largest difference of a value, 1 being the range."""
    psnr_db: float

    def holds(self, difference: float, loss_db: float) -> bool:
        """Whether these are inside; what is no number is not."""
        return difference <= self.difference and abs(loss_db) <= self.psnr_db


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(difference=1e-4, psnr_db=0.005),
    "fp16": Tolerance(difference=2e-2, psnr_db=0.05),
    "bf16": Tolerance(difference=0.15, psnr_db=0.05),
    # Against the same rounding in torch: a value at the edge of two steps may take either.
    "int8": Tolerance(difference=0.15, psnr_db=0.05),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """The gate's figures: against the network in torch, fp32, on the CPU."""

    difference: float
    """Largest of all values of all crops; of bytes, in 255ths."""
    psnr_db: float
    """Mean of the crops of 64 px and more against the sharp ones, 8-bit, as all scores."""
    psnr_torch_db: float
    psnr_blurred_db: float
    num_crops: int
    sizes_px: tuple[tuple[int, int], ...]
    data: str
    """What the crops are of."""
    timed_px: tuple[int, int]
    """Height and width of the image that was timed."""
    seconds: float
    """Median of it."""
    seconds_torch: float
    """The same through the network in torch, in turns with it; fp32."""

    @property
    def loss_db(self) -> float:
        """What the file loses against torch."""
        return self.psnr_torch_db - self.psnr_db

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "loss_db": self.loss_db}

    def lasting(self) -> dict[str, Any]:
        """What goes into the file: all but times, of which two exports would differ."""
        return {key: value for key, value in self.to_dict().items() if not key.startswith("seconds")}

    def check(self, precision: Precision, *, takes_bytes: bool, file: object) -> None:
        """Raise `GateError` outside the precision's tolerance, or where a figure is no number."""
        tolerance = TOLERANCES[precision]
        if takes_bytes:  # a value close to a half may be rounded to either side
            tolerance = replace(tolerance, difference=tolerance.difference + 1.001 / 255)
        if not tolerance.holds(self.difference, self.loss_db):
            raise GateError(
                "the exported network computes something else than torch; nothing was written",
                file=str(file),
                expected=f"a largest difference of {tolerance.difference:g} and {tolerance.psnr_db:g} dB",
                got=f"{self.difference:.3g} and {self.loss_db:+.4f} dB on {self.data}",
            )


def crops(
    pairs: Sequence[tuple[Image, Image]], *, min_side_px: int = 1, size_px: tuple[int, int] | None = None
) -> list[tuple[Image, Image]]:
    """One crop of each size out of each pair, as far as it is large enough; or all of `size_px`.

    Raises:
        InputError: there is none that a score can be taken on.
    """
    if size_px is not None:
        return [(_mirrored(lq, size_px), _mirrored(gt, size_px)) for lq, gt in pairs]
    cut = []
    for number, (lq, gt) in enumerate(pairs):
        for height, width in SIZES_PX:
            if min(height, width) >= min_side_px and lq.shape[0] >= height and lq.shape[1] >= width:
                top = (lq.shape[0] - height) * (2 * number + 1) // (2 * len(pairs))
                left = (lq.shape[1] - width) * (2 * number + 1) // (2 * len(pairs))
                box = (slice(top, top + height), slice(left, left + width))
                cut.append((lq[box], gt[box]))
    if not any(_is_scored(lq) for lq, _ in cut):
        raise InputError("pairs too small to compare on", expected=f"sides of {SCORED_PX} px")
    lq, gt = max(pairs, key=lambda pair: pair[0].size)
    return [*cut, (_mirrored(lq, LARGE_PX), _mirrored(gt, LARGE_PX))]


def compare(
    model: NAFNet,
    runner: Runner,
    pairs: Sequence[tuple[Image, Image]],
    *,
    train_patch_px: int | None,
    takes_bytes: bool,
    data: str,
    min_side_px: int = 1,
    size_px: tuple[int, int] | None = None,
) -> Parity:
    """Run crops of pairs through both.

    Args:
        model: the network, in eval mode on the CPU.
        runner: the exported one.
        pairs: blurred and sharp, (H, W, 3) uint8 each.
        train_patch_px: for local statistics; None: global ones.
        takes_bytes: whether the runner takes (N, H, W, 3) uint8.
        data: what the pairs are of.
        min_side_px: smaller images are not asked for.
        size_px: the one size that the runner takes; None: any.

    Raises:
        InputError: pairs too small.
    """
    differences, scores = [], []

    def in_torch(lq: Image) -> NDArray[Any]:
        if takes_bytes:
            return restore_image(model, lq, train_patch_px=train_patch_px, tile_px=None)
        with local_statistics(model, train_patch_px):
            return forward_in_strips(model, torch.from_numpy(_floats(lq)))[0].permute(1, 2, 0).numpy()

    def exported(lq: Image) -> NDArray[Any]:
        return runner(lq[None])[0] if takes_bytes else runner(_floats(lq))[0].transpose(1, 2, 0)

    cut = crops(pairs, min_side_px=min_side_px, size_px=size_px)
    timed_px = size_px or _TIMED_PX
    for lq, gt in cut:
        ours, theirs = in_torch(lq), exported(lq)
        scale = 255.0 if takes_bytes else 1.0
        differences.append(np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max() / scale)
        if _is_scored(lq):
            scores.append([_psnr(image, gt) for image in (theirs, ours, lq)])
    theirs_db, ours_db, blurred_db = np.mean(scores, axis=0)
    timed = np.resize(pairs[0][0], (*timed_px, 3))
    turns = times_in_turns([partial(exported, timed), partial(in_torch, timed)], runs=_TIMED_RUNS)
    seconds = [median(times) for times in turns]
    # `max` of Python would pass over what is no number.
    return Parity(
        difference=float(np.max(differences)),
        psnr_db=float(theirs_db),
        psnr_torch_db=float(ours_db),
        psnr_blurred_db=float(blurred_db),
        num_crops=len(cut),
        sizes_px=tuple(sorted({(lq.shape[0], lq.shape[1]) for lq, _ in cut})),
        data=data,
        timed_px=timed_px,
        seconds=seconds[0],
        seconds_torch=seconds[1],
    )


def _floats(lq: Image) -> NDArray[np.float32]:
    return np.ascontiguousarray(lq.transpose(2, 0, 1)[None], np.float32) / np.float32(255)


def _psnr(image: NDArray[Any], gt: Image) -> float:
    if image.dtype != np.uint8:
        image = np.rint(np.nan_to_num(image, nan=0.0).clip(0, 1) * 255).astype(np.uint8)
    sides = (torch.from_numpy(np.ascontiguousarray(side)).permute(2, 0, 1)[None] for side in (image, gt))
    return float(psnr(*sides, data_range=255))


def _mirrored(image: Image, size: tuple[int, int]) -> Image:
    """The upper left corner of an image that goes on as its mirror image at its borders."""
    rows, cols = (
        np.abs((np.arange(wanted) + side - 1) % max(1, 2 * side - 2) - (side - 1))
        for wanted, side in zip(size, image.shape, strict=False)
    )
    return np.ascontiguousarray(image[rows][:, cols])


def _is_scored(lq: Image) -> bool:
    return min(lq.shape[:2]) >= SCORED_PX
