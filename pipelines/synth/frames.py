"""Sequences of consecutive frames: folders of images, or video files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from cv2.utils import logging
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.counting import counted
from pipelines.images import IMAGE_SUFFIXES, list_images, read_rgb_u8

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".wmv", ".3gp"}
)
Image = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class FrameFolder:
    """Frames as image files, in the order of the numbers in their names."""

    name: str
    path: Path
    files: tuple[Path, ...]

    @property
    def num_expected(self) -> int:
        return len(self.files)

    def label(self, index: int) -> str:
        return self.files[index].name

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, Path | Image]]:
        """Index and file of the frames at `wanted`; whoever averages them reads them."""
        for index in wanted:
            yield index, self.files[index]

    def gaps(self) -> list[int]:
        """Frames before which some are missing, by their numbers."""
        numbers = [re.findall(r"\d+", path.stem) for path in self.files]
        if len(numbers) < 2 or not all(numbers):
            return []
        steps = np.diff([int(digits[-1]) for digits in numbers])
        usual = np.median(steps)
        odd = np.flatnonzero(steps != usual) + 1
        # Where the steps vary all along, the names are times and not counts.
        return odd.tolist() if len(odd) < len(steps) / 5 else []


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video file, decoded from its start each time: seeking misses frames with many codecs."""

    name: str
    path: Path

    @property
    def num_expected(self) -> int:
        """What the file says, which need not be so."""
        with_count = opened(self.path)
        count = with_count.get(cv2.CAP_PROP_FRAME_COUNT)
        with_count.release()
        return int(count) if 0 < count < 2**31 else 0

    @property
    def fps(self) -> float:
        capture = opened(self.path)
        fps = capture.get(cv2.CAP_PROP_FPS)
        capture.release()
        return fps

    def label(self, index: int) -> str:
        return f"frame {index}"

    def frames(self, wanted: Sequence[int] | None) -> Iterator[tuple[int, Path | Image]]:
        """Index and pixels, (H, W, 3) uint8 RGB, of the frames at `wanted`, ascending; None for all."""
        capture = opened(self.path)
        left = iter(wanted) if wanted is not None else None
        try:
            index, target = -1, next(left, None) if left else None
            while left is None or target is not None:
                index += 1
                if not capture.grab():
                    return
                if left is not None and index != target:
                    continue
                done, bgr = capture.retrieve()
                if not done:
                    return
                yield index, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)  # type: ignore[misc]
                target = next(left, None) if left else None
        finally:
            capture.release()


FrameSequence = FrameFolder | Video


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def opened(path: Path) -> cv2.VideoCapture:
    """Raises `InputError` where OpenCV cannot read the video."""
    # FFmpeg writes its complaints past Python to stderr; ours say what there is to say.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if not path.is_file():
        raise InputError("no such file", file=path)
    before = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    finally:
        logging.setLogLevel(before)
    if not capture.isOpened():
        raise InputError(
            "a video that OpenCV cannot read",
            file=path,
            got=counted(path.stat().st_size, "byte"),
            fix=f"Convert it: ffmpeg -i {path.name} -c:v ffv1 {path.stem}.mkv",
        )
    return capture


def find_sequences(roots: Sequence[Path], out: Path) -> list[tuple[str, Path]]:
    """Relative name and path of every folder that holds frames, and of every video, below `roots`.

    Raises:
        InputError: no such folder or file, a single image, or nothing that is a sequence.
    """
    out = out.resolve()
    found: dict[Path, str] = {}
    num_inside = 0
    for root in roots:
        if root.is_file():
            if root.suffix.lower() in IMAGE_SUFFIXES:
                raise InputError(
                    "a single image is no sequence", file=root, expected="a folder of frames, or a video"
                )
            found.setdefault(root, root.stem)
            continue
        images = list_images(root)
        videos = [path for path in sorted(root.rglob("*")) if is_video(path) and path.is_file()]
        for path in sorted({image.parent for image in images}) + videos:
            below = path.relative_to(root)
            if out == path.resolve() or out in path.resolve().parents:
                num_inside += 1
            elif not any(part.startswith(".") for part in below.parts):
                name = below.with_suffix("") if path in videos else below
                found.setdefault(path, name.as_posix() if below.parts else root.resolve().name)
    if not found:
        raise InputError(
            "the frames lie in the output folder" if num_inside else "no frames and no videos in this folder",
            file=roots[0],
            expected="a folder of frames, folders of such folders, or a video file",
        )
    return [(name, path) for path, name in found.items()]


def open_sequence(name: str, path: Path) -> FrameSequence:
    """The sequence at `path`, which `find_sequences` found."""
    if path.is_file():
        return Video(name=name, path=path)
    files = [file for file in list_images(path) if file.parent == path]
    return FrameFolder(name=name, path=path, files=tuple(sorted(files, key=_natural)))


def read_frame(frame: Path | Image) -> Image:
    return read_rgb_u8(frame) if isinstance(frame, Path) else frame


def _natural(path: Path) -> list[tuple[int, str]]:
    """2.png comes before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
