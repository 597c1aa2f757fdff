"""Measure a random sample of pairs: sizes, sharpness of both sides, PSNR of the blurred one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.inspect.result import Show
from pipelines.shards import Pair

_SEED = 0
_PERCENTILES = {"median": 50, "p5": 5, "p95": 95}
Read = Callable[[int], Pair]


@dataclass(kw_only=True)
class Sample:
    """Measured pairs, a list entry a pair. Of sharp photos alone, only what there is of these."""

    num_pairs: int
    """Of all pairs; the sample may be smaller."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height, px."""
    scenes: list[str] = field(default_factory=list)
    sharpness_blurred: list[float] = field(default_factory=list)
    sharpness_sharp: list[float] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)
    """Infinite where the two are equal."""
    unreadable: list[str] = field(default_factory=list)
    """A line each."""

    @property
    def num_equal(self) -> int:
        """Pairs that are not blurred at all."""
        return sum(np.isinf(self.psnr_db).tolist())

    def to_dict(self) -> dict[str, Any]:
        """Medians and percentiles; PSNR over the pairs that are not equal."""
        quantities = {
            "width_px": [width for width, _ in self.sizes],
            "height_px": [height for _, height in self.sizes],
            "sharpness_blurred": self.sharpness_blurred,
            "sharpness_sharp": self.sharpness_sharp,
            "psnr_db": [value for value in self.psnr_db if np.isfinite(value)],
        }
        return {
            "num_sampled": len(self.sizes),
            "num_unreadable": len(self.unreadable),
            "num_equal": self.num_equal,
            "num_scenes": len(set(self.scenes)),
            "seed": _SEED,
            **{
                name: {label: float(np.percentile(values, p)) for label, p in _PERCENTILES.items()}
                if values
                else None
                for name, values in quantities.items()
            },
        }


def measure(read: Read, ranges: Sequence[range], num_samples: int, *, show: Show) -> Sample:
    """Read up to `num_samples` pairs, drawn with a fixed seed from the numbers in `ranges`.

    One pair is in memory at a time, and a large store is never read whole. Pairs that cannot be read are
    told, and left out.
    """
    numbers = np.concatenate([np.arange(r.start, r.stop) for r in ranges] or [np.arange(0)])
    sample = Sample(num_pairs=len(numbers))
    chosen = np.random.default_rng(_SEED).permutation(numbers)[:num_samples]
    with show("measure", "pairs") as update:
        for done, index in enumerate(sorted(chosen.tolist()), start=1):  # in order, as they lie on the disk
            try:
                _measure_one(read(index), sample)
            except InputError as error:
                sample.unreadable.append(str(error))
            update(done, len(chosen))
    return sample


def spread(ranges: Sequence[range], count: int) -> list[int]:
    """Up to `count` numbers, evenly spread over `ranges`."""
    numbers = [number for r in ranges for number in r]
    count = min(count, len(numbers))
    return [numbers[(2 * k + 1) * len(numbers) // (2 * count)] for k in range(count)]


def sharpness(rgb_hwc_u8: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of the gray image, in squared 8-bit levels (Pech-Pacheco et al. 2000)."""
    gray = cv2.cvtColor(rgb_hwc_u8, cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(gray, cv2.CV_32F).var(dtype=np.float64))


def psnr_db(lq: NDArray[np.uint8], gt: NDArray[np.uint8]) -> float:
    """PSNR of two images by the evaluation protocol; infinite where they are equal.

    `nafnet_core.metrics.psnr` is the reference; this one spares a look at a store the import of torch.
    """
    mse = float(cv2.norm(lq, gt, cv2.NORM_L2SQR)) / lq.size
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def _measure_one(pair: Pair, sample: Sample) -> None:
    sample.sizes.append((pair.lq.shape[1], pair.lq.shape[0]))
    sample.scenes.append(pair.scene)
    sample.sharpness_sharp.append(sharpness(pair.gt))
    if pair.is_sharp_alone:
        return
    sample.sharpness_blurred.append(sharpness(pair.lq))
    sample.psnr_db.append(psnr_db(pair.lq, pair.gt))
