"""What MLflow and TensorBoard have of a run, in its folder: the next attempt goes on from there."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipelines.files import write_json

TRACKING = "tracking.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a run ended, for MLflow to be told."""

    status: str
    """`FINISHED`, `FAILED` or `KILLED`."""
    time_ms: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Each field moves on once the server took what it stands for."""

    run_id: str | None = None
    key: str | None = None
    """A tag of the MLflow run: finds one that was made while its answer was lost."""
    opened: bool = False
    """Parameters, tags and data sets are there."""
    sent: int = 0
    """Bytes of the journal that MLflow has."""
    sent_picture: str = ""
    """Name of the newest picture that MLflow has."""
    drawn: int = 0
    """Bytes of the journal that TensorBoard has."""
    drawn_picture: str = ""
    ending: Ending | None = None
    ended: bool = False
    """The server knows how the run ended."""


class TrackingState:
    """`Progress`, kept in a file; two threads move it on."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._lock, self._closed = run_dir / TRACKING, threading.Lock(), False
        self.now = _read(self._path)

    def save(self, **changes: Any) -> None:
        """Change fields, in the file too."""
        with self._lock:
            self.now = replace(self.now, **changes)
            if not self._closed:
                write_json(self._path, asdict(self.now))

    def close(self) -> None:
        """Leave the file to whoever opens it next; a call that hangs may still come back here."""
        with self._lock:
            self._closed = True


def _read(path: Path) -> Progress:
    content = json.loads(path.read_text()) if path.exists() else {}
    known = {field.name: content[field.name] for field in fields(Progress) if field.name in content}
    if known.get("ending"):
        ending = known["ending"]
        known["ending"] = Ending(**{**ending, "files": tuple(ending["files"])})
    return Progress(**known)
