"""A training run: recipe, checkpoints with their digests, last metrics, curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nafnet_core import InputError
from pipelines.checkpoint import LEDGER, CheckpointLedger
from pipelines.inspect.result import InspectConfig, InspectResult, Show
from pipelines.pictures import training_curves
from pipelines.tracking import TRACKING, Row, read_rows
from pipelines.train.files import CONFIG, METRICS, RESULT
from pipelines.workspace import Workspace


def find_run(what: str, workspace: Workspace) -> Path | None:
    """Folder of the run that `what` names, by path or by name in the workspace; None where there is none."""
    for folder in (Path(what), workspace.run_dir(what)):
        if (folder / "checkpoints" / LEDGER).is_file() or (folder / CONFIG).is_file():
            return folder
    return None


def inspect_run(config: InspectConfig, show: Show) -> InspectResult:
    """Look at a run; checkpoints are hashed anew unless `config.verify` is off.

    Raises:
        InputError: its ledger cannot be read.
    """
    folder = find_run(config.what, config.workspace)
    assert folder is not None
    name = folder.resolve().name
    recipe = _json(folder / CONFIG)
    problems = [] if recipe is not None else [_damaged(folder / CONFIG)]
    checkpoints, faults = _checkpoints(folder, config.verify, show)
    problems += faults
    rows: list[Row] = []
    try:
        rows = read_rows(folder / METRICS)
    except (ValueError, KeyError, TypeError) as error:
        problems.append(str(InputError("a damaged journal", file=folder / METRICS, got=error)))
    picture = training_curves(config.out_dir(name) / "curves.png", rows, title=name)
    best = CheckpointLedger(folder).best()
    return InspectResult(
        kind="run",
        name=name,
        facts={
            "path": str(folder),
            "finished": (folder / RESULT).is_file(),
            "samples": max([row.samples for row in rows] + [c["samples"] for c in checkpoints], default=0),
            "best": None if best is None else best.folder,
            "mlflow_run_id": (_json(folder / TRACKING) or {}).get("run_id"),
            "last_metrics": {name: value for row in rows for name, value in row.metrics.items()},
            "recipe": recipe,
        },
        checkpoints=tuple(checkpoints),
        pictures=() if picture is None else (picture,),
        notes=() if checkpoints else ("No checkpoint has been written yet",),
        problems=tuple(problems),
    )


def _checkpoints(folder: Path, verify: bool, show: Show) -> tuple[list[dict[str, Any]], list[str]]:
    """A row a checkpoint, and a line for each that is damaged."""
    ledger = CheckpointLedger(folder)
    entries = ledger.entries()
    rows, problems = [], []
    with show("verify", "checkpoints") as update:
        for done, entry in enumerate(entries, start=1):
            fault = ledger.fault(entry) if verify else None
            whole = fault is None if verify else None
            rows.append(
                {"folder": entry.folder, "samples": entry.samples, "psnr_db": entry.psnr_db, "whole": whole}
            )
            if fault is not None:
                error = InputError(
                    "a damaged checkpoint",
                    file=ledger.folder / entry.folder,
                    expected=f"the digests in {LEDGER}",
                    got=fault,
                    fix="Training goes on from the newest whole one; to use one, name its model.safetensors",
                )
                problems.append(str(error))
            update(done, len(entries))
    return rows, problems


def _json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _damaged(path: Path) -> str:
    return str(InputError("the run's configuration is missing or damaged", file=path))
