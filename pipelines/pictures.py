"""Pictures for people: labelled before/after strips, as PNG or JPEG, and training curves, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.files import make_folder, written_aside
from pipelines.png import encode_png

if TYPE_CHECKING:
    from pipelines.scoring import ImageScore
    from pipelines.shards import Pair
    from pipelines.tracking import Row

_LABEL_PX, _GAP_PX = 28, 6
_WHITE, _INK = 255, (40, 40, 40)
_CURVES = {
    "train/psnr_db": "PSNR of training patches, dB",
    "train/lr": "learning rate",
    "val/psnr_db": "validation PSNR, dB",
}
_SMOOTHING_SHARE = 20  # a running mean covers one part in so many of a curve


def before_after(
    path: Path,
    panels: Mapping[str, NDArray[np.uint8]],
    *,
    zoom_px: int = 160,
    max_width_px: int = 480,
    corner: tuple[int, int] | None = None,
) -> Path:
    """Draw images of one size side by side, each over its own magnified detail, with a label each.

    Args:
        path: the PNG to write, or the JPEG, by its name.
        panels: label → (H, W, 3) uint8 RGB, all of one size: the degraded one first, the sharp one last.
            Labels are ASCII.
        zoom_px: side of the detail.
        max_width_px: wider images are shown shrunk; the detail is not.
        corner: top and left of the detail; None takes the square where the first and the last panel differ
            most.
    """
    height, width = next(iter(panels.values())).shape[:2]
    side = min(zoom_px, height, width)
    images = list(panels.values())
    top, left = corner or detail_corner(images[0], images[-1], side)
    shown_width = min(width, max_width_px)
    columns = []
    for label, image in panels.items():
        small = _resized(image, shown_width, cv2.INTER_AREA)
        detail = _resized(image[top : top + side, left : left + side], shown_width, cv2.INTER_NEAREST)
        bar = label_bar(label, shown_width)
        gap = np.full((_GAP_PX, shown_width, 3), _WHITE, np.uint8)
        columns += [np.vstack([bar, small, gap, detail]), None]
    tall = columns[0].shape[0]  # type: ignore[union-attr]
    strips = [np.full((tall, _GAP_PX, 3), _WHITE, np.uint8) if c is None else c for c in columns[:-1]]
    make_folder(path.parent)
    with written_aside(path) as temporary:
        drawn = np.hstack(strips)
        temporary.write_bytes(encode_jpeg(drawn) if path.suffix == ".jpg" else encode_png(drawn))
    return path


def scored_panels(score: ImageScore, pair: Pair, restored: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """Panels of `before_after` for a scored pair, with the PSNR in their labels."""
    return {
        f"blurred  {score.psnr_blurred_db:.2f} dB": pair.lq,
        f"restored  {score.psnr_restored_db:.2f} dB": restored,
        "sharp (truth)": pair.gt,
    }


def encode_jpeg(rgb_hwc_u8: NDArray[np.uint8], *, quality: int = 92) -> bytes:
    """JPEG of an (H, W, 3) uint8 RGB array: a picture to look at, not to measure."""
    bgr = cv2.cvtColor(np.ascontiguousarray(rgb_hwc_u8), cv2.COLOR_RGB2BGR)
    done, content = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return content.tobytes()


def label_bar(text: str, width: int) -> NDArray[np.uint8]:
    """A white strip, `width` px wide and 28 high, with ASCII text in it."""
    bar = np.full((_LABEL_PX, width, 3), _WHITE, np.uint8)
    cv2.putText(bar, text, (4, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, _INK, 1, cv2.LINE_AA)
    return bar


def curves(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    lines: Mapping[str, tuple[str, float]] | None = None,
    marks: Sequence[float] = (),
) -> Path:
    """Draw each series of (samples, value) in a panel of its own and write a PNG.

    Series of many points are drawn pale, with their running mean over a twentieth of them on top.

    Args:
        path: the PNG to write.
        series: title of the panel → its points.
        title: over all panels.
        lines: series → label and value of a level to compare with, dashed.
        marks: samples where a run went on after a stop, dotted.
    """
    # The figure class and not pyplot, whose global state keeps figures alive.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(4.2 * len(series), 3.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    # One range for all, from the beginning on: panels of one run are read together.
    end = max((samples for points in series.values() for samples, _ in points), default=0)
    for axes, (name, points) in zip(panels, series.items(), strict=True):
        samples, values = np.array(points, dtype=float).reshape(-1, 2).T
        window = len(points) // _SMOOTHING_SHARE
        if window > 1:
            axes.plot(samples, values, alpha=0.3)
            # Both coordinates, so that the mean stands where its points are.
            smooth = [
                np.convolve(line, np.full(window, 1 / window), mode="valid") for line in (samples, values)
            ]
            axes.plot(*smooth, color="C0")
        else:
            axes.plot(samples, values, marker="." if len(points) < _SMOOTHING_SHARE else None)
        for mark in marks:
            axes.axvline(mark, linestyle=":", color="0.6", label="resumed" if mark == marks[0] else None)
        if name in (lines or {}):
            label, level = (lines or {})[name]
            axes.axhline(level, linestyle="--", color="0.4", label=label)
        if marks or name in (lines or {}):
            axes.legend()
        axes.set_xlim(0, 1.03 * max(end, 1))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 120k: longer numbers run into each other
        axes.set_xlabel("samples seen")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    make_folder(path.parent)
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def training_curves(path: Path, rows: Sequence[Row], *, title: str) -> Path | None:
    """Draw a run's PSNR and learning rate from its journal; None where there is nothing to draw yet.

    Of steps that a killed run took again, the last ones are drawn.
    """
    rows, marks = _as_one(rows)
    series = {
        label: [(row.samples, row.metrics[name]) for row in rows if name in row.metrics]
        for name, label in _CURVES.items()
    }
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    lines = {}
    validations = [row.metrics for row in rows if "val/gain_db" in row.metrics]
    if validations:
        last = validations[-1]
        lines[_CURVES["val/psnr_db"]] = ("blurred input", last["val/psnr_db"] - last["val/gain_db"])
    return curves(path, series, title=title, lines=lines, marks=marks)


def _as_one(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """A journal without the steps that were taken again, and the samples where attempts went on."""
    kept: list[Row] = []
    marks: list[int] = []
    for row in rows:
        if row.event in ("started", "resumed"):
            kept = [earlier for earlier in kept if earlier.samples <= row.samples]
            marks = [mark for mark in marks if mark < row.samples]
            marks += [row.samples] if row.event == "resumed" else []
        kept.append(row)
    return kept, marks


def detail_corner(lq: NDArray[np.uint8], gt: NDArray[np.uint8], side: int) -> tuple[int, int]:
    """Top and left of the square where blurring cost most, on a coarse grid: never blank sky."""
    lost = cv2.absdiff(lq, gt).mean(axis=2)
    step = max(1, side // 4)
    corners = [
        (top, left)
        for top in range(0, lost.shape[0] - side + 1, step)
        for left in range(0, lost.shape[1] - side + 1, step)
    ]
    return max(corners, key=lambda c: float(lost[c[0] : c[0] + side, c[1] : c[1] + side].mean()))


def _resized(image: NDArray[np.uint8], width: int, interpolation: int) -> NDArray[np.uint8]:
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=interpolation)  # type: ignore[return-value]
