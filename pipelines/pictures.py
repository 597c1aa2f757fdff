"""Pictures for people: labelled before/after strips and training curves, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.files import make_folder, written_aside
from pipelines.images import encode_png

_LABEL_PX, _GAP_PX = 28, 6
_WHITE, _INK = 255, (40, 40, 40)


def before_after(
    path: Path,
    panels: Mapping[str, NDArray[np.uint8]],
    *,
    zoom_px: int = 160,
    max_width_px: int = 480,
) -> Path:
    """Draw images of one size side by side, each over its own magnified detail, with a label each.

    Args:
        path: the PNG to write.
        panels: label → (H, W, 3) uint8 RGB, all of one size. Labels are ASCII.
        zoom_px: side of the detail, which is the square of the largest contrast in the last panel.
        max_width_px: wider images are shown shrunk; the detail is not.
    """
    height, width = next(iter(panels.values())).shape[:2]
    side = min(zoom_px, height, width)
    top, left = _busiest(list(panels.values())[-1], side)
    shown_width = min(width, max_width_px)
    columns = []
    for label, image in panels.items():
        small = _resized(image, shown_width, cv2.INTER_AREA)
        detail = _resized(image[top : top + side, left : left + side], shown_width, cv2.INTER_NEAREST)
        bar = np.full((_LABEL_PX, shown_width, 3), _WHITE, np.uint8)
        cv2.putText(bar, label, (4, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, _INK, 1, cv2.LINE_AA)
        gap = np.full((_GAP_PX, shown_width, 3), _WHITE, np.uint8)
        columns += [np.vstack([bar, small, gap, detail]), None]
    tall = columns[0].shape[0]  # type: ignore[union-attr]
    strips = [np.full((tall, _GAP_PX, 3), _WHITE, np.uint8) if c is None else c for c in columns[:-1]]
    make_folder(path.parent)
    with written_aside(path) as temporary:
        temporary.write_bytes(encode_png(np.hstack(strips)))
    return path


def curves(path: Path, series: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> Path:
    """Draw each series of (samples, value) in a panel of its own and write a PNG."""
    # The figure class and not pyplot, whose global state keeps figures alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(series), 3.2), layout="constrained")
    figure.suptitle(title)
    for axes, (name, points) in zip(
        figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True
    ):
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axes.set_xlabel("samples seen")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    make_folder(path.parent)
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _busiest(image: NDArray[np.uint8], side: int) -> tuple[int, int]:
    """Corner of the square with the largest variance, on a coarse grid."""
    gray = image.mean(axis=2)
    step = max(1, side // 4)
    corners = [
        (top, left)
        for top in range(0, image.shape[0] - side + 1, step)
        for left in range(0, image.shape[1] - side + 1, step)
    ]
    return max(corners, key=lambda c: float(gray[c[0] : c[0] + side, c[1] : c[1] + side].var()))


def _resized(image: NDArray[np.uint8], width: int, interpolation: int) -> NDArray[np.uint8]:
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=interpolation)  # type: ignore[return-value]
