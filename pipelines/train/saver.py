"""Checkpoints written beside the training: it stands still only while its state is copied."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from nafnet_core import CapabilityError
from pipelines.checkpoint import CheckpointLedger, Snapshot

log = logging.getLogger(__name__)


class Saver:
    """Writes to a ledger on a thread of its own, one thing at a time, in order."""

    def __init__(self, ledger: CheckpointLedger) -> None:
        self.ledger = ledger
        self.failure: str | None = None
        """Why the newest checkpoint could not be written; None where it was."""
        self.stopped_s = 0.0
        """How long training stood still for the last one, its copy included."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def save(self, take: Callable[[], Snapshot], psnr_db: float | None = None) -> None:
        """Copy the state now, and write it soon. Waits for the one before: memory holds one copy at most."""
        start = time.perf_counter()
        self.wait()
        snapshot = take()
        self._pending.append(self._pool.submit(self._write, snapshot, psnr_db))
        self.stopped_s = time.perf_counter() - start

    def score(self, samples: int, psnr_db: float) -> None:
        """Enter the PSNR of a checkpoint that was saved before it was known."""
        self._pending.append(self._pool.submit(self.ledger.score, samples, psnr_db))

    def wait(self) -> None:
        """Return when all is written, or has failed."""
        for future in self._pending:
            future.result()
        self._pending.clear()

    def close(self) -> None:
        """Wait, and end the thread.

        Raises:
            CapabilityError: the last checkpoint could not be written.
        """
        self.wait()
        self._pool.shutdown()
        if self.failure is not None:
            raise CapabilityError(
                "the last checkpoint could not be written",
                file=self.ledger.folder,
                got=self.failure,
                fix="Make room; the same command goes on from the checkpoint before",
            )

    def _write(self, snapshot: Snapshot, psnr_db: float | None) -> None:
        try:
            self.ledger.save(snapshot, psnr_db)
        except OSError as error:
            # Hours of training are not given up for it: there may be room when the next one is due.
            self.failure = error.strerror or str(error)
            log.warning("checkpoint at sample %d not written: %s", snapshot.samples, self.failure)
        else:
            self.failure = None
