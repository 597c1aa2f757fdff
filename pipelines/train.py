"""One training run: NAFNet with DDP on Ray Train.

    nafnet train --config gopro_width32 --data stores/gopro/train --val stores/gopro/test
    nafnet train --config mobile --data store/ --set budget.minutes=3      # a laptop

This file is the driver: it checks what can be checked, starts the workers, sends their journal to MLflow and
TensorBoard, and turns Ctrl-C into a checkpoint. The loop itself is in `pipelines/loop.py`.
"""

from __future__ import annotations

import json
import logging
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.connect import connect
from nafnet_core import CapabilityError, InputError, NAFNetError, StoppedError
from pipelines.checkpoint import CheckpointLedger
from pipelines.config import RunConfig
from pipelines.files import make_folder, write_json
from pipelines.ingest import check_blur, check_patches, data_digests, plan_for
from pipelines.journal import METRICS
from pipelines.loop import BUDGET, RESULT, STOP
from pipelines.pictures import training_curves
from pipelines.scenes import shared_scenes
from pipelines.store import check_files, read_manifest, refuse_sharp_only
from pipelines.tracking import TRACKING, Row, Tracker, flattened, git_commit, make_experiment, mlflow_client
from pipelines.trainer import build_loss, build_model
from pipelines.worker import worker_main
from pipelines.workspace import Workspace

log = logging.getLogger(__name__)

CONFIG = "config.json"
_PUMP_EVERY_S = 1.0
# What may change between two attempts at one run without making it another run.
_FREE_SECTIONS = {"scaling", "checkpoint", "tracking"}
_SHOWN_KEYS = 4


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
    _warn_of_validation(config)
    workspace.make()
    run_dir = make_folder(workspace.run_dir(config.name))
    _claim(config, run_dir)
    if (run_dir / RESULT).exists():
        raise InputError(
            "this run is finished already", file=run_dir, fix="Give the new run another name with --name"
        )
    client = mlflow_client(workspace, config.tracking.uri)
    tracker = Tracker(client, run_dir, run_dir / METRICS)
    experiment = make_experiment(client, config.tracking.experiment, workspace)
    (run_dir / STOP).unlink(missing_ok=True)
    # In this order: `ray.init` sets a SIGTERM handler of its own.
    with connect(address), _stop_requests(run_dir / STOP) as request:
        _check_resources(config)
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


def check(config: RunConfig) -> None:
    """Everything that can be known before any time is spent. Raises `InputError`."""
    if not config.data.train:
        raise InputError(
            "no training data", fix="Name a store with --data STORE, or in the recipe's data.train"
        )
    model = build_model(config.model)
    loss = build_loss(config, torch.device("cpu"))
    check_blur(config.data)
    plan_for(config.data, seed=config.seed)  # reads measured kernels
    for stage in config.stages:
        check_patches(config.data, stage.patch_px)
        if stage.patch_px % model.config.stride_px:
            raise InputError(
                "the patch does not fit the network",
                expected=f"a multiple of {model.config.stride_px} px",
                got=f"{stage.patch_px} px",
                fix="Change stages.*.patch_px",
            )
    smallest = torch.zeros(1, 3, *[min(stage.patch_px for stage in config.stages)] * 2)
    try:
        loss(smallest, smallest)
    except ValueError as error:
        raise InputError(
            "the patch does not fit the loss", got=error, fix="Change stages.*.patch_px"
        ) from error
    for store in config.data.train:
        check_files(store.path)
    if config.data.val is not None:
        fix = "Validate on pairs, as `nafnet synth` makes them"
        refuse_sharp_only(config.data.val, read_manifest(config.data.val), fix=fix)
        check_files(config.data.val)


def _warn_of_validation(config: RunConfig) -> None:
    if config.data.val is None:
        return
    val = read_manifest(config.data.val)
    for store in config.data.train:
        if val.digest == read_manifest(store.path).digest:
            log.warning("validation on the training data: its score says nothing of other photos")
            continue
        num_shared, first = shared_scenes(config.data.val, store.path)
        if num_shared:
            log.warning(
                "%d of the %d scenes of the validation have the names of scenes in %s (the first: %r): if "
                "they are the same, its score says little of others. Part a folder with `prepare --holdout`",
                num_shared, val.num_scenes, store.path, first,
            )  # fmt: skip
    if val.crop_px is not None:
        log.warning(
            "validation on crops of %d px: scores are usually of whole images (`prepare --crop 0`)",
            val.crop_px,
        )


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
    gains = {row.samples: row.metrics["val/gain_db"] for row in rows if "val/gain_db" in row.metrics}
    pictures = sorted((run_dir / "pictures").glob("0*.png"))[-1:]
    curves = training_curves(run_dir / "pictures" / "curves.png", rows, title=config.name)
    pictures += [] if curves is None else [curves]
    tracker.finish("FINISHED", [*pictures, run_dir / CONFIG])
    return TrainResult(
        run_dir=run_dir,
        weights=ledger.weights(best),
        mlflow_run_id=run_id,
        samples=ledger.entries()[-1].samples,
        psnr_db=best.psnr_db,
        gain_db=gains.get(best.samples),
        num_val_images=0
        if config.data.val is None
        else min(config.validation.max_images, read_manifest(config.data.val).num_pairs),
        samples_per_s=_median(rows, "train/samples_per_s"),
        data_wait=_median(rows, "train/data_wait"),
        num_workers=config.scaling.num_workers,
        pictures=tuple(pictures),
    )


def _median(rows: list[Row], name: str) -> float:
    values = sorted(row.metrics[name] for row in rows if name in row.metrics)
    return values[len(values) // 2] if values else 0.0


def _claim(config: RunConfig, run_dir: Path) -> None:
    """Refuse to go on with a run of this name that was started with other values.

    One that never came to its first step has nothing to protect, and makes room.
    """
    path = run_dir / CONFIG
    if not path.exists():
        return
    if not (run_dir / METRICS).exists():
        for leftover in (path, run_dir / TRACKING, run_dir / BUDGET):
            leftover.unlink(missing_ok=True)
        return
    earlier = flattened(json.loads(path.read_text()))
    now = flattened(config.model_dump(mode="json"))
    changed = [
        key
        for key in sorted(now.keys() | earlier.keys())
        if key.partition(".")[0] not in _FREE_SECTIONS and now.get(key) != earlier.get(key)
    ]
    if changed:
        raise InputError(
            "a run of this name was started with other values",
            file=path,
            expected=", ".join(f"{key}={earlier.get(key)}" for key in changed[:_SHOWN_KEYS]),
            got=", ".join(f"{key}={now.get(key)}" for key in changed[:_SHOWN_KEYS]),
            fix="Give the new run another name with --name",
        )


def _check_resources(config: RunConfig) -> None:
    """Training workers and readers must fit together, or the readers starve and nothing ever starts."""
    import ray

    have = ray.cluster_resources()
    scaling = config.scaling
    cpus = scaling.num_workers * (scaling.cpus_per_worker + scaling.readers_per_worker * scaling.reader_cpus)
    if scaling.use_gpu and scaling.num_workers > have.get("GPU", 0):
        raise CapabilityError(
            "not enough GPUs", expected=scaling.num_workers, got=int(have.get("GPU", 0)),
            fix="Set scaling.use_gpu=false, or take a machine with GPUs"
            if not have.get("GPU")
            else "Lower scaling.num_workers",
        )  # fmt: skip
    log.info(
        "CPU budget: %d workers of %g and their %d readers of %g make %g of %g",
        scaling.num_workers, scaling.cpus_per_worker, scaling.num_workers * scaling.readers_per_worker,
        scaling.reader_cpus, cpus, have.get("CPU", 0),
    )  # fmt: skip
    if cpus > have.get("CPU", 0) + 1e-6:
        raise CapabilityError(
            "not enough CPUs for the training workers and their readers",
            expected=f"{cpus:g}",
            got=f"{have.get('CPU', 0):g}",
            fix="Lower scaling.num_workers, scaling.cpus_per_worker or scaling.reader_cpus",
        )


def _tags(config: RunConfig) -> dict[str, str]:
    tags = {
        "nafnet.host": socket.gethostname(),
        "nafnet.processor": platform.processor() or platform.machine(),
        "nafnet.store_digests": ",".join(data_digests(config.data, plan_for(config.data, seed=config.seed))),
    }
    commit = git_commit()
    return {**tags, **({"mlflow.source.git.commit": commit} if commit else {})}


class _Request:
    """Whether, and how, somebody asked to stop."""

    exit_code: int | None = None


@contextmanager
def _stop_requests(flag: Path) -> Iterator[_Request]:
    """Turn the first SIGINT or SIGTERM into a file that the workers look for; a second one ends at once."""
    request = _Request()

    def handle(number: int, frame: object) -> None:
        if request.exit_code is not None:
            raise KeyboardInterrupt
        request.exit_code = 128 + number
        flag.touch()
        log.warning("stopping: the state is being saved (once more to stop without)")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        flag.unlink(missing_ok=True)


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
