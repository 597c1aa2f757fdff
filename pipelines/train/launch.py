"""Ray Train's side of the driver: the group of workers, and waiting for it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nafnet_core import CapabilityError, NAFNetError
from pipelines.config import RunConfig
from pipelines.files import make_folder
from pipelines.ingest import data_digests, plan_for
from pipelines.storage import LocalFolder, RemoteFolder
from pipelines.train.failures import read_failures
from pipelines.train.room import worker_resources

if TYPE_CHECKING:
    from pipelines.train.beside import SpareRoom

_MEANWHILE_EVERY_S = 1.0


def ray_trainer(
    config: RunConfig, run_dir: Path, storage: LocalFolder | RemoteFolder, spare: SpareRoom | None
) -> Any:
    """Ray Train's trainer of a run: its workers, their group and what becomes of failures."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.train.controller import FailureNotes
    from pipelines.train.interface import NodeInterfaceConfig
    from pipelines.train.worker import Job, worker_main  # brings Ray Data

    attempts = make_folder(run_dir / "ray")
    scaling, plan = config.scaling, plan_for(config.data, seed=config.seed)
    job = Job(
        config=config.model_dump(mode="json"),
        storage=storage,
        is_shared=config.checkpoint.storage is None,
        plan=plan,
        digests=tuple(data_digests(config.data, plan)),
        spare=spare,
    )
    return TorchTrainer(
        worker_main,
        train_loop_config={"job": job},
        torch_config=NodeInterfaceConfig(
            backend="nccl" if scaling.use_gpu else "gloo", timeout_s=math.ceil(scaling.timeout_s)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=worker_resources(scaling),
        ),
        run_config=ray.train.RunConfig(
            # Each attempt its own name: checkpoints are ours, Ray's snapshot of another must not count.
            name=f"attempt-{sum(1 for _ in attempts.iterdir()):03d}",
            storage_path=str(attempts),
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, max_preemption_failures=-1
            ),
            callbacks=[FailureNotes(storage)],
        ),
    )


def fit(trainer: Any, run_dir: Path, meanwhile: Callable[[], None]) -> None:
    """Run the workers to their end, calling `meanwhile` every second and once after.

    Raises:
        NAFNetError: what ended them, in one line.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # carried over to the driver's own thread
            failures.append(error)

    # Not on the main thread: there Ray Train takes SIGINT for itself and aborts workers unsaved.
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_MEANWHILE_EVERY_S)
        meanwhile()
    meanwhile()
    if failures:
        raise _explained(failures[0], run_dir)


def _explained(error: BaseException, run_dir: Path) -> BaseException:
    """The user's error inside what Ray wraps it in, if there is one."""
    for inner in getattr(error, "worker_failures", {}).values():
        cause = getattr(inner, "cause", inner)
        if isinstance(cause, NAFNetError):
            return cause
    if isinstance(error, NAFNetError):
        return error
    noted = read_failures(run_dir)
    return CapabilityError(
        "training failed",
        file=run_dir / "logs",
        got=noted[-1].line() if noted else str(error).strip().splitlines()[-1][:200],
        fix="Its cause is in the logs; the same command goes on from the last checkpoint",
    )
