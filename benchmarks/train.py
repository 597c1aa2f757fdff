"""`nafnet train` against its own steps without Ray, and against a plain PyTorch trainer: speed, stops, PSNR.

    NAFNET_DATA=~/data python benchmarks/train.py        # photos in ~/data/sharp/bsds500; half an hour
    NAFNET_DATA=~/data python benchmarks/train.py --quick            # all rows, PSNR after one minute
    NAFNET_DATA=~/data python benchmarks/train.py --only rates stops # of rates, stops, psnr
    NAFNET_DATA=~/data python benchmarks/train.py --only rates --seconds 60 --config gopro_width32 \\
        --set 'stages=[{patch_px: 256, batch: 4}]' --set precision=bf16 --set 'scaling={num_workers: 2}'

Two workers of one thread, and two processes of one thread for each peer. Photos are blurred once; all train
on the same crops, and are scored on whole other photos by the project's protocol. The plain trainer is
`_plain_trainer.py`: an NCHW fp32 eager network, PNG-LMDB DataLoader, torchrun, the paper's recipe. Minutes
are of training: no start-up, no validation, on either side.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _runs as runs  # noqa: E402
from benchmarks import _stores as stores  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from nafnet_core import NAFNet, save_model  # noqa: E402
from pipelines import evaluate  # noqa: E402
from pipelines.config import RunConfig, load_config  # noqa: E402
from pipelines.models import open_model  # noqa: E402
from pipelines.store import PairStore  # noqa: E402
from pipelines.train.trainer import build_model  # noqa: E402
from pipelines.workspace import Workspace  # noqa: E402

_PARTS = ("rates", "stops", "psnr")
_WITHOUT_LIMIT = "budget={samples: 1000000000}"
_WITHOUT_VALIDATION = "validation.times=0"
_EVERY_STEP = "tracking.log_every_s=0.001"
_START_LIMIT_S = 240.0
# What is asked; floors of two quiet cores.
_BARE_FLOOR, _PLAIN_FLOOR, _WAIT_LIMIT, _STOP_LIMIT, _FIRST_STEP_LIMIT_S = 0.93, 2.0, 0.03, 0.02, 25.0
_GAIN_FLOOR_DB = 0.1
# Of the first seconds Ray's own actors still start.
_SETTLING_S = 5.0
_STOPS_S, _CHECKPOINT_EVERY_S, _STATED_EVERY_S, _WINDOW_STEPS = 45.0, 6.0, 120.0, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="mobile", help="recipe of `nafnet train`")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="override of the recipe")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for the PSNR rows")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one measurement of speed")
    parser.add_argument("--rounds", type=int, default=3, help="of the measurements of speed")
    parser.add_argument("--seed", type=int, default=0, help="of the PSNR rows' trainings")
    parser.add_argument("--data", type=Path, help="folder to make the stores in, or that has them already")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--quick", action="store_true", help="one minute, one round of speed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    minutes, rounds = (1.0, 1) if options.quick else (options.minutes, options.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        folder, place = options.data or Path(temporary), Path(temporary)
        stores.make_training_stores(folder)
        recipe = Recipe(options.config, tuple(options.overrides))
        config = load_config(recipe.name, recipe.overrides, train=[folder / "train"])
        peer = _Plain(folder, config)
        rows: Rows = {}
        if "rates" in options.only:
            rows |= rate_rows(place, folder / "train", config, recipe, peer, options.seconds, rounds)
        if "stops" in options.only:
            rows |= stop_rows(place, folder / "train", config, recipe, _STOPS_S)
        if "psnr" in options.only:
            rows |= psnr_rows(place, folder, config, recipe, peer, minutes, options.seed)
    show(rows, as_json=options.json, versions={"torch": torch.__version__})


@dataclass(frozen=True)
class Recipe:
    """What of `nafnet train` is measured."""

    name: str
    overrides: tuple[str, ...]


class _Plain:
    """The plain trainer with as many loading processes as suit it best."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        stage = config.stages[0]
        num_pairs = len(PairStore(folder / "train"))
        self._arguments = ["--lmdbs", str(folder / "basicsr"), "--pairs", str(num_pairs)]
        self._arguments += ["--patch", str(stage.patch_px), "--batch", str(stage.batch)]
        self._arguments += ["--preset", str(config.model.preset)]
        self._num_loaders: int | None = None

    def run(self, seconds: float, *extra: str) -> dict[str, float]:
        if self._num_loaders is None:
            tried = {number: self._run(seconds / 2, number)["samples_per_s"] for number in (0, 1)}
            self._num_loaders = max(tried, key=tried.__getitem__)
        return self._run(seconds, self._num_loaders, *extra)

    def _run(self, seconds: float, num_loaders: int, *extra: str) -> dict[str, float]:
        how = ["--seconds", str(seconds), "--loaders", str(num_loaders)]
        return runs.torchrun("_plain_trainer.py", [*self._arguments, *how, *extra])


def rate_rows(
    place: Path,
    store: Path,
    config: RunConfig,
    recipe: Recipe,
    peer: _Plain,
    seconds: float,
    rounds: int,
) -> Rows:
    """Samples a second of all three in turns, and what ours waits for data."""
    stage = config.stages[0]
    ours, bare, plain, waits, firsts = [], [], [], [], []
    for number in range(rounds):
        overrides = [*recipe.overrides, _WITHOUT_LIMIT, _WITHOUT_VALIDATION]
        run = runs.TrainRun(place, f"rate-{number}", recipe.name, store, overrides)
        journal = run.wait_for(lambda rows: _span_s(rows) > seconds + _SETTLING_S, limit_s=_limit_s(seconds))
        run.stop()
        ours.append(_rate(journal))
        waits.append(statistics.fmean(row.metrics["train/data_wait"] for row in _settled(journal)[1:]))
        firsts.append(runs.first_step_at(journal, stage.batch) - run.started_at)
        arguments = ["--store", str(store), "--seconds", str(seconds), "--config", recipe.name]
        arguments += [part for override in recipe.overrides for part in ("--set", override)]
        bare.append(runs.torchrun("_bare_loop.py", arguments)["samples_per_s"])
        plain.append(peer.run(seconds)["samples_per_s"])
    shape = f"{config.model.preset}, patch {stage.patch_px}, batch {stage.batch}"
    return {
        f"nafnet train, 2 workers, {shape}, {config.precision}": row(statistics.median(ours), "samples/s"),
        "the same steps without Ray, batches in memory": row(statistics.median(bare), "samples/s"),
        f"plain trainer, 2 processes, {shape}, fp32": row(statistics.median(plain), "samples/s"),
        "nafnet train, share of the steps without Ray": row(_ratio(ours, bare), "", at_least=_BARE_FLOOR),
        "nafnet train against the plain trainer": row(_ratio(ours, plain), "×", at_least=_PLAIN_FLOOR),
        "data-wait, share of the time": row(statistics.median(waits), "", at_most=_WAIT_LIMIT),
        "from command to first optimiser step, budget in samples": row(
            statistics.median(firsts), "s", at_most=_FIRST_STEP_LIMIT_S
        ),
    }


def stop_rows(place: Path, store: Path, config: RunConfig, recipe: Recipe, seconds: float) -> Rows:
    """What a checkpoint costs, and a lost worker, in a run that writes many and logs every step."""
    overrides = [*recipe.overrides, _WITHOUT_LIMIT, _WITHOUT_VALIDATION, _EVERY_STEP]
    overrides += [f"checkpoint={{every_minutes: {_CHECKPOINT_EVERY_S / 60}, keep: 1000}}"]
    run = runs.TrainRun(place, "stops", recipe.name, store, overrides)
    journal = run.wait_for(lambda rows: _span_s(rows) > seconds, limit_s=_limit_s(seconds))
    saved = {int(path.name) for path in (run.run_dir / "checkpoints").iterdir() if path.name.isdigit()}
    batch, after, others = config.stages[0].batch, [], []
    times = {row.samples: row.time_s for row in _settled(journal)}
    for samples, begin in times.items():
        end = times.get(samples + _WINDOW_STEPS * batch)
        if end is not None:
            (after if samples in saved else others).append(end - begin)
    assert after, "no checkpoint was written in the measured time"
    stopped_s = max(0.0, statistics.fmean(after) - statistics.fmean(others))
    recovered_s, repeated = _recovery(run, batch)
    run.stop()
    return {
        f"a checkpoint stops training for (mean of {len(after)})": row(stopped_s, "s"),
        "a checkpoint every 2 minutes, share of the time": row(
            stopped_s / _STATED_EVERY_S, "", at_most=_STOP_LIMIT
        ),
        "a training worker killed: until the next optimiser step": row(recovered_s, "s"),
        f"the same, a checkpoint every {_CHECKPOINT_EVERY_S:g} s: samples done again": row(
            repeated, "samples"
        ),
    }


def _recovery(run: runs.TrainRun, batch: int) -> tuple[float, int]:
    """Kill a worker with SIGKILL: seconds until the next optimiser step, and samples done again."""
    run.workers()[-1].kill()
    killed_at = time.time()
    journal = run.wait_for(lambda rows: bool(runs.steps(runs.since_resumed(rows))), limit_s=_START_LIMIT_S)
    resumed = runs.since_resumed(journal)
    before = runs.steps(journal[: len(journal) - len(resumed)])
    return runs.first_step_at(resumed, batch) - killed_at, before[-1].samples - resumed[0].samples


def psnr_rows(
    place: Path,
    folder: Path,
    config: RunConfig,
    recipe: Recipe,
    peer: _Plain,
    minutes: float,
    seed: int,
) -> Rows:
    """Both train for the same time; ours first, for it decides its samples by a short calibration."""
    stage = config.stages[0]
    overrides = [*recipe.overrides, f"budget={{minutes: {minutes}}}", _WITHOUT_VALIDATION, f"seed={seed}"]
    run = runs.TrainRun(place, "psnr", recipe.name, folder / "train", overrides)
    journal = run.wait_for(lambda rows: rows[-1:] != [] and rows[-1].event == "finished", limit_s=1e5)
    result = run.result(limit_s=_START_LIMIT_S)
    trained_s = journal[-1].time_s - next(row.time_s for row in journal if row.event == "started")
    torch_file, peer_file = place / "plain.pth", place / "plain.safetensors"
    plain = peer.run(trained_s, "--out", str(torch_file), "--seed", str(seed))
    network = build_model(config.model)
    network.load_state_dict(torch.load(torch_file, weights_only=True))
    assert isinstance(network, NAFNet)
    save_model(network, peer_file, metadata={"train_patch_px": stage.patch_px})
    pairs = evaluate.Pairs(folder / "val")
    workspace = Workspace.find(place / "workspace").make()
    reports = [
        evaluate.run(open_model(str(file), workspace), pairs, workspace).report
        for file in (result["weights"], peer_file)
    ]
    scored = f"PSNR of {len(pairs)} photos after {trained_s / 60:.1f} minutes"
    # A difference after a shorter time says little of what is asked.
    floor = _GAIN_FLOOR_DB if minutes >= 10 else None
    return {
        f"{scored}: blurred": row(reports[0].psnr_blurred_db, "dB"),
        f"{scored}: nafnet train": row(reports[0].psnr_restored_db, "dB"),
        f"{scored}: plain trainer": row(reports[1].psnr_restored_db, "dB"),
        f"{scored}: over the plain trainer": row(
            reports[0].psnr_restored_db - reports[1].psnr_restored_db, "dB", at_least=floor
        ),
        "samples in that time: nafnet train": row(result["samples"], "samples"),
        "samples in that time: plain trainer": row(plain["samples"], "samples"),
        "from command to first optimiser step, budget in minutes": row(
            runs.first_step_at(journal, stage.batch) - run.started_at, "s"
        ),
    }


def _limit_s(seconds: float) -> float:
    return _START_LIMIT_S + 3 * seconds


def _span_s(rows: Sequence[runs.Row]) -> float:
    steps = runs.steps(rows)
    return steps[-1].time_s - steps[0].time_s if steps else 0.0


def _settled(rows: Sequence[runs.Row]) -> list[runs.Row]:
    steps = runs.steps(rows)
    return [row for row in steps if row.time_s > steps[0].time_s + _SETTLING_S]


def _rate(rows: Sequence[runs.Row]) -> float:
    steps = _settled(rows)
    return (steps[-1].samples - steps[0].samples) / (steps[-1].time_s - steps[0].time_s)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds: a machine's speed drifts between them."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    main()
