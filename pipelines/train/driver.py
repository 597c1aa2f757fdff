"""The driver of a run: starts the workers, sends their journal to MLflow and TensorBoard, concludes."""

from __future__ import annotations

import logging
import platform
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.connect import connect
from nafnet_core import CapabilityError, InputError, NAFNetError, StoppedError
from pipelines.checkpoint import CheckpointLedger
from pipelines.config import RunConfig
from pipelines.files import make_folder, write_json
from pipelines.ingest import data_digests, plan_for
from pipelines.pictures import training_curves
from pipelines.store import read_manifest
from pipelines.tracking import Row, Tracker, git_commit, make_experiment, mlflow_client
from pipelines.train.checks import check, check_resources, claim, warn
from pipelines.train.files import CONFIG, METRICS, RESULT, STOP
from pipelines.train.initial import with_initial_weights
from pipelines.train.stopping import stop_requests
from pipelines.train.summary import Summary, summarize
from pipelines.train.trainer import build_model
from pipelines.workspace import Workspace

log = logging.getLogger(__name__)

_PUMP_EVERY_S = 1.0


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
    gain_db: float | None
    """That over the blurred input's."""
    num_val_images: int
    """Images that it was taken on: at most `validation.max_images`."""
    samples_per_s: float
    """Median over the journal of global samples a second."""
    data_wait: float
    """Share of the time that rank 0 waited for data."""
    num_workers: int
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
    claim(config, run_dir)
    if (run_dir / RESULT).exists():
        raise InputError(
            "this run is finished already", file=run_dir, fix="Give the new run another name with --name"
        )
    config = with_initial_weights(config, workspace, run_dir)
    client = mlflow_client(workspace, config.tracking.uri)
    tracker = Tracker(client, run_dir, run_dir / METRICS)
    experiment = make_experiment(client, config.tracking.experiment, workspace)
    (run_dir / STOP).unlink(missing_ok=True)
    # In this order: `ray.init` sets a SIGTERM handler of its own.
    with connect(address), stop_requests(run_dir / STOP) as request:
        check_resources(config)
        write_json(run_dir / CONFIG, config.model_dump(mode="json"))
        params = {
            **config.model_dump(mode="json"),
            "num_parameters": build_model(config.model).num_parameters,
        }
        run_id = tracker.start(experiment, config.name, params, _tags(config))

        def pump() -> None:
            for row in tracker.pump():
                log.info("%s samples %s %s", row.samples, row.event or "", row.metrics)
                on_row(row)

        try:
            _fit(config, run_dir, pump)
        except BaseException:
            tracker.finish("FAILED")
            raise
        pump()
        if request.exit_code is not None and not (run_dir / RESULT).exists():
            tracker.finish("KILLED")
            raise StoppedError(
                f"stopped; all state is saved in {run_dir}",
                exit_code=request.exit_code,
                fix="The same command goes on from there",
            )
        return _conclude(config, run_dir, tracker, run_id)


def _fit(config: RunConfig, run_dir: Path, pump: Callable[[], None]) -> None:
    """Run the workers, pumping the journal meanwhile."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            _trainer(config, run_dir).fit()
        except BaseException as error:  # carried over to the driver's own thread
            failures.append(error)

    # Not on the main thread: there Ray Train takes SIGINT for itself and aborts workers unsaved.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_PUMP_EVERY_S)
        pump()
    if failures:
        raise _explained(failures[0], run_dir)


def _trainer(config: RunConfig, run_dir: Path) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.train.worker import worker_main  # brings Ray Data

    attempts = make_folder(run_dir / "ray")
    scaling, plan = config.scaling, plan_for(config.data, seed=config.seed)
    job = {
        "config": config.model_dump(mode="json"),
        "run_dir": str(run_dir),
        "plan": plan,
        "digests": data_digests(config.data, plan),
    }
    return TorchTrainer(
        worker_main,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            # Each attempt its own name: checkpoints are ours, Ray's snapshot of another must not count.
            name=f"attempt-{sum(1 for _ in attempts.iterdir()):03d}",
            storage_path=str(attempts),
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
        ),
    )


def _conclude(config: RunConfig, run_dir: Path, tracker: Tracker, run_id: str) -> TrainResult:
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
    tracker.finish("FINISHED", [*pictures, run_dir / CONFIG])
    return TrainResult(
        run_dir=run_dir,
        weights=ledger.weights(best),
        mlflow_run_id=run_id,
        samples=ledger.entries()[-1].samples,
        psnr_db=best.psnr_db,
        gain_db=summary.best.gain_db if summary.best else None,
        num_val_images=0
        if config.data.val is None
        else min(config.validation.max_images, read_manifest(config.data.val).num_pairs),
        samples_per_s=summary.samples_per_s,
        data_wait=summary.data_wait,
        num_workers=config.scaling.num_workers,
        pictures=tuple(pictures),
        summary=summary,
    )


def _tags(config: RunConfig) -> dict[str, str]:
    tags = {
        "nafnet.host": socket.gethostname(),
        "nafnet.processor": platform.processor() or platform.machine(),
        "nafnet.store_digests": ",".join(data_digests(config.data, plan_for(config.data, seed=config.seed))),
    }
    commit = git_commit()
    return {**tags, **({"mlflow.source.git.commit": commit} if commit else {})}


def _explained(error: BaseException, run_dir: Path) -> BaseException:
    """The user's error inside what Ray wraps it in, if there is one."""
    for inner in getattr(error, "worker_failures", {}).values():
        cause = getattr(inner, "cause", inner)
        if isinstance(cause, NAFNetError):
            return cause
    if isinstance(error, NAFNetError):
        return error
    return CapabilityError(
        "training failed", file=run_dir / "logs", got=str(error).strip().splitlines()[-1][:200]
    )
