"""Pictures of a report: which images are shown, strips, the error map, the histogram."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate.document import Panel
from pipelines.pictures import before_after, detail_corner, encode_jpeg

MOST_SHOWN = 10
ERROR_SCALE_LEVELS = 32
"""Mean difference of the three channels that is drawn brightest: an eighth of the range. The same in every
report, so that maps can be compared."""
ERROR_LABEL = f"error, 0-{ERROR_SCALE_LEVELS} levels"
_OVERVIEW_PX, _DETAIL_PX = 320, 160
_OVERVIEW_QUALITY, _DETAIL_QUALITY = 82, 90
_BINS = 30

Image = NDArray[np.uint8]


def worst_and_best(values: Sequence[float], keys: Sequence[str]) -> tuple[list[int], list[int]]:
    """Numbers of the images of the ten lowest and ten highest values, the extremes first; none in both.

    Of equal values the name decides; of fewer than twenty images each is in one of the two.
    """
    order = sorted(range(len(values)), key=lambda index: (values[index], keys[index]))
    num_worst = min(MOST_SHOWN, -(-len(order) // 2))
    num_best = min(MOST_SHOWN, len(order) // 2)
    return order[:num_worst], order[::-1][:num_best]


def most_different(values: Sequence[float], keys: Sequence[str]) -> list[int]:
    """Numbers of the ten images of the largest absolute values, the largest first."""
    order = sorted(range(len(values)), key=lambda index: (-abs(values[index]), keys[index]))
    return order[:MOST_SHOWN]


def median_of(values: Sequence[float]) -> int:
    """Number of the image of the median value, the upper one of an even number."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    return order[len(order) // 2]


def error_map(restored: Image, gt: Image) -> Image:
    """Mean absolute difference of the channels in colour: black none, yellow `ERROR_SCALE_LEVELS` and more.

    Args:
        restored, gt: (H, W, 3) uint8 RGB.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    levels = cv2.absdiff(restored, gt).mean(axis=2, dtype=np.float32) * (255 / ERROR_SCALE_LEVELS)
    coloured = cv2.applyColorMap(levels.clip(0, 255).round().astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


def draw_strip(path: Path, panels: Mapping[str, Image], *, lq: Image, gt: Image) -> list[Panel]:
    """Write a strip as a JPEG, and return its panels small enough for a page.

    All show the detail where blurring cost most.

    Args:
        path: the JPEG.
        panels: label → (H, W, 3) uint8 RGB, all of one size.
        lq, gt: degraded and sharp image of that size.
    """
    side = min(_DETAIL_PX, *gt.shape[:2])
    top, left = detail_corner(lq, gt, side)
    before_after(path, panels, zoom_px=side, max_width_px=_OVERVIEW_PX, corner=(top, left))
    drawn = []
    for label, image in panels.items():
        detail = image[top : top + side, left : left + side]
        overview = encode_jpeg(_shrunk(image), quality=_OVERVIEW_QUALITY)
        drawn.append(Panel(label, overview, encode_jpeg(detail, quality=_DETAIL_QUALITY)))
    return drawn


def histogram(values: Sequence[float], *, label: str) -> bytes:
    """A PNG of how often which value comes, with the mean and zero as lines."""
    # The figure class and not pyplot, whose global state keeps figures alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=min(_BINS, max(1, len(values))), color="C0")
    mean = float(np.mean(values))
    axes.axvline(mean, color="C1", label=f"mean {mean:+.2f}")
    axes.axvline(0, color="0.3", linestyle=":", label="no difference")
    axes.set_xlabel(label)
    axes.set_ylabel("images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    # Beside the axes: within them it would stand before bars.
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _shrunk(image: Image) -> Image:
    height, width = image.shape[:2]
    if width <= _OVERVIEW_PX:
        return image
    size = (_OVERVIEW_PX, max(1, round(height * _OVERVIEW_PX / width)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
