"""What becomes of an error in a worker: noted by Ray Train's controller, told by the driver, retried or not.

Ray Train replaces the workers after any error. A user's own, a damaged shard or a run that has diverged,
would only come again: workers of the next attempt find the note and end at once, and the driver raises it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nafnet_core import CapabilityError, InputError, NAFNetError
from pipelines.files import json_bytes
from pipelines.storage import LocalFolder, RemoteFolder
from pipelines.train.files import FAILURES

_LINE_CHARS = 300
# By name: Ray's import would take the command seconds.
_DEATHS = ("WorkerHealthCheckFailedError", "RayActorError", "NodeDiedError", "WorkerCrashedError")
_DEAD, _HUNG = "its process or node died", "does not answer"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure of a group of workers."""

    time_s: float
    """Since 1970."""
    ranks: Mapping[int, str]
    """Rank to what it said, in one line."""
    final: str | None
    """The user's own error among these, which no other attempt would mend."""
    is_input: bool

    def line(self) -> str:
        """For people: the ranks that died first, since those that live on only say that they lost a peer."""
        dead = {rank: text for rank, text in self.ranks.items() if text.startswith(_DEAD)}
        hung = {rank: text for rank, text in self.ranks.items() if _HUNG in text}
        shown = dead or hung or dict(self.ranks)
        return "; ".join(f"rank {rank}: {text}" for rank, text in sorted(shown.items()))

    def error(self) -> NAFNetError | None:
        """What the driver raises, where there is no use in going on."""
        if self.final is None:
            return None
        return (InputError if self.is_input else CapabilityError)(self.final)


def note_failure(storage: LocalFolder | RemoteFolder, errors: Mapping[int, BaseException]) -> None:
    """Write down what the workers of these ranks have raised, or died of."""
    causes = {rank: _cause(error) for rank, error in errors.items()}
    finals = [cause for cause in causes.values() if isinstance(cause, NAFNetError)]
    note = {
        "time": time.time(),
        "ranks": {str(rank): _one_line(cause) for rank, cause in causes.items()},
        "final": str(finals[0]).splitlines()[0] if finals else None,
        "is_input": bool(finals) and isinstance(finals[0], InputError),
    }
    below = storage.below(FAILURES)
    below.make()
    below.write(f"{time.time_ns()}.json", json_bytes(note))


def read_failures(run: LocalFolder | RemoteFolder | Path) -> list[Failure]:
    """All that were noted, oldest first."""
    below = (LocalFolder(run) if isinstance(run, Path) else run).below(FAILURES)
    notes = [json.loads(below.read(name)) for name in below.names() if name.endswith(".json")]
    return [
        Failure(
            time_s=note["time"],
            ranks={int(rank): text for rank, text in note["ranks"].items()},
            final=note["final"],
            is_input=note["is_input"],
        )
        for note in notes
    ]


def _cause(error: BaseException) -> BaseException:
    """The worker's own exception inside what Ray wraps it in, if there is one."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _one_line(error: BaseException) -> str:
    if any(kind.__name__ in _DEATHS for kind in type(error).__mro__):
        return _DEAD
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip()[:_LINE_CHARS]
