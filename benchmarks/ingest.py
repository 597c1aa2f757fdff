"""Reading training patches, against a PNG-LMDB DataLoader and against a plain loop; preparing and planning.

    python benchmarks/ingest.py
    NAFNET_DATA=~/data python benchmarks/ingest.py --photos 26     # photos in ~/data/sharp/unsplash

Photos are blurred and cut into 512² crops, of which two consumers take 256² patches in batches of 16. The
peer has as many processes as we have: two consumers, one reader each. The ceiling is one plain loop a core
over the memory-mapped shards. The page cache is filled before each measurement, except where a row says cold.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _loaders as loaders  # noqa: E402
from benchmarks import _stores as stores  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from pipelines.plan import SEGMENT_PAIRS, SamplePlan  # noqa: E402
from pipelines.store import PairStore  # noqa: E402

_PATCH_PX, _BATCH, _CONSUMERS = 256, 16, 2
_WARM_UP_S = 20.0
_FLOORS = {"raw": 8.0, "png": 1.3}
_CEILING_FLOOR, _STALL_LIMIT_S, _FIRST_LIMIT_S, _DRIVER_LIMIT_MIB = 0.5, 0.1, 5.0, 500.0

_LABELS = {"peer": "PNG-LMDB DataLoader", "ceiling": "plain loop", "raw": "raw store", "png": "png store"}

Arrivals = list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=int, default=26, help="photos to make the stores of")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder to make the stores in, or that has them already")
    parser.add_argument("--quick", action="store_true", help="reading only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        os.environ["NAFNET_CACHE"] = str(Path(temporary) / "cache")
        stores.make_stores(folder, options.photos)
        rows = reading_rows(folder, options.seconds, options.rounds)
        if not options.quick:
            rows |= planning_rows()
            rows |= stores.preparing_rows(folder)
    show(rows, as_json=options.json, versions={"NumPy": np.__version__, "OpenCV": cv2.__version__})


def reading_rows(folder: Path, seconds: float, rounds: int) -> Rows:
    """All kinds of reading, in turns."""
    from ray._private.internal_api import memory_summary

    from cluster.connect import connect

    num_pairs = len(PairStore(folder / "raw"))
    rates: dict[str, list[float]] = {}
    ours: dict[str, list[list[Arrivals]]] = {"raw": [], "png": []}
    with connect():
        # Ray's own actors start; and until a page of shared memory was used once, the kernel has to clear it.
        through_ray(folder / "raw", num_pairs, _WARM_UP_S)
        for _ in range(rounds):
            runs: dict[str, Callable[[], list[Arrivals]]] = {
                "peer": lambda: in_processes(_consume_loader, folder / "basicsr", num_pairs, seconds),
                "ceiling": lambda: in_processes(_consume_loop, folder / "raw", num_pairs, seconds),
                "raw": lambda: through_ray(folder / "raw", num_pairs, seconds),
                "png": lambda: through_ray(folder / "png", num_pairs, seconds),
            }
            for name, run in runs.items():
                stores.fill_page_cache(folder)
                arrivals = run()
                rates.setdefault(name, []).append(_rate(arrivals))
                if name in ours:
                    ours[name].append(arrivals)
        epoch = num_pairs // (_BATCH * _CONSUMERS)
        cold = {
            "peer": lambda: in_processes(_consume_loader, folder / "basicsr", num_pairs, seconds, epoch),
            "raw": lambda: through_ray(folder / "raw", num_pairs, seconds, epoch),
            "png": lambda: through_ray(folder / "png", num_pairs, seconds, epoch),
        }
        cold_rows = _cold_rows(folder, cold)
        spilled = memory_summary(stats_only=True)
    return _rows_of(rates, ours, num_pairs, "Spilled" in spilled) | cold_rows


def _rows_of(
    rates: dict[str, list[float]],
    ours: dict[str, list[list[Arrivals]]],
    num_pairs: int,
    spilled: bool,
) -> Rows:
    median = {name: statistics.median(values) for name, values in rates.items()}
    rows = {f"{_LABELS[name]}, 2 consumers": row(value, "pairs/s") for name, value in median.items()}
    for name, floor in _FLOORS.items():
        rows[f"{_LABELS[name]} against the DataLoader"] = row(
            median[name] / median["peer"], "×", at_least=floor
        )
    share = median["raw"] / median["ceiling"]
    rows["raw store, share of the plain loop"] = row(share, "", at_least=_CEILING_FLOOR)
    for name, runs in ours.items():
        first = max(times[1] - times[0] for run in runs for times in run)
        rows[f"{_LABELS[name]}, first batch, longest of all"] = row(first, "s", at_most=_FIRST_LIMIT_S)
    stalls = [_stall(times, num_pairs) for run in ours["raw"] for times in run]
    rows["raw store, longest stall between epochs"] = row(max(stalls), "s", at_most=_STALL_LIMIT_S)
    rows["object store spilled"] = row(float(spilled), "", at_most=0.0)
    return rows


def _cold_rows(folder: Path, runs: dict[str, Callable[[], list[Arrivals]]]) -> Rows:
    """One epoch each, after the page cache was emptied."""
    rows: Rows = {}
    for name, run in runs.items():
        stores.empty_page_cache(folder)
        before = _bytes_read()
        consumers = run()
        read = _bytes_read() - before
        rate = sum((len(times) - 2) * _BATCH / (times[-1] - times[1]) for times in consumers)
        num_pairs = sum(len(times) - 1 for times in consumers) * _BATCH
        rows[f"{_LABELS[name]}, cold: an epoch from an emptied page cache"] = row(rate, "pairs/s")
        rows[f"{_LABELS[name]}, cold: bytes from the disk a pair"] = row(read / num_pairs / 2**20, "MiB")
    return rows


def planning_rows() -> Rows:
    """A plan of millions of pairs, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    rows: Rows = {}
    for num_pairs, limit in ((1_000_000, _DRIVER_LIMIT_MIB), (5_000_000, None)):
        queue = context.Queue()
        process = context.Process(target=_plan, args=(num_pairs, queue))
        process.start()
        epoch_s, resume_s, peak_mib = queue.get()
        process.join()
        label = f"plan of {num_pairs / 1e6:g} M pairs"
        rows[f"{label}: all samples of an epoch"] = row(epoch_s, "s")
        rows[f"{label}: a batch in the middle of the next epoch"] = row(resume_s, "s")
        rows[f"{label}: peak memory, start-up included"] = row(peak_mib, "MiB", at_most=limit)
    plans = {"window of 65,536": 65_536, "full shuffle": 2**40}
    for name, window in plans.items():
        plan = SamplePlan(seed=0, store_pairs=(1_000_000,), weights=(1.0,), window_pairs=window)
        pair = plan.samples(np.arange(1_000_000)).pair
        correlation = np.corrcoef(pair[:-1], pair[1:])[0, 1]
        rows[f"{name}, 1 M pairs: correlation of neighbours"] = row(float(correlation), "")
        rows_of_32 = (pair // SEGMENT_PAIRS).reshape(-1, 32)
        shared = 32 - np.mean([len(np.unique(row)) for row in rows_of_32[:2000]])
        rows[f"{name}, 1 M pairs: of 32, from the same {SEGMENT_PAIRS} pairs"] = row(float(shared), "")
    return rows


def _plan(num_pairs: int, queue: Any) -> None:
    root = stores.simulated_store(num_pairs)
    store = PairStore(root)
    shutil.rmtree(root)
    plan = SamplePlan(seed=0, store_pairs=(len(store),), weights=(1.0,), window_pairs=65_536)
    start = time.perf_counter()
    for first in range(0, len(store), 8192):
        plan.samples(np.arange(first, min(first + 8192, len(store))))
    epoch_s = time.perf_counter() - start
    start = time.perf_counter()
    plan.samples(np.arange(32) + len(store) * 3 // 2)
    resume_s = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    queue.put((epoch_s, resume_s, int(status.split("VmHWM:")[1].split()[0]) / 1024))


def _rate(consumers: Sequence[Arrivals]) -> float:
    """Pairs a second over all consumers, each from its first second on: before that pieces are small."""
    total = 0.0
    for times in consumers:
        start = next(i for i, moment in enumerate(times) if moment > times[1] + 1.0)
        total += (len(times) - 1 - start) * _BATCH / (times[-1] - times[start])
    return total


def _stall(times: Arrivals, num_pairs: int) -> float:
    """How much longer than usual the batches took with which an epoch began.

    Batches come in blocks, so the longest gap at a border is measured against the long ones elsewhere.
    """
    gaps = [after - before for before, after in pairwise(times[1:])]
    per_epoch = num_pairs / (_BATCH * _CONSUMERS)
    # The gaps before and after the batch in which an epoch begins.
    borders = {math.floor(epoch * per_epoch) + shift for epoch in range(1, 10**4) for shift in (-1, 0)}
    at = [gap for number, gap in enumerate(gaps) if number in borders]
    assert at, "the measurement was shorter than an epoch"
    elsewhere = [gap for number, gap in enumerate(gaps) if number not in borders]
    return max(0.0, max(at) - float(np.quantile(elsewhere, 0.995)))


def _bytes_read() -> float:
    """Bytes that this machine's disks have delivered, each counted once."""
    disks = [name for name in os.listdir("/sys/block") if not name.startswith(("loop", "ram", "dm-", "md"))]
    return sum(int(Path(f"/sys/block/{name}/stat").read_text().split()[2]) * 512.0 for name in disks)


def in_processes(
    consume: Callable[..., None], place: Path, num_pairs: int, seconds: float, num_batches: int = 10**6
) -> list[Arrivals]:
    """Run a consumer in each of two processes at once, for so long or so many batches."""
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(_CONSUMERS)
    processes = [
        context.Process(target=consume, args=(place, num_pairs, seconds, num_batches, number, barrier, queue))
        for number in range(_CONSUMERS)
    ]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return results


def _consume_loader(
    place: Path, num_pairs: int, seconds: float, num_batches: int, number: int, barrier: Any, queue: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    loader = loaders.data_loader((place / "lq.lmdb", place / "gt.lmdb"), num_pairs, _PATCH_PX, _BATCH)

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    barrier.wait()
    queue.put(_taken(islice(batches(), num_batches), seconds))


def _consume_loop(
    place: Path, num_pairs: int, seconds: float, num_batches: int, number: int, barrier: Any, queue: Any
) -> None:
    cv2.setNumThreads(1)
    barrier.wait()
    batches = loaders.plain_loop(place, _PATCH_PX, _BATCH, seed=number)
    queue.put(_taken(islice(batches, num_batches), seconds))


def _taken(batches: Iterator[Any], seconds: float) -> Arrivals:
    """When the start was, and when each batch came."""
    times = [time.perf_counter()]
    for _ in batches:
        times.append(time.perf_counter())
        if times[-1] - times[1] > seconds:
            break
    return times


def through_ray(root: Path, num_pairs: int, seconds: float, num_batches: int = 10**6) -> list[Arrivals]:
    """Our ingest: two Ray actors in the training workers' places."""
    import ray

    plan = SamplePlan(seed=0, store_pairs=(num_pairs,), weights=(1.0,), window_pairs=65_536)

    @ray.remote(num_cpus=0.3)
    class Consumer:
        def ready(self) -> None:
            import pipelines.feeder  # noqa: F401

        def consume(self, rank: int) -> Arrivals:
            from pipelines.feeder import ray_batches
            from pipelines.ingest import Span

            span = Span(start=0, num_batches=num_batches, batch=_BATCH * _CONSUMERS, patch_px=_PATCH_PX)
            batches = ray_batches(
                plan, [root], span, rank=rank, world_size=_CONSUMERS, num_readers=1, reader_cpus=0.5
            )
            try:
                return _taken(batches, seconds)
            finally:
                batches.close()

    consumers = [Consumer.remote() for _ in range(_CONSUMERS)]
    ray.get([consumer.ready.remote() for consumer in consumers])
    try:
        return ray.get([consumer.consume.remote(rank) for rank, consumer in enumerate(consumers)])
    finally:
        for consumer in consumers:
            ray.kill(consumer)


if __name__ == "__main__":
    main()
