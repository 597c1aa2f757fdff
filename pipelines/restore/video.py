"""A video, frame by frame: rate and size are kept, sound is not, which OpenCV neither reads nor writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from nafnet_core import InputError
from pipelines.files import sha256
from pipelines.restore.finding import Item
from pipelines.restore.record import Restored
from pipelines.restorer import Image, Restorer

# What the FFmpeg that comes with OpenCV encodes for a kind of file; everywhere else MPEG-4.
_CODECS = {".avi": "MJPG", ".webm": "VP80"}
_CODEC = "mp4v"
_DEFAULT_FPS = 25.0


def restore_video(
    item: Item,
    output: Path,
    restorer: Restorer,
    entry: Restored,
    *,
    is_done: Callable[[Restored], Restored | None],
    on_frame: Callable[[str], None],
) -> Restored:
    """Restore a video into `output`, whole or not at all.

    Args:
        item: where it lies, on a disk.
        output: the file to write, of the same kind.
        restorer: the model.
        entry: what is known before reading.
        is_done: the earlier entry whose result stands for this one's.
        on_frame: called with words on how far it is.

    Returns:
        The entry of what was done, or of why it failed.
    """
    assert isinstance(item.source, Path)
    temporary = output.with_name(f".{output.stem}.{os.getpid()}.tmp{output.suffix}")
    try:
        entry = replace(entry, input_digest=sha256(item.source))
        before = is_done(entry)
        if before is not None:
            return replace(before, input=item.name, status="skipped", seconds=0.0)
        output.parent.mkdir(parents=True, exist_ok=True)
        entry = _restore(item.source, temporary, restorer, entry, on_frame)
        os.replace(temporary, output)
        return replace(entry, status="restored", output_digest=sha256(output))
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        return entry.failed(error)
    finally:
        temporary.unlink(missing_ok=True)


def _restore(
    source: Path, target: Path, restorer: Restorer, entry: Restored, on_frame: Callable[[str], None]
) -> Restored:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # else FFmpeg tells what we tell
    capture = cv2.VideoCapture(str(source))
    try:
        if not capture.isOpened():
            raise InputError("not a video, or of a kind that is not read", file=source)
        declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = capture.get(cv2.CAP_PROP_FPS) or _DEFAULT_FPS
        writer = None
        shifts, num_frames, seconds = np.zeros(3), 0, 0.0
        redone = kept = tiles = 0
        try:
            for result in restorer.stream(_frames(capture)):
                height, width = result.image.shape[:2]
                if writer is None:
                    codec = cv2.VideoWriter.fourcc(*_CODECS.get(target.suffix.lower(), _CODEC))
                    writer = cv2.VideoWriter(str(target), codec, fps, (width, height))
                    if not writer.isOpened():
                        raise InputError("cannot write a video of this kind", file=target.suffix)
                writer.write(cv2.cvtColor(result.image, cv2.COLOR_RGB2BGR))
                num_frames, seconds = num_frames + 1, seconds + result.seconds
                shifts += result.colour_shift
                tiles += result.num_tiles
                redone, kept = redone + result.num_redone, kept + result.num_kept
                entry = replace(entry, height_px=height, width_px=width, tile_px=result.tile_px)
                of_all = f"/{declared}" if declared > 0 else ""
                on_frame(f"{source.name} frame {num_frames}{of_all}")
        finally:
            if writer is not None:
                writer.release()
    finally:
        capture.release()
    if not num_frames:
        raise InputError("a video without a frame that can be read", file=source)
    notes = ["sound is left out, if there was any"]
    if declared > num_frames:
        notes.append(f"{num_frames} of {declared} frames could be read")
    red, green, blue = (round(float(shift), 3) for shift in shifts / num_frames)
    return replace(
        entry,
        num_frames=num_frames,
        num_tiles=tiles,
        tiles_redone=redone,
        tiles_kept=kept,
        colour_shift=(red, green, blue),
        notes=tuple(notes),
        seconds=seconds,
    )


def _frames(capture: cv2.VideoCapture) -> Iterator[Image]:
    while True:
        is_read, frame = capture.read()
        if not is_read:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)  # type: ignore[misc]
