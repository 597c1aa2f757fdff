"""Reading training patches, against a PNG-LMDB DataLoader and against a plain loop; two consumers.

    python benchmarks/ingest.py
    NAFNET_DATA=~/photos python benchmarks/ingest.py --photos 26

Photos are blurred and cut into 512² crops, of which the consumers take 256² patches in batches of 16. The
peer has as many processes as we have: two consumers, one reader each. The ceiling is one plain loop a core
over the memory-mapped shards. Pages are cached, except in the rows that say cold.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _loaders as loaders  # noqa: E402
from pipelines import prepare, synth  # noqa: E402
from pipelines.plan import SamplePlan  # noqa: E402
from pipelines.sources import find_source  # noqa: E402
from pipelines.store import PairStore  # noqa: E402

_PATCH_PX, _BATCH, _CONSUMERS = 256, 16, 2
_FLOORS = {"raw": 8.0, "png": 1.3, "ceiling": 0.5}

Rows = dict[str, dict[str, object]]
Arrivals = list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=int, default=26, help="photos to make the stores of")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder to make the stores in, or that has them already")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        make_stores(folder, options.photos)
        rows = throughput_rows(folder, options.seconds, options.rounds)
    if options.json:
        versions = f"Python {platform.python_version()}"
        print(json.dumps({"rows": rows, "machine": platform.processor(), "versions": versions}))
        return
    for name, row in rows.items():
        print(
            f"{name:75} {row['value']:9.4g} {row['unit']:8} {'' if row['holds'] in (None, True) else 'does not hold'}"
        )


def make_stores(folder: Path, num_photos: int) -> None:
    """`raw`, `png` and the peer's LMDBs, of the same crops."""
    photos = sorted((Path(os.environ["NAFNET_DATA"]) / "sharp" / "unsplash").rglob("*.jpg"))[:num_photos]
    if not (folder / "pairs").is_dir():
        synth.run(synth.SynthConfig(sharp=photos, out=folder / "pairs"))
    source = find_source(folder / "pairs", split="train")
    for format, codec in (("lmdb", "raw"), ("parquet", "png")):
        if not (folder / codec).is_dir():
            config = prepare.PrepareConfig(
                out=folder / codec, format=format, codec=codec, pairs_per_shard=4, use_ray=False
            )
            prepare.run(source, source.pairs(), config)
    if not (folder / "basicsr").is_dir():
        loaders.write_png_lmdbs(PairStore(folder / "raw"), folder / "basicsr")


def throughput_rows(folder: Path, seconds: float, rounds: int) -> Rows:
    """Pairs a second, in turns."""
    import ray

    from cluster.connect import connect

    num_pairs = len(PairStore(folder / "raw"))
    rates: dict[str, list[float]] = {}
    with connect():
        ray.get(ray.remote(num_cpus=0)(lambda: None).remote())
        for turn in range(rounds):
            runs: dict[str, Callable[[], list[Arrivals]]] = {
                "peer": lambda: in_processes(_consume_loader, folder / "basicsr", num_pairs, seconds),
                "ceiling": lambda: in_processes(_consume_loop, folder / "raw", num_pairs, seconds),
                "raw": lambda: through_ray(folder / "raw", num_pairs, seconds),
                "png": lambda: through_ray(folder / "png", num_pairs, seconds),
            }
            for name, run in runs.items():
                arrivals = run()
                rates.setdefault(name, []).append(_rate(arrivals))
                print(name, rates[name][-1], _first(arrivals), file=sys.stderr)
    return {name: _row(statistics.median(values), "pairs/s") for name, values in rates.items()}


def _rate(consumers: Sequence[Arrivals]) -> float:
    """Pairs a second over all consumers, each from its first batch on."""
    return sum((len(times) - 2) * _BATCH / (times[-1] - times[1]) for times in consumers)


def _first(consumers):
    return (
        [round(t[1] - t[0], 3) for t in consumers],
        [round(max(b - a for a, b in pairwise(t[2:])), 3) for t in consumers],
        [round(statistics.median(b - a for a, b in pairwise(t[2:])), 4) for t in consumers],
    )


def in_processes(consume: Callable[..., None], place: Path, num_pairs: int, seconds: float) -> list[Arrivals]:
    """Run a consumer in each of two processes at once."""
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(_CONSUMERS)
    processes = [
        context.Process(target=consume, args=(place, num_pairs, seconds, number, barrier, queue))
        for number in range(_CONSUMERS)
    ]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return results


def _consume_loader(
    place: Path, num_pairs: int, seconds: float, number: int, barrier: Any, queue: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    loader = loaders.data_loader((place / "lq.lmdb", place / "gt.lmdb"), num_pairs, _PATCH_PX, _BATCH)

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    barrier.wait()
    queue.put(_taken(batches(), seconds))


def _consume_loop(place: Path, num_pairs: int, seconds: float, number: int, barrier: Any, queue: Any) -> None:
    barrier.wait()
    queue.put(_taken(loaders.plain_loop(place, _PATCH_PX, _BATCH, seed=number), seconds))


def _taken(batches: Iterator[Any], seconds: float) -> Arrivals:
    """When the start was, and when each batch came."""
    times = [time.perf_counter()]
    for _ in batches:
        times.append(time.perf_counter())
        if times[-1] - times[min(1, len(times) - 1)] > seconds:
            break
    return times


def through_ray(root: Path, num_pairs: int, seconds: float) -> list[Arrivals]:
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

            span = Span(start=0, num_batches=10**6, batch=_BATCH * _CONSUMERS, patch_px=_PATCH_PX)
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


def _row(value: float, unit: str, *, at_least: float | None = None, at_most: float | None = None) -> dict:
    holds = None
    if at_least is not None or at_most is not None:
        holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"value": value, "at_least": at_least, "at_most": at_most, "unit": unit, "holds": holds}


if __name__ == "__main__":
    main()
