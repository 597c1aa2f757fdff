"""What more workers are worth: measured on this machine, and from that predicted for 8, 64 and 512 GPUs.

    sudo -E python benchmarks/scale.py              # ten minutes on two cores that are idle; rows of README
    python benchmarks/scale.py                      # without limited links and what is fitted on them
    python benchmarks/scale.py --quick              # three rounds at 128²
    python benchmarks/scale.py --only cluster --tflops 40 --gpu-batch 8       # predictions for another GPU

Workers are processes of one thread on a core each, and take the project's own steps (`Trainer`), bare: no
Ray, one batch in memory. Their nodes are network namespaces, whose links `tc` limits; that takes root. Steps
are timed while nobody else is at work here, as far as there is patience for it. A model
(`_scaling_model.py`) is fitted on few of these runs, and predicts the others, then clusters. What cannot be
measured here is assumed and said: see `Assumed` in `_clusters.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _groups as groups  # noqa: E402
from benchmarks import _nodes as nodes  # noqa: E402
from benchmarks import _stores as stores  # noqa: E402
from benchmarks._clusters import Assumed, cluster_rows  # noqa: E402
from benchmarks._course import bare_context, course  # noqa: E402
from benchmarks._groups import Measured  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from benchmarks._scale_worker import QUIET, Job, Way  # noqa: E402
from benchmarks._scaling_model import MIB, Cluster, Link, error  # noqa: E402
from pipelines.config import load_config  # noqa: E402
from pipelines.ingest import Stopwatch, plan_for, read_patches  # noqa: E402
from pipelines.store import PairStore  # noqa: E402
from pipelines.train.journal import Journal  # noqa: E402
from pipelines.train.trainer import StepResult, Trainer  # noqa: E402

_PARTS = ("workers", "costs", "cluster")
# What is asked.
_RATIO_FLOOR, _HIDDEN_FLOOR = 1.75, 0.7
# Mbit/s: of the runs that the model is fitted on, and of those that it has not seen.
_FITTED, _UNSEEN = 1000.0, 300.0
_NUM_READS, _NUM_LOGGED = 64, 1000
_DDP = Way(name="ddp", kind="ddp")
_BF16 = {"gradient_compression": "bf16"}
_SMALL = Way(name="ddp 5 MiB", kind="ddp", scaling={"bucket_mib": 5})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="gopro_width32", help="recipe of `nafnet train`")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="override of the recipe")
    parser.add_argument("--patch", type=int, default=256, help="side in pixels")
    parser.add_argument("--batch", type=int, default=2, help="samples of a worker")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=240.0, help="seconds to wait for others, a group")
    parser.add_argument("--tflops", type=float, default=20.0, help="that one GPU sustains")
    parser.add_argument("--gpu-batch", type=int, default=4, help="samples of a GPU and pass")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--quick", action="store_true", help="three rounds of 128²")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    patch_px, rounds = (128, 3) if options.quick else (options.patch, options.rounds)
    overrides = options.overrides or ["precision=bf16"]
    job = Job(
        recipe=options.config,
        overrides=overrides,
        patch_px=patch_px,
        batch=options.batch,
        rounds=rounds,
        ways=[_DDP],
        patience_s=options.patience,
    )
    rows: Rows = {}
    if "workers" in options.only:
        rows |= worker_rows(job)
    if "costs" in options.only:
        rows |= cost_rows(patch_px)
    if "cluster" in options.only:
        assumed = Assumed(tflops=options.tflops, patch_px=256, batch=options.gpu_batch)
        rows |= cluster_rows(assumed)
    show(rows, as_json=options.json, versions={"torch": torch.__version__})


def worker_rows(job: Job) -> Rows:
    """1, 2 and 4 workers on this machine, and the model against the runs that it has not seen."""
    limited = nodes.can_limit()
    if not limited:
        print("links are not limited here: that takes root, iproute2 and tbf", file=sys.stderr)
    alone = [
        Way(name="alone", kind="alone"),
        Way(name="apart", kind="apart"),
        Way(name="no_sync", kind="no_sync"),
    ]
    free = [*alone, _DDP, Way(name="ddp bf16", kind="ddp", scaling=_BF16), Way(name="sum", kind="all_reduce")]
    slow = [_at(_DDP, _FITTED), _at(Way(name="sum", kind="all_reduce"), _FITTED)]
    unseen = [
        _at(_DDP, _UNSEEN),
        _at(Way(name="ddp bf16", kind="ddp", scaling=_BF16), _UNSEEN),
        _at(Way(name="ddp bf16", kind="ddp", scaling=_BF16), _FITTED),
        _at(_SMALL, _FITTED),
        _at(Way(name="ddp 100 MiB", kind="ddp", scaling={"bucket_mib": 100}), _FITTED),
    ]
    of_two = [*free, *slow, *unseen] if limited else free
    of_four = [*alone, _DDP, *([_at(_DDP, _FITTED), _at(_DDP, _UNSEEN)] if limited else [])]
    two = groups.measure(2, replace(job, ways=of_two), limited=limited)
    four = groups.measure(4, replace(job, ways=of_four), limited=limited)
    rows = _speed_rows(job, two, four)
    return {**rows, **_model_rows(job, two, four, unseen)} if limited else rows


def _at(way: Way, mbit_s: float) -> Way:
    return replace(way, name=f"{way.name} at {mbit_s:g} Mbit/s", mbit_s=mbit_s)


def _speed_rows(job: Job, two: Measured, four: Measured) -> Rows:
    config = load_config(job.recipe, job.overrides, train=[])
    shape = f"{config.model.preset}, {job.batch}×{job.patch_px}² a worker, {config.precision}"
    alone_s, no_sync_s, ddp_s = (two.seconds(way) for way in ("alone", "no_sync", "ddp"))
    gradient = f"all-reduce of {two.gradient_bytes / MIB:.0f} MiB"
    rows = {
        f"one worker of one thread, {shape}": row(job.batch / alone_s, "samples/s"),
        "two that know of no other, against one: what the machine allows": row(
            2 * alone_s / two.seconds("apart"), "×"
        ),
        "DDP, 2 workers on 2 'nodes', against one": row(2 * alone_s / ddp_s, "×", at_least=_RATIO_FLOOR),
        "the same, of what the machine allows": row(two.seconds("apart") / ddp_s, ""),
        "the same by processor time, of which others take nothing": row(
            2 * two.processor_s("alone") / two.processor_s("ddp"), "×"
        ),
        "the same, gradients in bf16, against one": row(2 * alone_s / two.seconds("ddp bf16"), "×"),
        "DDP, 4 workers on 2 cores, against one": row(4 * four.seconds("alone") / four.seconds("ddp"), "×"),
        "the same, of what four that know of no other do": row(
            four.seconds("apart") / four.seconds("ddp"), ""
        ),
        f"{gradient} alone, 2 workers": row(1000 * two.seconds("sum"), "ms"),
        "share of it hidden behind the backward pass": row(1 - (ddp_s - no_sync_s) / two.seconds("sum"), ""),
    }
    slow = f" at {_FITTED:g} Mbit/s"
    if f"sum{slow}" in two.samples:
        sum_s = two.seconds(f"sum{slow}")
        rows |= {
            f"{gradient} alone, 2 workers{slow}": row(1000 * sum_s, "ms"),
            f"share of it hidden behind the backward pass{slow}": row(
                1 - (two.seconds(f"ddp{slow}") - no_sync_s) / sum_s, "", at_least=_HIDDEN_FLOOR
            ),
            f"the same, buckets of 5 MiB{slow}": row(
                1 - (two.seconds(_at(_SMALL, _FITTED).name) - no_sync_s) / sum_s, "", at_least=_HIDDEN_FLOOR
            ),
            f"DDP, 2 workers, buckets of 5 MiB{slow}, against one": row(
                2 * alone_s / two.seconds(_at(_SMALL, _FITTED).name), "×", at_least=_RATIO_FLOOR
            ),
        }
    others = max(measured.others(way) for measured in (two, four) for way in ("alone", "apart", "ddp"))
    return {**rows, "of the cores, what other processes took meanwhile": row(others, "", at_most=QUIET)}


def _model_rows(job: Job, two: Measured, four: Measured, unseen: list[Way]) -> Rows:
    """Fitted: two workers, without a limit and at one. Unseen: other limits, buckets, types, workers."""
    config = load_config(job.recipe, job.overrides, train=[])
    step = course(config, job.patch_px, job.batch)
    size, no_sync_s = two.gradient_bytes, two.seconds("no_sync")
    # What summing costs where nothing holds it up is work of the cores; the rest is the link's.
    host_s_per_byte = {way: max(0.0, two.seconds(way) - no_sync_s) / size for way in ("ddp", "ddp bf16")}
    free_bytes_per_s = size / two.seconds("sum")
    link_share = size / two.seconds(f"sum at {_FITTED:g} Mbit/s") / (_FITTED * 1e6 / 8)
    predicted, measured, rows = [], [], {}
    of_four = [way for way in (_at(_DDP, _FITTED), _at(_DDP, _UNSEEN))]
    for number, found, ways in ((2, two, unseen), (4, four, [_DDP, *of_four])):
        # Of the compute only, which has its own measurement; two workers on a core share it, and a ring of
        # four moves half as many bytes again.
        course_s = step.lasting(found.seconds("no_sync"))
        sharing = number / 2 * (2 * (number - 1) / number)
        for way in ways:
            is_bf16 = way.scaling == _BF16
            limit = math.inf if way.mbit_s is None else link_share * way.mbit_s * 1e6 / 8
            cluster = Cluster(
                num_nodes=number,
                between=Link(bytes_per_s=min(limit, free_bytes_per_s)),
                host_s_per_byte=sharing * host_s_per_byte["ddp bf16" if is_bf16 else "ddp"],
            )
            seconds = cluster.step_s(
                course_s, bucket_mib=way.scaling.get("bucket_mib"), bytes_share=0.5 if is_bf16 else 1.0
            )
            predicted.append(seconds)
            measured.append(found.seconds(way.name))
            told = f"step of {number}, {way.name}: predicted, off by"
            rows[told] = row(seconds / measured[-1] - 1, "")
    mean, largest = error(predicted, measured)
    rows["unseen runs: mean error of the prediction"] = row(mean, "")
    rows["unseen runs: largest error of the prediction"] = row(largest, "")
    return {
        "computing time that a byte of the gradient takes": row(1e9 * host_s_per_byte["ddp"], "ns"),
        **rows,
    }


def cost_rows(patch_px: int) -> Rows:
    """What a step takes beside computing and summing: reading patches, and logging."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stores.make_training_stores(folder, num_test=1)
        config = load_config("mobile", [], train=[folder / "train"])
        plan, store = plan_for(config.data, seed=config.seed), PairStore(folder / "train")
        times = []
        for number in range(3):
            start = time.process_time()
            read_patches(plan, [store], np.arange(number * _NUM_READS, (number + 1) * _NUM_READS), patch_px)
            times.append((time.process_time() - start) / _NUM_READS)
        step_s, row_s = _logging_s(folder)
    return {
        f"reading a patch pair of {patch_px}², of a core": row(1000 * statistics.median(times), "ms"),
        "logging a step": row(1e6 * step_s, "µs"),
        "logging a row, one in two seconds": row(1e6 * row_s, "µs"),
    }


def _logging_s(run_dir: Path) -> tuple[float, float]:
    """Seconds of `Journal.step`, and of one that ends a row."""
    trainer = Trainer(load_config("mobile", [], train=[]), bare_context(run_dir, 0, 1))
    value, found = torch.zeros(()), []
    for every_s in (1e9, 1e-9):
        with contextlib.closing(Journal(trainer.context, every_s)) as journal:
            start, watch = time.perf_counter(), Stopwatch()
            for _ in range(_NUM_LOGGED):
                trainer.samples += 1
                journal.step(trainer, StepResult(loss=value, psnr_db=value, grad_norm=value, lr=1.0), watch)
            found.append((time.perf_counter() - start) / _NUM_LOGGED)
    return found[0], found[1]


if __name__ == "__main__":
    main()
