"""Blur made on the fly, patches a second a core, against the same in NumPy and OpenCV as one writes it down.

    python benchmarks/blurring.py
    NAFNET_DATA=~/data python benchmarks/blurring.py      # photos in ~/data/sharp/unsplash

Both cut 256² patches from a memory-mapped store of raw photos, with as much around them as their kernel
reaches, and add noise. The peer raises to powers, filters through `cv2.filter2D`, and draws normal numbers;
for `varying` blur there is none.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._rows import Rows, row, show  # noqa: E402
from benchmarks._stores import sharp_photos  # noqa: E402
from nafnet_core.blur import GAMMA, draw_degradation, sample_rng  # noqa: E402
from nafnet_core.kernels import disc_kernel, gaussian_kernel, shake_kernel  # noqa: E402
from pipelines import prepare  # noqa: E402
from pipelines.config import BlurSection, DataSection, StoreSection  # noqa: E402
from pipelines.ingest import plan_for, read_patches  # noqa: E402
from pipelines.sources import SharpPhotos  # noqa: E402
from pipelines.store import PairStore  # noqa: E402

_PATCH_PX, _NUM_PATCHES = 256, 64
_KINDS = ("shake", "varying", "defocus", "gaussian")
_KERNELS = {"defocus": lambda rng, px: disc_kernel(px), "gaussian": lambda rng, px: gaussian_kernel(px)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["NAFNET_CACHE"] = str(Path(temporary) / "cache")
        store = _store(Path(temporary), options.photos)
        rows = {}
        for kind in _KINDS:
            rows |= _rows(store, BlurSection(kinds=(kind,)), options.rounds)
    show(rows, as_json=options.json, versions={"NumPy": np.__version__, "OpenCV": cv2.__version__})


def _store(folder: Path, num_photos: int) -> PairStore:
    photos = folder / "photos"
    photos.mkdir()
    for number, path in enumerate(sharp_photos(folder / "shipped", num_photos)):
        (photos / f"{number}{path.suffix}").symlink_to(path.resolve())
    source = SharpPhotos(root=photos)
    config = prepare.PrepareConfig(
        out=folder / "store", crop_px=None, format="lmdb", codec="raw", pairs_per_shard=1024
    )
    prepare.run(source, source.pairs(), config)
    return PairStore(folder / "store")


def _rows(store: PairStore, blur: BlurSection, rounds: int) -> Rows:
    plan = plan_for(DataSection(train=(StoreSection(path=store.root, blur=blur),)), seed=0)
    numbers = np.arange(_NUM_PATCHES)
    name, has_peer = f"{blur.kinds[0]} on the fly, 256²", blur.kinds != ("varying",)
    rates, ratios = [], []
    for turn in range(rounds + 1):
        ours = _seconds(lambda: read_patches(plan, [store], numbers, _PATCH_PX))
        peer = (
            _seconds(lambda: [_peer(store, blur, number) for number in numbers.tolist()]) if has_peer else 0
        )
        if turn:  # the first one warms up
            rates.append(_NUM_PATCHES / ours)
            ratios.append(peer / ours)
    rows = {f"{name}, a core": row(statistics.median(rates), "patches/s")}
    if has_peer:
        rows[f"{name}, against NumPy and OpenCV"] = row(statistics.median(ratios), "×")
    return rows


def _peer(store: PairStore, blur: BlurSection, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = sample_rng(0, number)
    drawn = draw_degradation(rng, **blur.ranges())
    kernel = _KERNELS.get(drawn.kind, shake_kernel)(rng, drawn.size_px)
    reach, index = kernel.shape[0] // 2, int(rng.integers(len(store)))
    height, width = store.size(index)
    side = _PATCH_PX + 2 * reach
    box = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side, side
    (sharp,) = store.windows(index, box)
    linear = (sharp.astype(np.float32) / 255) ** GAMMA
    linear[sharp.min(axis=2) >= 254] *= drawn.highlight_gain
    blurred = cv2.filter2D(linear, -1, kernel[::-1, ::-1].copy())
    sigma = np.sqrt(np.maximum(blurred, 0) * drawn.shot_noise + drawn.read_noise**2)
    blurred += sigma * rng.standard_normal(blurred.shape, np.float32)
    encoded = np.rint(np.clip(blurred, 0, 1) ** (1 / GAMMA) * 255).astype(np.uint8)
    inner = slice(reach, reach + _PATCH_PX)
    return encoded[inner, inner], sharp[inner, inner]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
