"""A first look at a sequence: how many frames, of what size, and where the picture jumps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.synth.config import MIN_SIDE_PX
from pipelines.synth.frames import FrameFolder, FrameSequence, Image, Video, read_frame
from pipelines.synth.work import in_threads

_THUMBNAIL_PX = (64, 36)
# Mean absolute differences of neighbouring thumbnails, 8-bit levels. 240 fps by hand: 0.7 to 1.3, median
# 0.9; between two scenes: 30 and more.
_CUT_RATIO, _CUT_LEVELS = 5.0, 8.0
_STILL_LEVELS = 0.1
_UNRELATED_LEVELS = 25.0  # photos of different things: 40 and more
_REPEATED_SHARE = 0.2
# A container counts its frames by duration, and may be off by one or two.
_MISSING_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Flaw:
    """What no window may contain: a damaged frame at `at`, or a jump between `at` − ½ and `at` + ½."""

    at: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a look at all frames of a sequence found."""

    num_frames: int
    flaws: tuple[Flaw, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Look:
    size_px: tuple[int, int] = (0, 0)
    thumbnail: NDArray[np.uint8] | None = None
    damage: str = ""


def scan(sequence: FrameSequence, on_frame: Callable[[], None] = lambda: None) -> Scan:
    """Decode every frame once, keeping a thumbnail of the one before.

    Raises:
        InputError: an unreadable video, frames of several sizes, or smaller than 64 px.
    """
    size: tuple[int, int] | None = None
    before: NDArray[np.uint8] | None = None
    differences: list[tuple[int, float]] = []
    flaws: list[Flaw] = []
    number = 0
    for number, look in enumerate(_looks(sequence), start=1):
        index = number - 1
        on_frame()
        if look.thumbnail is None:
            flaws.append(Flaw(at=index, reason=look.damage))
            continue
        if size is not None and look.size_px != size:
            raise InputError(
                "frames of several sizes in one sequence",
                file=sequence.path,
                expected=f"{size[0]}×{size[1]} as the first",
                got=f"{look.size_px[0]}×{look.size_px[1]} in {sequence.label(index)}",
            )
        size = look.size_px
        if before is not None:
            differences.append((index, float(cv2.absdiff(look.thumbnail, before).mean())))
        before = look.thumbnail
    if size is None:
        reason = flaws[0].reason if flaws else "no frame in it can be decoded"
        raise InputError("none of the frames can be read", file=sequence.path, got=reason)
    if min(size) < MIN_SIDE_PX:
        raise InputError(
            "frames too small",
            file=sequence.path,
            expected=f"{MIN_SIDE_PX} px a side",
            got=f"{size[0]}×{size[1]}",
        )
    usual = float(np.median([difference for _, difference in differences])) if differences else 0.0
    if usual > _UNRELATED_LEVELS:
        raise InputError(
            "not consecutive frames: neighbours have nothing in common",
            file=sequence.path,
            got=f"a median difference of {usual:.0f} of 255 levels, where video has some 1 to 10",
            fix="Give sharp photos without --average",
        )
    if isinstance(sequence, FrameFolder):
        flaws += [
            Flaw(at=index - 0.5, reason=f"frames are missing before {sequence.label(index)}")
            for index in sequence.gaps()
        ]
    flaws += _cuts(sequence, differences, usual)
    notes = _notes(sequence, number, size, [difference for _, difference in differences])
    return Scan(num_frames=number, flaws=tuple(sorted(flaws, key=lambda flaw: flaw.at)), notes=notes)


def _looks(sequence: FrameSequence) -> Iterator[_Look]:
    if isinstance(sequence, Video):
        for _, frame in sequence.frames(None):
            yield _look(frame)
    else:
        yield from in_threads(_look, sequence.files)


def _look(frame: Path | Image) -> _Look:
    try:
        image = read_frame(frame)
    except InputError as error:
        return _Look(damage=str(error))
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(gray, _THUMBNAIL_PX, interpolation=cv2.INTER_AREA)
    return _Look(size_px=(image.shape[1], image.shape[0]), thumbnail=thumbnail)  # type: ignore[arg-type]


def _cuts(sequence: FrameSequence, differences: list[tuple[int, float]], usual: float) -> list[Flaw]:
    """Where neighbours differ far more than is usual in the sequence: a cut, or frames that were dropped."""
    return [
        Flaw(
            at=index - 0.5,
            reason=f"the picture jumps at {sequence.label(index)}, {difference:.0f} levels, not {usual:.1f}",
        )
        for index, difference in differences
        if difference > max(_CUT_LEVELS, _CUT_RATIO * usual)
    ]


def _notes(
    sequence: FrameSequence, num_frames: int, size: tuple[int, int], differences: list[float]
) -> tuple[str, ...]:
    fps = sequence.fps if isinstance(sequence, Video) else 0.0  # 0 where the container does not say
    rate = f" at {fps:.4g} fps" if fps > 0 else ""
    notes = [f"{sequence.name}: {num_frames} frames of {size[0]}×{size[1]}{rate}"]
    missing = sequence.num_expected - num_frames
    if missing > 2 + _MISSING_SHARE * num_frames:
        notes.append(
            f"{sequence.name}: the video is cut short or damaged, {num_frames} of {sequence.num_expected} "
            "frames could be decoded; these are used"
        )
    if not differences:
        return tuple(notes)
    num_repeated = sum(difference == 0 for difference in differences)
    if np.median(differences) < _STILL_LEVELS:
        notes.append(f"{sequence.name}: next to nothing moves, so its pairs are hardly blurred")
    elif num_repeated > _REPEATED_SHARE * len(differences):
        notes.append(
            f"{sequence.name}: {num_repeated} of {num_frames} frames repeat the one before, as after a "
            "change of the frame rate; their average stutters"
        )
    return tuple(notes)
