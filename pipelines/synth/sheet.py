"""The contact sheet: some of the pairs, side by side, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.images import read_rgb_u8
from pipelines.pictures import label_bar
from pipelines.synth.writing import pair_paths, write_png

_NUM_PAIRS, _SIDE_PX, _GAP_PX, _LABEL_CHARS = 8, 240, 8, 32


def draw_sheet(out: Path, keys: Sequence[str], path: Path) -> None:
    """Rows of blurred and sharp side by side, of pairs spread evenly over all."""
    chosen = [keys[i] for i in np.linspace(0, len(keys) - 1, min(_NUM_PAIRS, len(keys))).astype(int)]
    cells = []
    for key in chosen:
        sides = [read_rgb_u8(path) for path in pair_paths(out, key)]
        height, width = sides[0].shape[:2]
        side = min(height, width, _SIDE_PX)
        top, left = (height - side) // 2, (width - side) // 2
        cell = np.hstack([image[top : top + side, left : left + side] for image in sides])
        canvas = np.full((_SIDE_PX, 2 * _SIDE_PX + _GAP_PX, 3), 255, np.uint8)
        canvas[:side, : 2 * side] = cell
        cells.append(np.vstack([label_bar(f"{_ascii(key)}: blurred, sharp", canvas.shape[1]), canvas]))
    if len(cells) % 2:
        cells.append(np.full_like(cells[0], 255))
    rows = [np.hstack(cells[i : i + 2]) for i in range(0, len(cells), 2)]
    write_png(path, np.vstack(rows))


def _ascii(name: str) -> str:
    """What OpenCV's fonts can draw of a name, its end where it is long."""
    return name.encode("ascii", "replace").decode()[-_LABEL_CHARS:]
