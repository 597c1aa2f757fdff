"""What is told of a search as a whole: its parameters, its curve, the table of trials, the best recipe."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.config import RunConfig, SearchConfig
from pipelines.files import written_aside
from pipelines.tracking import Opening, flattened, read_rows
from pipelines.train.record import opening as opening_of_run
from pipelines.tune.ledger import Trial, TrialLedger
from pipelines.tune.space import short
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

SOURCE = {"mlflow.source.name": "nafnet tune"}
_FIRST_KEYS = ("name", "model", "data", "budget", "stages", "optim", "schedule", "loss", "precision")


def opening(config: SearchConfig, client: MlflowClient, workspace: Workspace) -> Opening:
    """Parameters of the search, its space and its base recipe; the stores with their digests."""
    own = opening_of_run(config.base, client, workspace)
    search = config.search.model_dump(mode="json", exclude={"space"})
    space = {
        key: json.dumps(drawn.model_dump(mode="json", exclude_none=True))
        for key, drawn in config.search.space.items()
    }
    searched = {f"search.space.{key}": value for key, value in space.items()}
    return dataclasses.replace(
        own,
        params={**own.params, **flattened(search, "search."), **searched},
        tags={**own.tags, **SOURCE, "nafnet.search": config.name},
    )


class SearchJournal:
    """The search's curve over samples of all trials together, a line a score: a function of the ledger.

    So a search that goes on after a kill appends what is missing, and nothing twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_rows = len(read_rows(path))

    def catch_up(self, ledger: TrialLedger) -> None:
        """Append what the ledger has and the journal has not."""
        rows = _rows(ledger)
        new = rows[self._num_rows :]
        if not new:
            return
        with self._path.open("ab") as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in new))
        self._num_rows = len(rows)


def _rows(ledger: TrialLedger) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    samples_of: dict[int, int] = {}
    ended = failed = 0
    best = float("-inf")
    for event in ledger.history:
        if event["event"] == "end":
            failed += event["outcome"] == "failed"
            ended += event["outcome"] != "failed"
        if event["event"] != "score":
            continue
        samples_of[event["trial"]] = event["samples"]
        best = max(best, event["psnr_db"])
        rows.append(
            {
                "time": event["time"],
                "samples": sum(samples_of.values()),
                "metrics": {
                    "search/best_psnr_db": best,
                    "search/psnr_db": event["psnr_db"],
                    "search/trial": event["trial"],
                    "search/trials_ended": ended,
                    "search/trials_failed": failed,
                },
            }
        )
    return rows


def write_table(path: Path, trials: Sequence[Trial]) -> Path:
    """All trials as CSV, the best first; MLflow's page shows it as a table."""
    ranked = sorted(trials, key=lambda trial: -(trial.psnr_db or 0.0))
    # Short names, but values in full: a trial can be repeated from them.
    names = list(dict.fromkeys(key for trial in ranked for key in short(trial.point)))
    with written_aside(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["trial", *names, "psnr_db", "samples", "state", "error"])
        for trial in ranked:
            values = dict(zip(short(trial.point), map(_in_full, trial.point.values()), strict=True))
            score = "" if trial.psnr_db is None else f"{trial.psnr_db:.4f}"
            table.writerow(
                [trial.number, *(values.get(name, "") for name in names), score, trial.samples,
                 trial.state, trial.error or ""]
            )  # fmt: skip
    return path


def _in_full(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_recipe(path: Path, config: RunConfig, *, comment: str) -> Path:
    """A recipe that `nafnet train --config` takes as it is: stores, and what differs from the defaults."""
    content = config.model_dump(mode="json", exclude_defaults=True)
    ordered = {key: content[key] for key in (*_FIRST_KEYS, *sorted(content)) if key in content}
    with written_aside(path) as temporary:
        temporary.write_text(
            "".join(f"# {line}\n" for line in comment.splitlines())
            + yaml.safe_dump(ordered, sort_keys=False, default_flow_style=None, width=100)
        )
    return path
