"""What a search knows of its trials, in a file of its own: JSON lines, from which a killed search goes on.

Ray Tune keeps snapshots of a search, but not of what its schedulers have learnt, and takes them every now and
then. Here a line is written, and synced, before anything follows from it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A validation of a trial."""

    step: int
    """Place on the scheduler's axis; see `schedulers.py`."""
    samples: int
    psnr_db: float
    goes_on: bool
    """What the scheduler said."""


@dataclass(kw_only=True, slots=True)
class Trial:
    """One trial, as far as it has come."""

    number: int
    point: Mapping[str, Any]
    scores: list[Score] = field(default_factory=list)
    outcome: Outcome | None = None
    """None while it runs, or waits to go on."""
    error: str | None = None

    @property
    def psnr_db(self) -> float | None:
        """The best score so far; None before the first."""
        return max((score.psnr_db for score in self.scores), default=None)

    @property
    def samples(self) -> int:
        """Trained on, up to the last score."""
        return self.scores[-1].samples if self.scores else 0

    @property
    def state(self) -> str:
        """In a word, for people."""
        return self.outcome or "running"


class TrialLedger:
    """The trials of one search, in the order in which they were begun."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trials: dict[int, Trial] = {}
        self.history: list[Mapping[str, Any]] = []
        """Every line, oldest first."""
        content = path.read_bytes() if path.exists() else b""
        self._end = content.rfind(b"\n") + 1
        for line in content[: self._end].splitlines():
            self._take(json.loads(line))

    def begin(self, number: int, point: Mapping[str, Any]) -> Trial:
        """A new trial."""
        self._write({"event": "begin", "trial": number, "point": point})
        return self.trials[number]

    def score(self, number: int, score: Score) -> None:
        """A trial's new score, and what follows from it."""
        self._write(
            {
                "event": "score",
                "trial": number,
                "step": score.step,
                "samples": score.samples,
                "psnr_db": score.psnr_db,
                "goes_on": score.goes_on,
            }
        )

    def end(self, number: int, outcome: Outcome, error: str | None = None) -> None:
        """A trial is over."""
        self._write({"event": "end", "trial": number, "outcome": outcome, "error": error})

    def running(self) -> list[Trial]:
        """Trials without an end, oldest first: those that a killed search has left."""
        return [trial for trial in self.trials.values() if trial.outcome is None]

    def ended(self, *outcomes: Outcome) -> list[Trial]:
        """Trials that ended so."""
        return [trial for trial in self.trials.values() if trial.outcome in outcomes]

    def best(self) -> Trial | None:
        """Of the trials that had the whole budget the one with the highest score; else of all."""
        scored = [trial for trial in self.trials.values() if trial.scores and trial.outcome != "failed"]
        whole = [trial for trial in scored if trial.outcome == "finished"]
        return max(whole or scored, key=lambda trial: trial.psnr_db or 0.0, default=None)

    @property
    def samples(self) -> int:
        """Trained on by all trials together."""
        return sum(trial.samples for trial in self.trials.values())

    def _take(self, row: Mapping[str, Any]) -> None:
        self.history.append(row)
        number = row["trial"]
        match row["event"]:
            case "begin":
                self.trials[number] = Trial(number=number, point=row["point"])
            case "score":
                values = {key: row[key] for key in ("step", "samples", "psnr_db", "goes_on")}
                self.trials[number].scores.append(Score(**values))
            case "end":
                self.trials[number].outcome, self.trials[number].error = row["outcome"], row["error"]

    def _write(self, row: Mapping[str, Any]) -> None:
        content = json.dumps({"time": time.time(), **row}).encode() + b"\n"
        with self._path.open("ab") as file:
            file.truncate(self._end)  # what a kill has left of a last line
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(content)
        self._take(json.loads(content))
