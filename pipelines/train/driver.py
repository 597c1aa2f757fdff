"""The driver of a run: starts the workers, sends their journal to MLflow and TensorBoard, concludes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.connect import connect
from nafnet_core import CapabilityError, InputError, StoppedError
from pipelines.checkpoint import CheckpointLedger
from pipelines.config import RunConfig
from pipelines.files import make_folder
from pipelines.ingest import plan_for
from pipelines.pictures import training_curves
from pipelines.preflight import in_brief
from pipelines.store import read_manifest
from pipelines.tracking import Row, Tracker, mlflow_client
from pipelines.train.attempt import attempt, begin, clear, storage_of
from pipelines.train.checks import check, check_resources, claim, spare_room, warn
from pipelines.train.files import CONFIG, METRICS, RESULT, STOP
from pipelines.train.initial import with_initial_weights
from pipelines.train.placement import release_group
from pipelines.train.pump import Pump
from pipelines.train.record import opening
from pipelines.train.room import wait_for_room
from pipelines.train.stopping import stop_requests
from pipelines.train.summary import Summary, summarize
from pipelines.workspace import Workspace

log = logging.getLogger(__name__)

# For the tracking server to take what is left. Who stops a run may have little time to give it.
_WAIT_S, _WAIT_STOPPED_S = 60.0, 8.0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    run_dir: Path
    weights: Path
    """Best checkpoint's averaged weights."""
    mlflow_run_id: str
    samples: int
    psnr_db: float | None
    """Best validation PSNR; None where there was no validation."""
    num_val_images: int
    """Images that it was taken on: at most `validation.max_images`."""
    pictures: tuple[Path, ...]
    """The first validation image as the best checkpoint restores it, and the curves."""
    summary: Summary


def run(
    config: RunConfig,
    workspace: Workspace,
    *,
    address: str | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> TrainResult:
    """Train, or go on with the run of this name where it stopped.

    Args:
        config: the whole run.
        workspace: where the run's storage is.
        address: a Ray cluster; None for this machine.
        on_row: called with each new journal row.

    Raises:
        InputError: the configuration, the data or an earlier run of this name does not allow it.
        CapabilityError: this machine or cluster has not the workers or GPUs asked for.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
    """
    check(config)
    warn(config)
    workspace.make()
    run_dir = make_folder(workspace.run_dir(config.name))
    storage, mirror = storage_of(config, run_dir)
    if mirror is not None:
        mirror.pull()
    claim(config, run_dir)
    tracker = Tracker(run_dir, run_dir / METRICS)
    if (run_dir / RESULT).exists():
        return _send_rest(config, workspace, run_dir, tracker)
    config = with_initial_weights(config, workspace, run_dir)
    # A new run finds out now that its server's address is wrong; one that goes on can do without it.
    # Beside Ray's start, each takes seconds.
    pool = ThreadPoolExecutor(1)
    opened = pool.submit(mlflow_client, workspace, config.tracking.uri, must_answer=tracker.run_id is None)
    clear(run_dir, storage)
    # In this order: `ray.init` sets a SIGTERM handler of its own.
    with pool, connect(address), stop_requests(run_dir / STOP) as request:
        client = opened.result()
        release_group(storage)  # or it is waited for
        if address is None:
            check_resources(config)
        else:
            wait_for_room(config.scaling, exit_code=lambda: request.exit_code)
        in_brief(config, storage)
        begin(config, run_dir, mirror)
        tracker.start(client, opening(config, client, workspace))

        pump = Pump(run_dir, mirror, tracker, on_row)
        try:
            attempt(config, run_dir, storage, spare_room(config), pump)
        except BaseException:
            tracker.finish("FAILED", wait_s=_WAIT_STOPPED_S)
            raise
        if request.exit_code is not None and not (run_dir / RESULT).exists():
            tracker.finish("KILLED", wait_s=_WAIT_STOPPED_S)
            raise StoppedError(
                f"stopped; all state is saved in {storage}",
                exit_code=request.exit_code,
                fix="The same command goes on from there",
            )
        if mirror is not None:
            mirror.pull_checkpoints()
        return _conclude(config, run_dir, tracker)


def _send_rest(config: RunConfig, workspace: Workspace, run_dir: Path, tracker: Tracker) -> TrainResult:
    """Send what the tracking server has not got of a finished run.

    Raises:
        InputError: it has everything.
        CapabilityError: it is away.
    """
    left = tracker.unsent()
    if left is None:
        raise InputError(
            "this run is finished already", file=run_dir, fix="Give the new run another name with --name"
        )
    client = mlflow_client(workspace, config.tracking.uri)
    log.warning("this run is finished already; sending to the tracking server what it has not got: %s", left)
    tracker.start(client, opening(config, client, workspace))
    result = _conclude(config, run_dir, tracker)
    if left := tracker.unsent():
        raise CapabilityError("the tracking server did not take all of it", got=f"left: {left}")
    return result


def _conclude(config: RunConfig, run_dir: Path, tracker: Tracker) -> TrainResult:
    ledger = CheckpointLedger(run_dir)
    best = ledger.best()
    assert best is not None, "a finished run has a checkpoint"
    rows = tracker.read_all()
    epoch_samples = plan_for(config.data, seed=config.seed).epoch_samples
    summary = summarize(rows, best, epoch_samples=epoch_samples)
    of_best = run_dir / "pictures" / f"{best.samples:010d}.png"
    pictures = [of_best] if of_best.is_file() else []
    curves = training_curves(run_dir / "pictures" / "curves.png", rows, title=config.name)
    pictures += [] if curves is None else [curves]
    tracker.finish("FINISHED", [*([] if curves is None else [curves]), run_dir / CONFIG], wait_s=_WAIT_S)
    assert tracker.run_id is not None
    return TrainResult(
        run_dir=run_dir,
        weights=ledger.weights(best),
        mlflow_run_id=tracker.run_id,
        samples=ledger.entries()[-1].samples,
        psnr_db=best.psnr_db,
        num_val_images=0
        if config.data.val is None
        else min(config.validation.max_images, read_manifest(config.data.val).num_pairs),
        pictures=tuple(pictures),
        summary=summary,
    )
