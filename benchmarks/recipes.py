"""What a training recipe of minutes is worth: variants of one recipe, each with the samples of the same time.

    python benchmarks/recipes.py --list
    python benchmarks/recipes.py "adamw 2e-3, l1" "adamw 4e-3, l1" --data ~/stores --share 0.25
    python benchmarks/recipes.py mobile --data ~/stores --seeds 0 1                # a shipped recipe, in full
    python benchmarks/recipes.py "adamw 4e-3, l1" --set optim.lr=3e-3 --images 25

`--data` holds `train` and `val`, stores of `nafnet prepare`. It is the product's own trainer in one process,
without Ray, on the samples that the plan gives, so its result does not depend on how busy a machine is: the
budget is counted in samples, those of ten minutes on two quiet cores. Appends a line of JSON each to `--log`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nafnet_core.model import NAFNet  # noqa: E402
from pipelines.config import RunConfig, load_config  # noqa: E402
from pipelines.ingest import PatchBatch, Span, plan_for, read_patches  # noqa: E402
from pipelines.store import PairStore  # noqa: E402
from pipelines.train.loop import spans  # noqa: E402
from pipelines.train.trainer import TrainContext, Trainer  # noqa: E402
from pipelines.train.validation import validate  # noqa: E402

# Samples of ten minutes with `_START`: 66 a second on two quiet cores.
_SAMPLES = 40_000
# The paper's recipe (see configs/gopro_width32.yaml), on the small network and in bf16.
_BASE_RECIPE = "gopro_width32"
_START = [
    "model={preset: mobile}",
    "precision=bf16",
    "stages=[{patch_px: 96, batch: 8}]",
    "scaling={num_workers: 2, use_gpu: false}",
    "budget={minutes: 10}",
]
_EMA = ["optim.ema_decay=0.995"]
_ADAMW = [*_EMA, "optim.clip_norm=1.0", "schedule.warmup_share=0.03", "optim.weight_decay=0"]
_PATCH_64 = ["stages=[{patch_px: 64, batch: 8}]"]
_L1 = ["optim.residual_scale=0.1", "loss={l1: 1.0}"]
_ADAMW_L1 = [*_ADAMW, *_L1, "optim.betas=[0.9, 0.99]"]
_ADAMW_4E3 = [*_ADAMW_L1, "optim.lr=4e-3"]
VARIANTS: dict[str, list[str]] = {
    "paper": [],
    "paper, averaged": _EMA,
    "adamw 1e-3": _ADAMW,
    "adamw 2e-3, scales 0.1": [*_ADAMW, "optim.lr=2e-3", "optim.residual_scale=0.1"],
    "adamw 2e-3, l1": [*_ADAMW_L1, "optim.lr=2e-3"],
    "adamw 4e-3, l1": [*_ADAMW_L1, "optim.lr=4e-3"],
    "adamw 8e-3, l1": [*_ADAMW_L1, "optim.lr=8e-3"],
    "adamw 4e-3, l1 and fft": [*_ADAMW_4E3, "loss={l1: 1.0, fft: 0.5}"],
    "adamw 4e-3, charbonnier": [*_ADAMW_4E3, "loss={charbonnier: 1.0}"],
    "adamw 4e-3, l1, betas 0.9 0.9": [*_ADAMW_4E3, "optim.betas=[0.9, 0.9]"],
    "adamw 4e-3, l1, batch 4": [*_ADAMW_4E3, "stages=[{patch_px: 96, batch: 4}]"],
    "adamw 4e-3, l1, patch 64": [*_ADAMW_4E3, *_PATCH_64],
    "adamw 4e-3, l1, patch 128": [*_ADAMW_4E3, "stages=[{patch_px: 128, batch: 4}]"],
    "adamw 4e-3, l1, scales 0.3": [*_ADAMW_4E3, "optim.residual_scale=0.3"],
    "adamw 4e-3, l1, scales 0": [*_ADAMW_4E3, "optim.residual_scale=0"],
    "adamw 4e-3, l1, averaged 0.99": [*_ADAMW_4E3, "optim.ema_decay=0.99"],
    "adamw 4e-3, l1, patch 64, scales 0": [*_ADAMW_4E3, *_PATCH_64, "optim.residual_scale=0"],
    "adamw 4e-3, l1, patch 64, scales 0.03": [*_ADAMW_4E3, *_PATCH_64, "optim.residual_scale=0.03"],
    "adamw 2e-3, l1, patch 64": [*_ADAMW_4E3, *_PATCH_64, "optim.lr=2e-3"],
    "adamw 4e-3, l1, clip 0.01": [*_ADAMW_4E3, "optim.clip_norm=0.01"],
}
# Seconds a sample against `_START`, for (patch, global batch): measured by --rates, see short_recipe.md.
_COSTS = {
    (64, 8): 0.590, (64, 16): 0.448, (64, 32): 0.383,
    (96, 4): 1.218, (96, 8): 1.0, (96, 16): 0.864,
    (128, 4): 1.832, (128, 8): 1.537, (128, 16): 1.673,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("variants", nargs="*", help="of --list, or shipped recipes")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="for all of them")
    parser.add_argument("--data", type=Path, help="folder with the stores train and val")
    parser.add_argument("--share", type=float, default=1.0, help="of the samples of ten minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--images", type=int, default=50, help="of the store val, spread evenly")
    parser.add_argument("--log", type=Path, help="file of JSON lines to append to")
    parser.add_argument("--list", action="store_true", help="print the variants")
    parser.add_argument("--rates", action="store_true", help="measure what samples cost")
    options = parser.parse_args()
    if options.list:
        for name, overrides in VARIANTS.items():
            print(f"{name}: {' '.join(overrides)}")
        return
    if options.rates:
        _print_rates()
        return
    # A process each: two of one thread do half as much again as one of two.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=_use_one_thread) as pool:
        runs = {}
        for seed in options.seeds:
            for name in options.variants:
                config = _config(name, [*options.overrides, f"seed={seed}"], options.data)
                told = {"variant": name, "set": options.overrides, "seed": seed, "share": options.share}
                runs[pool.submit(train, config, options.share, options.images)] = told
        for run in as_completed(runs):
            line = json.dumps(runs[run] | run.result())
            print(line, flush=True)
            if options.log:
                with options.log.open("a") as file:
                    file.write(line + "\n")


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _config(name: str, overrides: Sequence[str], data: Path) -> RunConfig:
    stores: dict[str, Any] = {"train": [data / "train"], "val": data / "val"}
    if name in VARIANTS:
        return load_config(_BASE_RECIPE, [*_START, *VARIANTS[name], *overrides], **stores)
    return load_config(name, overrides, **stores)


def budget(config: RunConfig, share: float) -> int:
    """Samples of the same time, whatever the patch and the batch."""
    seconds_each = 1 / (_SAMPLES / 600)
    cost = sum(stage.share * _COSTS[stage.patch_px, stage.batch] for stage in config.stages) * seconds_each
    return round(share * 600 / cost)


def train(config: RunConfig, share: float, num_images: int) -> dict[str, Any]:
    """Train in this process and score the averaged weights."""
    samples = budget(config, share)
    plan = plan_for(config.data, seed=config.seed)
    stores = [PairStore(store.path) for store in config.data.train]

    def batches(span: Span) -> Iterator[PatchBatch]:
        for number in range(span.num_batches):
            first = span.start + number * span.batch
            yield read_patches(plan, stores, np.arange(first, first + span.batch), span.patch_px)

    with tempfile.TemporaryDirectory() as run_dir:
        trainer = Trainer(config, _context(Path(run_dir), batches))
        start, psnrs = time.perf_counter(), []
        for span in spans(config, samples, 0):
            for batch in batches(span):
                psnrs.append(trainer.step(batch, span.batch, samples).psnr_db)
        seconds = time.perf_counter() - start
    scores = _scores(trainer.weights, config, trainer.train_patch_px, num_images)
    return {
        "gain_db": round(scores["val/gain_db"], 4),
        "psnr_db": round(scores["val/psnr_db"], 4),
        "ssim": round(scores["val/ssim"], 4),
        "train_psnr_db": round(float(torch.stack(psnrs[-500:]).mean()), 3),
        "samples": trainer.samples,
        "steps": trainer.steps,
        "seconds": round(seconds),
    }


def _scores(model: NAFNet, config: RunConfig, patch_px: int, num_images: int) -> dict[str, float]:
    return validate(
        model,
        str(config.data.val),
        train_patch_px=patch_px,
        autocast=False,
        max_images=num_images,
        rank=0,
        world_size=1,
        picture=None,
    )


def _context(run_dir: Path, batches: Any = None) -> TrainContext:
    return TrainContext(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        run_dir=run_dir,
        batches=batches,
        epoch_samples=1,
        store_digests=(),
    )


def _print_rates() -> None:
    """Steps of one worker of two: one thread, half of the batch; in turns, the median of each."""
    torch.set_num_threads(1)
    times: dict[tuple[int, int], list[float]] = {shape: [] for shape in _COSTS}
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = Trainer(load_config(_BASE_RECIPE, [*_START, *_EMA]), _context(Path(run_dir)))
        for turn in range(8):
            for (patch_px, batch), seconds in times.items():
                shape = (batch // 2, patch_px, patch_px, 3)
                noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
                half = PatchBatch(samples=np.arange(batch // 2), lq=noise, gt=255 - noise)
                start = time.perf_counter()
                trainer.step(half, batch // 2, 10**6)
                if turn:
                    seconds.append(time.perf_counter() - start)
    first = np.median(times[96, 8]) / 8
    for (patch_px, batch), seconds in times.items():
        step_s = float(np.median(seconds))
        print(f"{patch_px:4} {batch:3}  {step_s * 1e3:7.1f} ms a step  {step_s / batch / first:.3f}")


if __name__ == "__main__":
    main()
