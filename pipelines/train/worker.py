"""What each Ray Train worker runs: its place in the group, its batches through Ray Data, and the loop.

`driver.py` starts it; the loop itself is in `loop.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import psutil

from pipelines.config import RunConfig
from pipelines.feeder import ray_batches
from pipelines.plan import SamplePlan
from pipelines.train.checks import check_precision
from pipelines.train.loop import set_threads, train
from pipelines.train.trainer import TrainContext

log = logging.getLogger(__name__)


def worker_main(job: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    config, run_dir = RunConfig.model_validate(job["config"]), Path(job["run_dir"])
    plan: SamplePlan = job["plan"]
    placement = ray.train.get_context()
    rank, world_size = placement.get_world_rank(), placement.get_world_size()
    _log_to(run_dir / "logs" / f"rank{rank}.log")
    set_threads(config.scaling.threads_per_worker or max(1, (psutil.cpu_count() or 1) // world_size))
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        import torch

        check_precision(config, device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    context = TrainContext(
        rank=rank,
        world_size=world_size,
        device=device,
        run_dir=run_dir,
        batches=lambda span: ray_batches(
            plan,
            [store.path for store in config.data.train],
            span,
            rank=rank,
            world_size=world_size,
            num_readers=config.scaling.readers_per_worker,
            reader_cpus=config.scaling.reader_cpus,
            cache_gib=config.data.cache_gib,
        ),
        epoch_samples=plan.epoch_samples,
        store_digests=tuple(job["digests"]),
    )
    try:
        train(config, context)
    except Exception:
        log.exception("rank %d failed", rank)
        raise


def _log_to(path: Path) -> None:
    """Send this process' log to a file, once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("pipelines").setLevel(logging.INFO)
