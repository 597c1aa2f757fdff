"""What Ray Train's controller calls."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from pipelines.storage import LocalFolder, RemoteFolder
from pipelines.train.failures import note_failure


class FailureNotes(UserCallback):
    """Writes a note of each failure into the run's storage."""

    def __init__(self, storage: LocalFolder | RemoteFolder) -> None:
        self._storage = storage

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called before the controller decides on another attempt."""
        del run_context
        note_failure(self._storage, worker_exceptions)
