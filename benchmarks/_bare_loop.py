"""The steps of `nafnet train` without Ray, in two processes, on batches in memory: what it could reach.

    torchrun --standalone --nproc_per_node 2 benchmarks/_bare_loop.py --store STORE --seconds 30

Same network, batch and precision, from the same recipe; the patches of so many batches are read before, and
come again and again. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines.config import load_config  # noqa: E402
from pipelines.ingest import plan_for, read_patches  # noqa: E402
from pipelines.plan import rank_slice  # noqa: E402
from pipelines.store import PairStore  # noqa: E402
from pipelines.train.trainer import TrainContext, Trainer  # noqa: E402

_NUM_BATCHES, _WARM_UP_STEPS, _LOOK_EVERY_STEPS = 32, 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--config", default="mobile")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = load_config(options.config, options.overrides, train=[options.store])
    stage = config.stages[0]
    plan, store = plan_for(config.data, seed=config.seed), PairStore(options.store)
    own = np.arange(*rank_slice(stage.batch, rank, world_size))
    batches = cycle(
        [
            read_patches(plan, [store], number * stage.batch + own, stage.patch_px)
            for number in range(_NUM_BATCHES)
        ]
    )
    with tempfile.TemporaryDirectory() as run_dir:
        context = TrainContext(
            rank=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            run_dir=Path(run_dir),
            batches=lambda span: batches,
            epoch_samples=plan.epoch_samples,
            store_digests=(),
        )
        trainer = Trainer(config, context)
        for _ in range(_WARM_UP_STEPS):
            trainer.step(next(batches), stage.batch, 10**9)
        start, before = time.perf_counter(), trainer.samples
        is_over = torch.zeros(1)
        while not is_over:
            for _ in range(_LOOK_EVERY_STEPS):
                trainer.step(next(batches), stage.batch, 10**9)
            is_over[0] = time.perf_counter() - start > options.seconds
            dist.broadcast(is_over, src=0)
        seconds = time.perf_counter() - start
    if rank == 0:
        print(json.dumps({"samples_per_s": (trainer.samples - before) / seconds}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
