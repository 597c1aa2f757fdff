"""What can be known before a search begins: its space, its budget, its data, its name."""

from __future__ import annotations

import json

from nafnet_core import InputError
from pipelines.config import RunConfig, SearchConfig
from pipelines.ingest import plan_for
from pipelines.tracking import flattened
from pipelines.train.checks import FREE_SECTIONS, check, differing
from pipelines.train.files import CONFIG, METRICS
from pipelines.train.loop import spans
from pipelines.tune.files import LEDGER
from pipelines.tune.space import Space
from pipelines.tune.trial import folder_of
from pipelines.workspace import Workspace

# What may change between two attempts at one search without making it another.
_FREE_KEYS = {"search.trials", "search.max_concurrent", "search.max_failed", "search.register_winner"}


def check_search(config: SearchConfig, space: Space) -> None:
    """Everything that can be known before any time is spent. Raises `InputError`."""
    if config.data.val is None:
        raise InputError("trials are compared on a validation store", fix="Name one with --val STORE")
    if not config.validation.shares:
        raise InputError("trials are compared by their validations", fix="Set validation.times above 0")
    check(config.base)
    space.check()
    total = total_samples(config)
    first, batch = min(scored_shares(config)), max(stage.batch for stage in config.stages)
    if total * first < batch:
        raise InputError(
            "the budget is too short for the first rung",
            expected=f"at least a batch of {batch} samples in the first {first:.2%}",
            got=f"{total * first:.0f} of {total}",
            fix="Give a larger budget, or fewer search.rungs",
        )


def total_samples(config: RunConfig) -> int:
    """Samples of one trial that is not stopped."""
    epoch_samples = plan_for(config.data, seed=config.seed).epoch_samples
    wanted = config.budget.samples or round((config.budget.epochs or 0) * epoch_samples)
    last = spans(config, wanted, 0)[-1]
    return last.start + last.num_batches * last.batch


def scored_shares(config: SearchConfig) -> tuple[float, ...]:
    """Parts of the budget after which a trial is scored: ASHA's rungs, or as the recipe says."""
    return config.search.rung_shares if config.search.scheduler == "asha" else config.validation.shares


def claim(config: SearchConfig, workspace: Workspace) -> None:
    """Refuse to go on with a search of this name that was started with other values, and others' runs.

    Raises:
        InputError: the first few values are named.
    """
    folder = workspace.run_dir(config.name)
    path = folder / CONFIG
    earlier = json.loads(path.read_text()) if path.exists() else None
    if "search" not in (earlier or {"search"}) or (earlier is None and (folder / METRICS).exists()):
        raise InputError("a training run has this name", file=folder, fix="Give another with --name")
    if earlier is None or not (folder / LEDGER).exists():
        first = folder_of(workspace, config.name, 1)
        if first.exists() and any(first.iterdir()):
            raise InputError(
                "a run has the name of this search's first trial", file=first,
                fix="Give the search another name with --name",
            )  # fmt: skip
        return
    was, now = flattened(earlier), flattened(config.model_dump(mode="json"))
    changed = [
        key
        for key in sorted(now.keys() | was.keys())
        if key.partition(".")[0] not in FREE_SECTIONS
        and key not in _FREE_KEYS
        and now.get(key) != was.get(key)
    ]
    if changed:
        raise differing("search", path, was, now, changed)
