"""One run's journal and pictures, to TensorBoard's event files here, and to MLflow on a thread of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nafnet_core import CapabilityError
from pipelines.tracking.client import reason
from pipelines.tracking.events import EventFile
from pipelines.tracking.opening import Opening
from pipelines.tracking.rows import Row, read_rows, rows_from, within
from pipelines.tracking.sender import Sender, new_pictures
from pipelines.tracking.state import Ending, TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_PICTURE_TAG = "val/before_after"


class Tracker:
    """Sends one run; what was not taken is in the run's folder, for the next one to send."""

    def __init__(self, run_dir: Path, journal: Path) -> None:
        self._run_dir, self._journal, self._pictures = run_dir, journal, run_dir / "pictures"
        self._state = TrackingState(run_dir)

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None before there is one."""
        return self._state.now.run_id

    def start(self, client: MlflowClient, opening: Opening) -> None:
        """Begin the MLflow run, or go on with the one of an earlier attempt.

        Raises:
            CapabilityError: a new run could not be made.
        """
        from mlflow.exceptions import MlflowException

        self._sender = Sender(client, self._state, self._journal, self._pictures, opening)
        try:
            self._sender.start()
        except (MlflowException, OSError) as error:
            raise CapabilityError(
                "the tracking server made no run",
                got=reason(error, str(client.tracking_uri)),
                fix="Check MLFLOW_TRACKING_URI",
            ) from error
        self._drawn = within(self._journal, self._state.now.drawn)
        self._drawn_picture = self._state.now.drawn_picture
        steps = [row.samples for row in read_rows(self._journal) if row.end <= self._drawn]
        steps += [int(Path(self._drawn_picture).stem)] if self._drawn_picture else []
        folder = self._run_dir / "tensorboard"
        # TensorBoard drops what an attempt that was killed drew beyond: it is drawn again.
        purge_step = max(steps, default=-1) + 1 if folder.exists() else None
        self._events = EventFile(folder, purge_step=purge_step)

    def pump(self) -> list[Row]:
        """Draw what is new in the journal and among the pictures; returns the rows."""
        new: list[Row] = []
        while rows := rows_from(self._journal, self._drawn):
            for row in rows:
                for name, value in row.metrics.items():
                    self._events.scalar(name, value, row.samples, row.time_s)
            self._drawn = rows[-1].end
            new += rows
        pictures = new_pictures(self._pictures, self._drawn_picture)
        for path in pictures:
            self._draw(path)
        if new or pictures:
            self._events.flush()
            self._state.save(drawn=self._drawn, drawn_picture=self._drawn_picture)
        return new

    def finish(self, status: str, files: Sequence[Path] = (), *, wait_s: float) -> None:
        """Send the rest, the given files, and that the run is `FINISHED`, `FAILED` or `KILLED`.

        What the server has not taken after `wait_s` stays for the next attempt, and is said.
        """
        self.pump()
        self._events.close()
        names = tuple(str(file) for file in files)
        self._state.save(ending=Ending(status=status, time_ms=int(time.time() * 1000), files=names))
        self._sender.end(wait_s)
        left = self.unsent()
        if left:
            log.warning("not sent to the tracking server yet: %s. The same command again sends them", left)

    def unsent(self) -> str | None:
        """What MLflow has not got of the run so far, in words; None where it has everything."""
        state = self._state.now
        rows = len(read_rows(self._journal, within(self._journal, state.sent)))
        pictures = len(new_pictures(self._pictures, state.sent_picture))
        parts = (
            ("its parameters", not state.opened),
            (f"{rows} row{'s' * (rows > 1)}", rows),
            (f"{pictures} picture{'s' * (pictures > 1)}", pictures),
            ("its end", not state.ended),
        )
        return ", ".join(words for words, is_left in parts if is_left) or None

    def read_all(self) -> list[Row]:
        """Every row of the journal, those of earlier attempts included."""
        return read_rows(self._journal)

    def _draw(self, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels_hwc_u8 = np.asarray(image.convert("RGB"))
        self._events.picture(_PICTURE_TAG, pixels_hwc_u8, int(path.stem), path.stat().st_mtime)
        self._drawn_picture = path.name
