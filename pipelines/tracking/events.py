"""TensorBoard's event files, written at once.

tensorboardX's own `SummaryWriter` hands events to a thread, and its `flush` does not wait for that: what a
kill takes with it would be missing from some curves, and be taken for drawn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class EventFile:
    """A new file of events in a folder."""

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        """Begin a file.

        Args:
            folder: created if need be.
            purge_step: TensorBoard drops what earlier files have from this step on.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=purge_step, session_log=start))

    def scalar(self, name: str, value: float, step: int, time_s: float) -> None:
        """One point of a curve."""
        from tensorboardX.summary import scalar

        self._write(scalar(name, value), step, time_s)

    def picture(self, name: str, pixels_hwc_u8: NDArray[np.uint8], step: int, time_s: float) -> None:
        """An RGB picture."""
        from tensorboardX.summary import image

        self._write(image(name, pixels_hwc_u8, dataformats="HWC"), step, time_s)

    def flush(self) -> None:
        """Sync the file."""
        self._writer.flush()

    def close(self) -> None:
        """Sync and close it."""
        self._writer.close()

    def _write(self, summary: object, step: int, time_s: float) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(summary=summary, step=step, wall_time=time_s))
