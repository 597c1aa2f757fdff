"""`prepare` through Ray against decoding and encoding alone, and what the driver keeps of a million pairs.

    python benchmarks/prepare.py
    NAFNET_DATA=~/data python benchmarks/prepare.py --photos 80     # photos in ~/data/sharp/unsplash

The peer is a pool of as many processes as there are cores, which decode both images of each pair and encode
their 512² crops, and do nothing else: no digest, no screening, no file. Both are warm, and take turns.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _stores as stores  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from pipelines import prepare  # noqa: E402
from pipelines.png import encode_png  # noqa: E402
from pipelines.sources import PairRef, find_source  # noqa: E402

_SIMULATED_PAIRS = 1_000_000
# Of so many shards the driver's memory is looked at; the rest comes in waves of the same size.
_SIMULATED_SHARDS = 2_000
_GROWTH_LIMIT_MIB = 200.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stores.make_pairs(folder, options.photos)
        from cluster.connect import connect

        with connect():
            rows = throughput_rows(folder, options.rounds) | memory_rows()
    show(rows, as_json=options.json, versions={"NumPy": np.__version__, "OpenCV": cv2.__version__})


def throughput_rows(folder: Path, rounds: int) -> Rows:
    source = find_source(folder / "pairs", split="train")
    refs = source.pairs()
    ours, peers = [], []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for number in range(-1, rounds):  # the first to warm up
            with tempfile.TemporaryDirectory() as temporary:
                config = prepare.PrepareConfig(out=Path(temporary) / "store", pairs_per_shard=2)
                start = time.perf_counter()
                manifest = prepare.run(source, refs, config).manifest
                ours.append(manifest.num_pairs / (time.perf_counter() - start))
            start = time.perf_counter()
            count = sum(pool.imap_unordered(_decode_and_encode, refs))
            peers.append(count / (time.perf_counter() - start))
            assert count == manifest.num_pairs
            if number < 0:
                ours.clear(), peers.clear()
    mine, bare = statistics.median(ours), statistics.median(peers)
    return {
        "prepare through Ray, 512² crops as PNG in Parquet, all cores": row(mine, "pairs/s"),
        "decoding and encoding alone, all cores": row(bare, "pairs/s"),
        "prepare, share of the rate of decoding and encoding alone": row(mine / bare, "", at_least=0.5),
    }


def _decode_and_encode(ref: PairRef) -> int:
    cv2.setNumThreads(1)
    lq, gt = ref.read()
    count = 0
    for top in prepare.crop_corners(lq.shape[0], 512, 256, 0):
        for left in prepare.crop_corners(lq.shape[1], 512, 256, 0):
            for image in (lq, gt):
                encode_png(image[top : top + 512, left : left + 512])
            count += 1
    return count


def memory_rows() -> Rows:
    """Jobs of a million pairs, of which the workers do nothing."""
    process = psutil.Process()
    before = process.memory_info().rss
    root = Path("/data/gopro/train")
    refs = []
    for number in range(_SIMULATED_PAIRS):
        scene, name = f"GOPR{number // 100:06d}", f"{number:06d}"
        lq, gt = (root / scene / side / f"{name}.png" for side in ("blur", "sharp"))
        refs.append(PairRef(key=f"{scene}/{name}", scene=scene, lq=lq, gt=gt))
    listed = process.memory_info().rss
    real, prepare._write_row = prepare._write_row, _do_nothing
    find, prepare.find_duplicates = prepare.find_duplicates, lambda refs: {}
    most, start, first_s = 0, time.perf_counter(), 0.0
    try:
        config = prepare.PrepareConfig(out=Path("/nowhere"))
        work = prepare._work(list(prepare._jobs(refs, config, "token")), use_ray=True)
        for done, _ in enumerate(work, start=1):
            first_s = first_s or time.perf_counter() - start
            most = max(most, process.memory_info().rss)
            if done == _SIMULATED_SHARDS:
                break
    finally:
        prepare._write_row, prepare.find_duplicates = real, find
    return {
        "a million pairs: their list, driver": row((listed - before) / 2**20, "MiB"),
        "a million pairs: what the job adds to it, driver": row(
            (most - listed) / 2**20, "MiB", at_most=_GROWTH_LIMIT_MIB
        ),
        "a million pairs: until the first shard is begun and done by an idle worker": row(first_s, "s"),
    }


def _do_nothing(row: dict[str, Any]) -> dict[str, Any]:
    return {"refused": "", "is_input": True}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
