"""Is this a pair at all? A look at both images before they are trained on.

It takes 6 ms a pair of 1280×720, 2 to 3 % of `prepare`'s time, and 10 to 14 % with photos of 481×321.
What looks wrong is kept, and written to `suspects.jsonl` with its figures: heavy blur may look so too.

Measured at these limits, on pairs that are right, and on the same ones made wrong:

    flagged of right pairs   GoPro 0 of 17; `synth` as it comes, 481×321, 0 of 100; with blurs of 20–30 px
                             (shake, varying, measured kernels) 0 of 40 at 1920×1280, 22 of 100 at 481×321:
                             there the stroke moves the image by more than the limit
    flagged of wrong pairs   another photo, another frame of the street, another crop, mirrored, upside down:
                             all of 257 each; shifted by 10 px: 94 % of GoPro, 87 % of `synth` as it comes;
                             by 5 px: 0 and 4 %. A picture that is its own mirror image goes unseen, mirrored
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.shards import Pair
from pipelines.sources import PairRef

Row = dict[str, Any]
"""A pair in quarantine.jsonl or suspects.jsonl: key, lq, gt, reason, and figures where there are any.

A sharp photo alone has no lq.
"""
# Right pairs of the four sets came to 15.3 dB, 12.1 px and 0.19 at worst, others to 21.9 dB and 0.32 at best.
MIN_PSNR_DB = 13.0
MAX_SHIFT_PX = 8.0
MIN_RESPONSE = 0.15
_LONG_SIDE_PX = 512
# Where there is next to nothing to see, the peak is one of the noise.
_MIN_SIDE_PX, _MIN_CONTRAST_LEVELS = 16, 2.0


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How far the two images of a pair agree, in gray, at 512 px or less on the longer side."""

    is_same: bool
    """They are equal, pixel for pixel."""
    psnr_db: float | None
    """None where the reduced images are equal."""
    shift_px: float | None
    """By how much the one is moved against the other, in pixels of the pair; None where it is flat."""
    response: float | None
    """Height of phase correlation's peak: near 0 for unrelated images, some 1 for a shifted copy."""

    def reason(self) -> str:
        """Why it is suspect, or nothing."""
        if self.is_same:
            return "the two images are identical: nothing is blurred"
        if self.response is not None and self.response < MIN_RESPONSE:
            return f"hardly a pair: phase correlation {self.response}, expected {MIN_RESPONSE:g} or more"
        if self.shift_px is not None and self.shift_px > MAX_SHIFT_PX:
            return f"misaligned: shifted by {self.shift_px} px, expected {MAX_SHIFT_PX:g} or less"
        if self.psnr_db is not None and self.psnr_db < MIN_PSNR_DB:
            return f"hardly a pair: PSNR {self.psnr_db} dB, expected {MIN_PSNR_DB:g} or more"
        return ""

    def figures(self) -> dict[str, Any]:
        """What is written down of it."""
        return {"psnr_db": self.psnr_db, "shift_px": self.shift_px, "response": self.response}


def alignment(lq_hwc_u8: NDArray[np.uint8], gt_hwc_u8: NDArray[np.uint8]) -> Alignment:
    """Compare two images of the same size, (H, W, 3) uint8 RGB. Figures are rounded, so that they repeat."""
    lq, gt = _reduced(lq_hwc_u8), _reduced(gt_hwc_u8)
    squared_error = float(cv2.norm(lq, gt, cv2.NORM_L2SQR)) / lq.size
    psnr_db = round(10 * float(np.log10(255.0**2 / squared_error)), 2) if squared_error else None
    shift_px = response = None
    if min(lq.shape) >= _MIN_SIDE_PX and max(lq.std(), gt.std()) >= _MIN_CONTRAST_LEVELS:
        # The window takes the edges off, which correlate with themselves. It takes effect about the mean.
        (x_px, y_px), peak = cv2.phaseCorrelate(_centred(lq), _centred(gt), _window(*lq.shape))
        scale = max(lq_hwc_u8.shape[:2]) / max(lq.shape)
        shift_px, response = round(float(np.hypot(x_px, y_px)) * scale, 1), round(peak, 3)
    return Alignment(
        is_same=squared_error == 0 and np.array_equal(lq_hwc_u8, gt_hwc_u8),
        psnr_db=psnr_db,
        shift_px=shift_px,
        response=response,
    )


def _reduced(rgb_hwc_u8: NDArray[np.uint8]) -> NDArray[np.uint8]:
    gray = cv2.cvtColor(rgb_hwc_u8, cv2.COLOR_RGB2GRAY)
    height, width = gray.shape
    scale = _LONG_SIDE_PX / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    return gray  # type: ignore[return-value]


@lru_cache(maxsize=4)
def _window(height: int, width: int) -> NDArray[np.float32]:
    return cv2.createHanningWindow((width, height), cv2.CV_32F)  # type: ignore[return-value]


def _centred(gray: NDArray[np.uint8]) -> NDArray[np.float32]:
    return gray.astype(np.float32) - np.float32(gray.mean())


@dataclass
class Findings:
    """What was noticed in a shard's pairs, for its note."""

    refused: list[Row] = field(default_factory=list)
    suspects: list[Row] = field(default_factory=list)
    scenes: set[str] = field(default_factory=set)
    """Of the pairs that were taken."""

    def refuse(self, ref: PairRef, error: InputError) -> None:
        """Take down that a pair is left out."""
        self.refused.append(_row(ref, str(error)))

    def take(self, ref: PairRef, pair: Pair) -> None:
        """Take down a pair that is used, and whether it is suspect."""
        self.scenes.add(pair.scene)
        if ref.lq is None:  # a sharp photo alone
            return
        found = alignment(pair.lq, pair.gt)
        if reason := found.reason():
            self.suspects.append(_row(ref, reason) | found.figures())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"refused": self.refused, "suspects": self.suspects, "scenes": sorted(self.scenes)}


def _row(ref: PairRef, reason: str) -> Row:
    images = {"gt": str(ref.gt)} if ref.lq is None else {"lq": str(ref.lq), "gt": str(ref.gt)}
    return {"key": ref.key, **images, "reason": reason}
