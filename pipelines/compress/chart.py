"""PSNR against latency, with the Pareto front as a line, as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.compress.table import Row, front_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 110
_LEAST_SPAN_DB = 0.1  # or rounding errors fill the picture
_MARGIN_SHARE = 0.12
_WIDE = 5.0  # largest over smallest latency, from which on the axis is logarithmic
_TEXT_PT = 9.0
_CHAR_PT, _LINE_PT = 6.0, 9.0  # room for a digit
_DOT_PT = 7.0
# Where a number may stand: beside its point, the nearest first, then further out on a longer line.
_DISTANCES_PT = (13.0, 20.0, 30.0, 42.0, 56.0)
_DIRECTIONS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))

Box = tuple[float, float, float, float]  # left, bottom, right, top


def draw_chart(numbered: Sequence[tuple[int, Row]], *, title: str) -> bytes:
    """A PNG of models as numbered points, with a key beside it.

    Args:
        numbered: rows with a PSNR, and their numbers in the table.
        title: above it.
    """
    # The figure class and not pyplot, whose global state keeps figures alive.
    from matplotlib.figure import Figure

    points = np.array([(row.latency_720p_ms, row.psnr_db) for _, row in numbered], dtype=float)
    backends = list(dict.fromkeys(row.backend for _, row in numbered))
    figure = Figure(figsize=(10, max(4.8, 1.2 + 0.24 * len(numbered))), layout="constrained")
    figure.suptitle(title, size=11, parse_math=False)
    axes = figure.subplots()
    front = front_of([row for _, row in numbered])
    axes.plot(*points[front].T, color="0.55", linewidth=1.2, linestyle="--", label="Pareto front", zorder=1)
    for number, (point, (place, row)) in enumerate(zip(points, numbered, strict=True)):
        axes.plot(
            *point, marker="o", markersize=_DOT_PT, linestyle="", color=f"C{backends.index(row.backend)}",
            markeredgecolor="black" if number in front else "white", label=f"{place}  {_shown(row.label)}",
        )  # fmt: skip
    _set_limits(axes, points)
    axes.set_xlabel("latency at 1280×720, ms")
    axes.set_ylabel("PSNR, dB")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    _write_numbers(figure, axes, points, [str(place) for place, _ in numbered])
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return content.getvalue()


def _set_limits(axes: Axes, points: NDArray[np.float64]) -> None:
    """Room around the points; latencies on a logarithmic axis where they are of several magnitudes."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    is_wide = bool(points[:, 0].min() > 0 and points[:, 0].max() > _WIDE * points[:, 0].min())
    shown = np.column_stack([np.log10(points[:, 0]) if is_wide else points[:, 0], points[:, 1]])
    low, high = shown.min(axis=0), shown.max(axis=0)
    least = np.array([0.1 * abs(high[0]) or 1.0, _LEAST_SPAN_DB])
    half = np.maximum(high - low, least) * (0.5 + _MARGIN_SHARE)
    (left, bottom), (right, top) = (low + high) / 2 - half, (low + high) / 2 + half
    axes.ticklabel_format(useOffset=False)
    if is_wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        left, right = 10**left, 10**right
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _write_numbers(figure: Figure, axes: Axes, points: NDArray[np.float64], labels: Sequence[str]) -> None:
    """Write each number beside its point, with a line between."""
    figure.draw_without_rendering()  # what is where is known only then
    scale = 72 / figure.dpi
    offsets = place_labels(
        axes.transData.transform(points) * scale,
        [_CHAR_PT * (len(label) + 0.5) for label in labels],
        tuple(axes.get_window_extent().extents * scale),
    )
    for point, offset, label in zip(points, offsets, labels, strict=True):
        axes.annotate(
            label, xy=(point[0], point[1]), xytext=offset, textcoords="offset points",
            ha="center", va="center", size=_TEXT_PT,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip


def place_labels(
    points: NDArray[np.float64], widths: Sequence[float], frame: Box
) -> list[tuple[float, float]]:
    """Where labels stand so that they cover neither points nor each other, as far as there is room.

    Args:
        points: (N, 2), in typographic points of 1/72 inch, as all lengths here.
        widths: of the labels.
        frame: what they must stay within.

    Returns:
        From each point to the middle of its label.
    """
    taken = [_box(x, y, _DOT_PT, _DOT_PT) for x, y in points]
    offsets = []
    for (x, y), width in zip(points, widths, strict=True):
        places = [(dx * far, dy * far) for far in _DISTANCES_PT for dx, dy in _DIRECTIONS]
        boxes = [_box(x + dx, y + dy, width, _LINE_PT) for dx, dy in places]
        free = [
            number
            for number, box in enumerate(boxes)
            if _inside(box, frame) and not any(_overlap(box, other) for other in taken)
        ]
        chosen = free[0] if free else 0
        taken.append(boxes[chosen])
        offsets.append(places[chosen])
    return offsets


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(first: Box, second: Box) -> bool:
    return (
        first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
    )  # fmt: skip


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] < box[0] and box[2] < frame[2] and frame[1] < box[1] and box[3] < frame[3]


def _shown(text: str) -> str:
    """Text for a legend: two dollars in a file's name are no formula."""
    return text.replace("$", r"\$")
