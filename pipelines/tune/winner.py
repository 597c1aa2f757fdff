"""The winner of a search: its recipe, its training at full length, its place in the registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import train
from pipelines.checkpoint import CheckpointLedger
from pipelines.config import RunConfig, SearchConfig
from pipelines.files import write_json
from pipelines.train.files import RESULT
from pipelines.tune.files import RECIPE, WINNER
from pipelines.tune.ledger import Trial
from pipelines.tune.record import write_recipe
from pipelines.tune.space import Space, short
from pipelines.tune.trial import TrialRun
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.registry import Version
    from pipelines.tracking import Row


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The run that has won."""

    run: str
    """Its name: the best trial's, or that of its training at full length."""
    weights: Path
    psnr_db: float
    """Its best validation."""


def write_best(config: SearchConfig, space: Space, best: Trial, folder: Path) -> tuple[RunConfig, Path]:
    """The best trial's recipe as `nafnet train` takes it, and the file that holds it."""
    recipe = space.recipe(best.point, name=f"{config.name}-{best.number:04d}-best")
    if config.search.retrain is not None:
        recipe = recipe.model_copy(update={"budget": config.search.retrain})
    values = ", ".join(f"{key} {value}" for key, value in short(best.point).items())
    comment = (
        f"The best of search {config.name} is its trial {best.number}: {values}.\n"
        f"{best.psnr_db:.2f} dB after {best.samples} samples."
    )
    return recipe, write_recipe(folder / RECIPE, recipe, comment=comment)


def winner_of(
    recipe: RunConfig,
    trial: TrialRun,
    workspace: Workspace,
    *,
    retrain: bool,
    address: str | None,
    on_row: Callable[[Row], None],
) -> Winner:
    """The best trial's own run, or that of its recipe trained at full length, which is done here.

    Raises:
        NAFNetError: as `train.run`.
    """
    run_dir = workspace.run_dir(recipe.name) if retrain else trial.run_dir
    if retrain and not (run_dir / RESULT).exists():
        train.run(recipe, workspace, address=address, on_row=on_row)
    elif not retrain and trial.mirror is not None:
        trial.mirror.pull_checkpoints()
    ledger = CheckpointLedger(run_dir)
    entry = ledger.best()
    assert entry is not None and entry.psnr_db is not None, "the run of a scored trial has scores"
    return Winner(run=run_dir.name, weights=ledger.weights(entry), psnr_db=entry.psnr_db)


def registered(
    winner: Winner,
    config: SearchConfig,
    workspace: Workspace,
    folder: Path,
    on_scored: Callable[[int, int], None],
) -> Version | None:
    """Register the winner, with its report on the validation store; once, however often this is called."""
    from pipelines import registry

    path, version = folder / WINNER, None
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if config.search.register_winner and earlier.get("run") == winner.run and earlier.get("version"):
        version = next((v for v in registry.versions(workspace) if v.version == earlier["version"]), None)
    if config.search.register_winner and version is None:
        version = registry.register(winner.run, workspace, on=config.data.val, on_progress=on_scored)
    write_json(path, {"run": winner.run, "version": None if version is None else version.version})
    return version
