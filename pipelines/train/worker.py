"""What each Ray Train worker runs: its place in the group, its batches through Ray Data, and the loop.

`driver.py` starts it; the loop itself is in `loop.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.config import RunConfig
from pipelines.feeder import ray_batches
from pipelines.plan import SamplePlan
from pipelines.scratch import scratch_folder
from pipelines.storage import LocalFolder, RemoteFolder
from pipelines.train.beside import BesideValidation, SpareRoom
from pipelines.train.checks import check_precision
from pipelines.train.failures import read_failures
from pipelines.train.files import STOP
from pipelines.train.loop import set_threads, train
from pipelines.train.mirror import Mirror
from pipelines.train.placement import note_group
from pipelines.train.trainer import TrainContext

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the driver hands to each worker."""

    config: dict[str, Any]
    """`RunConfig` as JSON values."""
    storage: LocalFolder | RemoteFolder
    """Where the run's state is kept: the run's folder where all nodes see it."""
    is_shared: bool
    """Whether that is the run's folder itself, or has a folder on this node to stand for it."""
    plan: SamplePlan
    digests: tuple[str, ...]
    spare: SpareRoom | None
    """Where validation may run beside the training; None has the workers take the scores."""


def worker_main(job: dict[str, Job]) -> None:
    """What each Ray Train worker runs."""
    run = job["job"]
    if any(failure.final for failure in read_failures(run.storage)) or run.storage.size(STOP) is not None:
        return  # nothing that another attempt would mend, or nobody wants one
    with _run_folder(run) as (run_dir, sending):
        _work(run, run_dir, sending)


def _work(job: Job, run_dir: Path, sending: contextlib.AbstractContextManager[None]) -> None:
    import ray.train
    import ray.train.torch

    config = RunConfig.model_validate(job.config)
    placement = ray.train.get_context()
    rank, world_size = placement.get_world_rank(), placement.get_world_size()
    _log_to(run_dir / "logs" / f"rank{rank}.log")
    log.info("rank %d of %d begins, process %d on %s", rank, world_size, os.getpid(), socket.gethostname())
    if rank == 0:
        note_group(job.storage)
    set_threads(config.scaling.threads_per_worker or max(1, (psutil.cpu_count() or 1) // world_size))
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        import torch

        check_precision(config, device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    beside = None
    if job.spare is not None and rank == 0:
        beside = BesideValidation(config, job.spare, run_dir)
    context = TrainContext(
        rank=rank,
        world_size=world_size,
        device=device,
        run_dir=run_dir,
        batches=lambda span: ray_batches(
            job.plan,
            [store.path for store in config.data.train],
            span,
            rank=rank,
            world_size=world_size,
            num_readers=config.scaling.readers_per_worker,
            reader_cpus=0,  # the worker holds them
            cache_gib=config.data.cache_gib,
        ),
        epoch_samples=job.plan.epoch_samples,
        store_digests=job.digests,
        validates_beside=job.spare is not None,
        beside=beside,
    )
    try:
        with sending if rank == 0 else contextlib.nullcontext():
            train(config, context)
    except Exception:
        log.exception("rank %d failed", rank)
        raise


@contextlib.contextmanager
def _run_folder(job: Job) -> Iterator[tuple[Path, contextlib.AbstractContextManager[None]]]:
    """The folder that training works in, and what sends its content where it belongs."""
    if job.is_shared:
        assert isinstance(job.storage, LocalFolder)
        yield job.storage.path, contextlib.nullcontext()
        return
    with scratch_folder() as folder:
        mirror = Mirror(job.storage, folder)
        mirror.fetch()
        yield folder, mirror.sending()


def _log_to(path: Path) -> None:
    """Send this process' log to a file, once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("pipelines").setLevel(logging.INFO)
