"""What `inspect` is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.workspace import Workspace

Show = Callable[..., AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to look at, and how closely."""

    what: str
    """A store, a model, a run, a search, or a source of pairs; see `run`."""
    workspace: Workspace
    out: Path | None = None
    """Folder of the pictures; None takes the workspace's `inspect/NAME`."""
    verify: bool = True
    """Hash every shard of a store anew."""
    deep: bool = False
    """Decode every pair of a store, and compute the digest of its pixels anew."""
    num_samples: int = 512
    """Statistics are taken on so many pairs at most."""

    def out_dir(self, name: str) -> Path:
        return self.out or self.workspace.root / "inspect" / name


@dataclass(frozen=True, kw_only=True)
class InspectResult:
    """What was found. Everything is plain values, as `--json` prints them."""

    kind: Literal["store", "source", "model", "run", "search"]
    name: str
    facts: Mapping[str, Any]
    statistics: Mapping[str, Any] | None = None
    """Of the sampled pairs: number, and median, p5 and p95 of each quantity."""
    verification: Mapping[str, Any] | None = None
    checkpoints: tuple[Mapping[str, Any], ...] = ()
    pictures: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    """Remarks that are no fault."""
    problems: tuple[str, ...] = field(default=())
    """Damage, one line each: what, which file, expected, got, what to do."""

    def to_dict(self) -> dict[str, Any]:
        """The object of `--json`."""
        parts = {
            "statistics": self.statistics,
            "verification": self.verification,
            "checkpoints": self.checkpoints or None,
        }
        return {
            "kind": self.kind,
            "name": self.name,
            **self.facts,
            **{name: value for name, value in parts.items() if value is not None},
            "pictures": [str(picture) for picture in self.pictures],
            "notes": self.notes,
            "problems": self.problems,
        }
