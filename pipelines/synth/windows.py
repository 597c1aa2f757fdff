"""Pairs from consecutive frames: the mean of a window is the blurred image, its middle frame the sharp one.

As GoPro was made (Nah et al., CVPR 2017, section 2): 7 to 13 frames of 240 a second, in linear light, or as
encoded, which its `blur` is (`encoded_share`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nafnet_core import InputError
from nafnet_core.blur import average_frames
from pipelines.synth.config import SynthConfig, draw
from pipelines.synth.frames import FrameFolder, FrameSequence, Image, read_frame
from pipelines.synth.scan import Scan
from pipelines.synth.writing import Made, is_made, make_folders, pair_paths, pair_rng, shrunk, write_png


@dataclass(frozen=True, kw_only=True)
class Window:
    """Frames `first` … `first + length − 1` of a sequence; `number` counts the windows in it."""

    number: int
    first: int
    length: int

    @property
    def last(self) -> int:
        return self.first + self.length - 1

    @property
    def middle(self) -> int:
        return self.first + self.length // 2

    @property
    def indices(self) -> range:
        return range(self.first, self.last + 1)

    def key(self, name: str) -> str:
        return f"{name}/{self.number:06d}"


@dataclass(frozen=True, kw_only=True)
class WindowJob:
    """Everything a worker needs to make one pair: files to read, or frames of a video, decoded already."""

    name: str
    path: Path
    window: Window
    labels: tuple[str, str, str]
    """First, middle and last frame, as people call them."""
    frames: tuple[Path | Image, ...]
    """Empty where the pair is there already."""


def window_length(config: SynthConfig, rng: np.random.Generator) -> int:
    """Odd number of frames, all that `average` allows equally likely."""
    assert config.average is not None
    low, high = config.average
    return low + 2 * int(rng.integers((high - low) // 2 + 1))


def plan_windows(sequence: FrameSequence, scan: Scan, config: SynthConfig) -> tuple[list[Window], list[str]]:
    """All windows of a sequence, and a line for each that is left out.

    Raises:
        InputError: there are fewer frames than a window has.
    """
    windows: list[Window] = []
    refused: list[str] = []
    number = first = 0
    while True:
        length = window_length(config, pair_rng(config.seed, sequence.name, number))
        window = Window(number=number, first=first, length=length)
        if window.last >= scan.num_frames:
            break
        flaw = next((flaw for flaw in scan.flaws if window.first <= flaw.at <= window.last), None)
        if flaw is None:
            windows.append(window)
        else:
            span = f"{sequence.label(window.first)} to {sequence.label(window.last)}"
            refused.append(f"{sequence.name}: no pair of {span}: {flaw.reason}")
        number, first = number + 1, first + (config.window_stride or length)
    if not number:
        raise InputError(
            "fewer frames than a window",
            file=sequence.path,
            expected=f"{length} frames at least",
            got=scan.num_frames,
            fix="Average fewer with --average",
        )
    return windows, refused


def window_jobs(
    sequence: FrameSequence, windows: Sequence[Window], config: SynthConfig
) -> Iterator[WindowJob]:
    """One job a window, in order. Of a video, no more frames are held than a window has.

    Raises:
        InputError: the video gives fewer frames than it did when it was scanned.
    """
    todo = {window for window in windows if not _is_there(sequence, window, config.out)}
    frames = sequence.frames(sorted({index for window in todo for index in window.indices}))
    held: dict[int, Path | Image] = {}
    for window in windows:
        if window in todo:
            held = {index: frame for index, frame in held.items() if index >= window.first}
            while window.last not in held:
                index, frame = next(frames, (None, None))
                if index is None or frame is None:
                    raise InputError("frames that were there are gone", file=sequence.path)
                held[index] = frame if isinstance(frame, Path) else shrunk(frame, config.max_side_px)
        first, middle, last = (sequence.label(i) for i in (window.first, window.middle, window.last))
        yield WindowJob(
            name=sequence.name,
            path=sequence.path,
            window=window,
            labels=(first, middle, last),
            frames=tuple(held[index] for index in window.indices) if window in todo else (),
        )


def _is_there(sequence: FrameSequence, window: Window, out: Path) -> bool:
    sources = [sequence.path]
    if isinstance(sequence, FrameFolder):
        sources = [sequence.files[index] for index in window.indices]
    return is_made(out, window.key(sequence.name), sources)


def average_window(job: WindowJob, config: SynthConfig) -> Made:
    """Make the pair of one window, unless it is there."""
    window = job.window
    key = window.key(job.name)
    rng = pair_rng(config.seed, job.name, window.number)
    window_length(config, rng)  # drawn when the windows were planned, and not to be drawn again
    degradation = draw(config, rng)
    first, middle, last = job.labels
    record: dict[str, object] = {
        "key": key,
        "kind": "frames",
        "source": str(job.path),
        "first_frame": first,
        "sharp_frame": middle,
        "last_frame": last,
        "first_index": window.first,
        "num_frames": window.length,
        "gamma": degradation.gamma,
        "seed": config.seed,
        "shot_noise": degradation.shot_noise,
        "read_noise": degradation.read_noise,
        "jpeg_quality": degradation.jpeg_quality,
    }
    if not job.frames:
        return Made(records=(record,), num_kept=1)
    try:
        frames = (shrunk(read_frame(frame), config.max_side_px) for frame in job.frames)
        blurred = average_frames(frames, degradation, rng)
        sharp = shrunk(read_frame(job.frames[window.length // 2]), config.max_side_px)
        make_folders(config.out, job.name)
        blur_path, sharp_path = pair_paths(config.out, key)
        # The sharp one first: who stops between them leaves no blurred image that seems complete.
        write_png(sharp_path, sharp)
        write_png(blur_path, blurred)
    except InputError as error:
        return Made(refused=str(error))
    return Made(records=(record,))
