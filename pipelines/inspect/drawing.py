"""Draw pairs side by side, and the distributions of a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.files import make_folder, written_aside
from pipelines.inspect.sampling import Sample, psnr_db
from pipelines.shards import Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
# All in px of the picture. Text is 8 pt DejaVu Sans Mono, of 10 px a character.
_BOX_PX, _GAP_PX, _GUTTER_PX, _MARGIN_PX = 300, 8, 44, 30
_TITLE_PX, _HEAD_PX, _LABEL_PX, _CHAR_PX = 64, 34, 30, 10.1
_MAX_BARS, _MAX_BINS, _MAX_LABEL = 12, 30, 22
_FLAT = 0.1  # sharpness of a blank image is 0, which a logarithmic axis cannot show
_BLURRED, _SHARP = "C1", "C0"


def draw_pairs(path: Path, pairs: Sequence[Pair], *, title: str) -> Path:
    """Draw up to two pairs a row, blurred and sharp at one scale, under their keys and PSNRs; write a PNG.

    Of sharp photos alone, four a row. Images that are larger than their box are shrunk, and smaller ones
    enlarged by whole numbers.
    """
    # The figure class and not pyplot, whose global state keeps figures alive.
    from matplotlib.figure import Figure

    sides = 1 if all(pair.is_sharp_alone for pair in pairs) else 2
    columns = min(4 // sides, len(pairs))
    rows = -(-len(pairs) // columns)
    ratio = float(np.median([pair.gt.shape[0] / pair.gt.shape[1] for pair in pairs]))
    box_height = round(_BOX_PX * min(max(ratio, 0.4), 1.6))
    pair_width = sides * _BOX_PX + (sides - 1) * _GAP_PX
    width = 2 * _MARGIN_PX + columns * pair_width + (columns - 1) * _GUTTER_PX
    height = _TITLE_PX + _HEAD_PX + rows * (_LABEL_PX + box_height + 2 * _GAP_PX) + _MARGIN_PX // 2
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)

    def write(text: str, x: float, y: float, **style: Any) -> None:
        # A key with two dollars in it is no formula.
        figure.text(x / width, 1 - y / height, text, va="center", parse_math=False, **style)

    write(_fitted(title, width - 2 * _MARGIN_PX, 12.5), _MARGIN_PX, _TITLE_PX / 2, size=10, weight="bold")
    for column in range(sides * columns):
        left = _left(column // sides, pair_width) + column % sides * (_BOX_PX + _GAP_PX)
        write(("blurred", "sharp")[column % sides - sides], left, _TITLE_PX + _HEAD_PX / 2, size=9)
    for number, pair in enumerate(pairs):
        left, row = _left(number % columns, pair_width), number // columns
        top = _TITLE_PX + _HEAD_PX + row * (_LABEL_PX + box_height + 2 * _GAP_PX)
        score = _score(pair)
        middle, style = top + _LABEL_PX / 2, {"size": 8, "family": "monospace"}
        write(_fitted(pair.key, pair_width - 11 * _CHAR_PX * bool(score)), left, middle, **style)
        write(score, left + pair_width, middle, ha="right", **style)
        for side, image in enumerate((pair.lq, pair.gt)[-sides:]):
            shown = _shown(image, box_height)
            x = left + side * (_BOX_PX + _GAP_PX)
            figure.figimage(shown, x, height - top - _LABEL_PX - shown.shape[0], origin="upper")
    return _saved(figure, path)


def _score(pair: Pair) -> str:
    if pair.is_sharp_alone:
        return ""
    level = psnr_db(pair.lq, pair.gt)
    return f"{level:.2f} dB" if np.isfinite(level) else "equal"


def draw_histograms(path: Path, sample: Sample, *, title: str) -> Path:
    """Draw sizes (or scenes, where all sizes are equal), sharpness and PSNR of a sample; write a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(12, 3.6), dpi=_DPI, layout="constrained")
    figure.suptitle(title, size=11, parse_math=False)
    first, second, third = figure.subplots(1, 3)
    _draw_sizes(first, sample)
    values = np.maximum([*sample.sharpness_blurred, *sample.sharpness_sharp], _FLAT)
    edges = np.geomspace(values.min() * 0.9, values.max() * 1.1, _num_bins(len(sample.sizes)) + 1)
    for label, side, color in (
        ("sharp", sample.sharpness_sharp, _SHARP),
        ("blurred", sample.sharpness_blurred, _BLURRED),
    ):
        if not side:
            continue
        shown = np.maximum(side, _FLAT)
        label = f"{label}, median {_short(float(np.median(side)))}"
        second.hist(
            shown, bins=edges.tolist(), color=color, alpha=0.55, edgecolor="white", linewidth=0.4, label=label
        )
    second.set_xscale("log")
    # 1, 2, 5 as plain numbers: powers with labelled tenths run into each other over one decade.
    second.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 300 * edges[0] else (1,)))
    second.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    second.xaxis.set_minor_formatter(NullFormatter())
    second.set_title("Sharpness", size=10)
    second.set_xlabel("variance of the Laplacian, squared 8-bit levels", size=9)
    # Above the bars, with room made for it.
    second.set_ylim(0, second.get_ylim()[1] * 1.3)
    second.legend(loc="upper left", fontsize=8)
    finite = [value for value in sample.psnr_db if np.isfinite(value)]
    if finite:
        spread = (min(finite) - 0.5, max(finite) + 0.5)
        third.hist(
            finite,
            bins=_num_bins(len(finite)),
            range=spread,
            color=_BLURRED,
            alpha=0.55,
            edgecolor="white",
            linewidth=0.4,
        )
        third.axvline(float(np.median(finite)), color="0.25", linestyle="--")
    words = [f"median {np.median(finite):.2f} dB"] if finite else []
    words += [f"{sample.num_equal} equal pairs not shown"] if sample.num_equal else []
    third.set_title(f"Blur: {', '.join(words) or 'none, sharp photos alone'}", size=10)
    third.set_xlabel("PSNR of blurred against sharp, dB", size=9)
    if not sample.psnr_db:
        third.set_axis_off()
    for axes in (second, third):
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return _saved(figure, path)


def _draw_sizes(axes: Axes, sample: Sample) -> None:
    """Bars where there are few sizes or scenes, else a histogram."""
    from matplotlib.ticker import MaxNLocator

    sizes = Counter(sample.sizes)
    (width, height), _ = sizes.most_common(1)[0]
    if len(sizes) > 1:
        counts = {f"{w}×{h}": number for (w, h), number in sorted(sizes.items())}
        axes.set_title("Sizes, px", size=10)
    else:
        counts = dict(sorted(Counter(sample.scenes).items()))
        axes.set_title(f"Scenes; all pairs are {width}×{height} px", size=10)
    if len(counts) <= _MAX_BARS:
        names = [_fitted(name, _MAX_LABEL, 1) for name in counts]
        # By position: two long names may be shortened to the same one.
        axes.barh(range(len(names)), list(counts.values()), height=0.6, color="0.55")
        axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names], size=8)
        middle, half = (len(names) - 1) / 2, max(len(names), 5) / 2
        axes.set_ylim(middle + half, middle - half)
        axes.set_xlabel("pairs")
    elif len(sizes) > 1:
        pixels = [w * h / 1e6 for w, h in sample.sizes]
        axes.hist(pixels, bins=_num_bins(len(pixels)), color="0.55")
        axes.set_xlabel(f"megapixels, {len(sizes)} different sizes")
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        most = max(counts.values())
        axes.hist(
            list(counts.values()), bins=np.arange(0.5, most + 1.5, max(1, most // 30)).tolist(), color="0.55"
        )
        axes.set_xlabel(f"sampled pairs in a scene, {len(counts)} scenes")
        axes.set_ylabel("scenes")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(sizes) == 1 or len(counts) <= _MAX_BARS:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _left(column: int, pair_width: int) -> int:
    return _MARGIN_PX + column * (pair_width + _GUTTER_PX)


def _shown(image: NDArray[np.uint8], box_height: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    scale = min(_BOX_PX / width, box_height / height)
    if scale >= 1:
        return np.repeat(np.repeat(image, int(scale), axis=0), int(scale), axis=1)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _fitted(text: str, room_px: float, char_px: float = _CHAR_PX) -> str:
    """Text of one line that fits, its middle left out if need be, in characters that the font has."""
    text = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
    most = max(8, int(room_px / char_px))
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def _num_bins(num_values: int) -> int:
    return int(min(_MAX_BINS, max(8, 2 * np.sqrt(num_values))))


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _saved(figure: Figure, path: Path) -> Path:
    make_folder(path.parent)
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
    return path
