"""The files of a pair: where they lie, when they count as made, and how they are written whole."""

from __future__ import annotations

import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from nafnet_core.blur import sample_rng
from pipelines.files import written_aside
from pipelines.png import encode_png
from pipelines.synth.config import SETTINGS, SIDES


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of one job."""

    records: tuple[dict[str, object], ...] = ()
    """The parameters of each pair, those that were there already included."""
    num_kept: int = 0
    refused: str = ""


def pair_rng(seed: int, name: str, number: int) -> np.random.Generator:
    """Randomness of one pair: from seed, name and number only, not from order, threads or machines."""
    return sample_rng(seed, zlib.crc32(name.encode()) << 32 | number)


def pair_paths(out: Path, key: str) -> tuple[Path, Path]:
    """Blurred and sharp file of a pair."""
    blur, sharp = (out / side / f"{key}.png" for side in SIDES)
    return blur, sharp


def is_made(out: Path, key: str, sources: list[Path]) -> bool:
    """Whether both files are there, which are whole then, and younger than all they were made from."""
    try:
        made_ns = min(path.stat().st_mtime_ns for path in pair_paths(out, key))
        return all(source.stat().st_mtime_ns <= made_ns for source in sources)
    except FileNotFoundError:
        return False


def make_folders(out: Path, name: str) -> None:
    """Make both folders of a scene. Raises `InputError` on a machine that sees another disk than ours."""
    if not (out / SETTINGS).is_file():
        raise InputError(
            "a Ray worker does not see the output folder",
            file=out,
            fix="Give one on storage that all nodes share, or leave out --address",
        )
    for side in SIDES:
        (out / side / name).mkdir(parents=True, exist_ok=True)


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    with written_aside(path) as temporary:
        temporary.write_bytes(encode_png(image))


def link(source: Path, path: Path) -> None:
    """Give `source` a second name, or copy it."""
    with written_aside(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # not every file system has hard links
            shutil.copyfile(source, temporary)


def shrunk(image: NDArray[np.uint8], max_side_px: int | None) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if max_side_px is None or max(height, width) <= max_side_px:
        return image
    scale = max_side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
