"""What a driver does every second for a run: brings the journal, sends it on, tells what was lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from nafnet_core import CapabilityError
from pipelines.tracking import Row, Tracker
from pipelines.train.failures import read_failures
from pipelines.train.files import NOT_WRITTEN, STOP
from pipelines.train.mirror import Mirror

log = logging.getLogger(__name__)


class Pump:
    """One run's; call it. Of several at a time, `label` says in what is told which it is of."""

    def __init__(
        self,
        run_dir: Path,
        mirror: Mirror | None,
        tracker: Tracker,
        on_row: Callable[[Row], None],
        *,
        label: str = "",
    ) -> None:
        self._label = label
        self._run_dir, self._mirror, self._tracker, self._on_row = run_dir, mirror, tracker, on_row
        self._told = 0

    def __call__(self) -> None:
        if self._mirror is not None:
            self._pull(self._mirror)
        for row in self._tracker.pump():
            log.info("%s%s samples %s %s", self._label, row.samples, row.event or "", row.metrics)
            self._on_row(row)
            if (row.event or "").startswith(NOT_WRITTEN):
                log.warning("%s%s; trying again when the next is due", self._label, row.event)
        failures = read_failures(self._run_dir)
        for failure in failures[self._told :]:
            log.warning("%sworkers were lost: %s", self._label, failure.line())
        self._told = len(failures)

    def _pull(self, mirror: Mirror) -> None:
        try:
            if (self._run_dir / STOP).exists():
                mirror.ask_to_stop()
            mirror.pull()
        except CapabilityError as error:
            log.warning("%sthe run's storage does not answer, trying again: %s", self._label, error)
