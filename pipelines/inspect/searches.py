"""A search: how far it is, its best trial, its pictures."""

from __future__ import annotations

import json
from pathlib import Path

from nafnet_core import InputError
from pipelines.inspect.result import InspectConfig, InspectResult, Show
from pipelines.tracking import TRACKING
from pipelines.tune.files import HISTORY, LEDGER, PARALLEL, RECIPE, TABLE, WINNER
from pipelines.tune.ledger import TrialLedger
from pipelines.tune.space import short
from pipelines.workspace import Workspace

_STATES = ("finished", "stopped", "running", "failed")
_FILES = (("All trials", TABLE), ("The best recipe", RECIPE))


def find_search(what: str, workspace: Workspace) -> Path | None:
    """Folder of the search that `what` names, by path or by name; None where there is none."""
    return next((f for f in (Path(what), workspace.run_dir(what)) if (f / LEDGER).is_file()), None)


def inspect_search(config: InspectConfig, show: Show) -> InspectResult:
    """Look at a search. Raises `InputError` where its ledger cannot be read."""
    del show
    folder = find_search(config.what, config.workspace)
    assert folder is not None
    try:
        ledger = TrialLedger(folder / LEDGER)
    except (ValueError, KeyError) as error:
        raise InputError("a damaged ledger of trials", file=folder / LEDGER, got=error) from error
    best, winner, tracking = ledger.best(), folder / WINNER, folder / TRACKING
    states = {state: sum(trial.state == state for trial in ledger.trials.values()) for state in _STATES}
    failed = ledger.ended("failed")
    return InspectResult(
        kind="search",
        name=folder.resolve().name,
        facts={
            "path": str(folder),
            "finished": winner.is_file(),
            "trials": {state: number for state, number in states.items() if number},
            "samples": ledger.samples,
            "best_trial": None if best is None else best.number,
            "its_psnr_db": None if best is None else best.psnr_db,
            "its_values": None if best is None else short(best.point),
            "winner": json.loads(winner.read_text())["run"] if winner.is_file() else None,
            "mlflow_run_id": json.loads(tracking.read_text())["run_id"] if tracking.is_file() else None,
        },
        pictures=tuple(folder / name for name in (PARALLEL, HISTORY) if (folder / name).is_file()),
        notes=(
            *(f"Trial {trial.number} failed: {trial.error}" for trial in failed),
            *(f"{label}: {folder / name}" for label, name in _FILES if (folder / name).is_file()),
        ),
    )
