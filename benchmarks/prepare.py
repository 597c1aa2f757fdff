"""`prepare` through Ray against decoding and encoding alone, and the driver's memory.

    python benchmarks/prepare.py
    NAFNET_DATA=~/data python benchmarks/prepare.py --photos 80     # photos in ~/data/sharp/unsplash

The peer is a pool of as many processes as there are cores, which decode both images of each pair and encode
their 512² crops, and do nothing else: no digest, no screening, no file. Both are warm, and take turns.

The driver's memory is measured on real folders of tiny files, by `benchmarks/_driver.py`: 4 GB of disk and
some minutes for a million pairs.
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

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _stores as stores  # noqa: E402
from benchmarks._driver import make_layout, measured  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from pipelines import prepare  # noqa: E402
from pipelines.png import encode_png  # noqa: E402
from pipelines.sources import PairRef, find_source  # noqa: E402

_GROWTH_LIMIT_MIB = 150.0
_LISTING_LIMIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--pairs", type=int, default=1_000_000, help="for the driver's memory; 4 KB of disk each"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stores.make_pairs(folder, options.photos)
        from cluster.connect import connect

        with connect():
            rows = throughput_rows(folder, options.rounds)
    rows |= memory_rows(options.pairs)
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


def memory_rows(num_pairs: int) -> Rows:
    """The driver at a tenth of the pairs and at all of them, each in a fresh process."""
    counts, figures = (num_pairs // 10, num_pairs), []
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            make_layout(Path(temporary), count)
            figures.append(measured(Path(temporary)))
    few, many = figures
    growth = many["peak_mib"] - few["peak_mib"]
    name = f"prepare of {num_pairs:,} pairs"
    return {
        f"prepare of {counts[0]:,} pairs: most memory of the driver": row(few["peak_mib"], "MiB"),
        f"{name}: most memory of the driver": row(many["peak_mib"], "MiB"),
        f"{name}: more than of a tenth of them": row(growth, "MiB", at_most=_GROWTH_LIMIT_MIB),
        f"{name}: listing them": row(many["listed_s"], "s", at_most=_LISTING_LIMIT_S),
        f"{name}: until the first shard is given out": row(many["begun_s"], "s"),
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
