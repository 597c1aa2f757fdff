"""`nafnet tune`: ASHA against all trials at full length, a trial's start, a driver that is killed, scale.

    NAFNET_DATA=~/data python benchmarks/tune.py                    # half an hour; ~/data/sharp/bsds500
    NAFNET_DATA=~/data python benchmarks/tune.py --quick            # shorter trials, fewer of the dry ones
    NAFNET_DATA=~/data python benchmarks/tune.py --only starts dry  # of search, starts, kills, dry

Two cores, trials of one worker. `search` runs the same 16 configurations of `search_mobile` twice. `starts`
counts from a trial's beginning to its worker's first line, against Ray's own TorchTrainer with an empty
training function, in turns on one warm Ray. `dry` is Ray Tune with the project's queue, scheduler and ledger,
and trials that report made-up scores at once: what a search costs beside training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _stores as stores  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from cluster.connect import connect  # noqa: E402
from pipelines import tune  # noqa: E402
from pipelines.config import load_search  # noqa: E402
from pipelines.tune.ledger import TrialLedger  # noqa: E402
from pipelines.tune.space import Space  # noqa: E402
from pipelines.workspace import Workspace  # noqa: E402

_PARTS = ("search", "starts", "kills", "dry")
_ROOT = Path(__file__).resolve().parent.parent
_SAMPLES, _QUICK_SAMPLES, _NUM_KILLS = 3200, 800, 5
# What is asked.
_LOSS_LIMIT_DB, _SHARE_LIMIT, _START_LIMIT = 0.05, 0.40, 1.2
_GPUS, _DRY_TRIALS, _QUICK_DRY_TRIALS = 64, 1000, 100
_KILL_LIMIT_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder to make the stores in, or that has them already")
    parser.add_argument("--samples", type=int, default=_SAMPLES, help="budget of a trial, for `search`")
    parser.add_argument("--rounds", type=int, default=4, help="of `starts`")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the samples, a tenth of the dry trials"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    samples = _QUICK_SAMPLES if options.quick else options.samples
    # Ray's remarks, which it prints, would stand among the results.
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder, place = options.data or Path(temporary), Path(temporary)
        if set(options.only) - {"dry"}:
            stores.make_training_stores(folder)
        rows: Rows = {}
        if "search" in options.only:
            rows |= search_rows(place, folder, samples)
        if "starts" in options.only:
            rows |= start_rows(place, folder, options.rounds)
        if "kills" in options.only:
            rows |= kill_rows(place, folder)
        if "dry" in options.only:
            rows |= dry_rows(place, _QUICK_DRY_TRIALS if options.quick else _DRY_TRIALS)
    import ray

    show(rows, as_json=options.json, versions={"torch": torch.__version__, "Ray": ray.__version__})


def search_rows(place: Path, folder: Path, samples: int) -> Rows:
    """The same configurations by ASHA, and all at full length, whose scores say which was the best."""
    found = {
        scheduler: _search(
            place, folder, f"search-{scheduler}", f"budget.samples={samples}",
            f"search.scheduler={scheduler}", "validation={times: 1, max_images: 12}",
        )
        for scheduler in ("none", "asha")
    }  # fmt: skip
    whole, asha = found["none"], found["asha"]
    scores = {trial["number"]: trial["val_psnr_db"] for trial in whole["trials"]}
    assert [t["point"] for t in whole["trials"]] == [t["point"] for t in asha["trials"]]
    best, chosen = max(scores.values()), scores[asha["best"]]
    shape = f"{len(scores)} configurations of `mobile`, {samples} samples each"
    return {
        f"{shape}: best PSNR at full length": row(best, "dB"),
        f"{shape}: worst": row(min(scores.values()), "dB"),
        f"{shape}: of ASHA's choice": row(chosen, "dB"),
        "ASHA's choice below the best": row(best - chosen, "dB", at_most=_LOSS_LIMIT_DB),
        "ASHA's own best score below the best": row(best - asha["val_psnr_db"], "dB", at_most=_LOSS_LIMIT_DB),
        "ASHA's samples of all at full length": row(
            asha["samples"] / whole["samples"], "", at_most=_SHARE_LIMIT
        ),
        "ASHA's time of that of all at full length": row(asha["seconds"] / whole["seconds"], ""),
    }


def start_rows(place: Path, folder: Path, rounds: int) -> Rows:
    """Seconds from the beginning of a trial to its worker, the actor being warm; against Ray's own."""
    ours, bare = [], []
    workspace = Workspace(place / "starts")
    with connect():
        for number in range(rounds):
            name = f"start-{number}"
            settings = load_search(
                "search_mobile",
                ["budget.samples=64", "search={trials: 3, scheduler: none, max_concurrent: 1, "
                 "register_winner: false, space: {optim.lr: {loguniform: [1.0e-3, 1.0e-2]}}}",
                 "validation={times: 1, max_images: 1}"],
                name=name, train=[folder / "train"], val=folder / "val",
            )  # fmt: skip
            tune.run(settings, workspace)
            ours += _starts(workspace, name)[1:]  # the first one's actor is cold
            bare += [_bare_start(place / f"bare-{number}-{turn}") for turn in range(2)]
    return {
        "from a trial's beginning to its worker": row(statistics.median(ours), "s"),
        "from TorchTrainer.fit() to its worker": row(statistics.median(bare), "s"),
        "a trial's start against TorchTrainer's": row(
            statistics.median(ours) / statistics.median(bare), "×", at_most=_START_LIMIT
        ),
    }


def kill_rows(place: Path, folder: Path) -> Rows:
    """A search whose driver is killed after every few scores."""
    workspace = place / "kills"
    command = _command(folder, workspace, "kills", "budget.samples=1600", "search.trials=6")
    run_dirs = workspace / "runs"
    for _ in range(_NUM_KILLS):
        process = subprocess.Popen(
            command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before, end = _num_scores(run_dirs), time.monotonic() + _KILL_LIMIT_S
        while _num_scores(run_dirs) < before + 2 and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None, "the search ended before it could be killed so often"
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = json.loads(subprocess.run(command, env=_environment(), check=True, capture_output=True).stdout)
    again = 0
    for trial in done["trials"]:
        journal = (run_dirs / f"kills-{trial['number']:04d}" / "metrics.jsonl").read_text()
        again += journal.count('"event": "started"') - 1
    lost = sum(trial["state"] not in ("finished", "stopped") for trial in done["trials"])
    return {
        f"driver killed {_NUM_KILLS} times: trials lost": row(lost, "", at_most=0),
        f"driver killed {_NUM_KILLS} times: trials run again from the start": row(again, "", at_most=0),
    }


def dry_rows(place: Path, num_trials: int) -> Rows:
    """A large search without training: the real queue, scheduler and ledger, on GPUs that are none."""
    import ray

    from pipelines.tune.queue import TrialQueue
    from pipelines.tune.schedulers import scheduler_of, steps_of_budget
    from pipelines.tune.tuner import tuned

    settings = load_search("search_mobile", [f"search.trials={num_trials}"])
    folder = place / "dry"
    folder.mkdir()
    space, ledger = Space(settings), TrialLedger(folder / "trials.jsonl")
    steps = steps_of_budget(settings.search)
    queue = TrialQueue(
        settings, space, ledger,
        begin=lambda trial: {"number": trial.number, "steps": steps}, capacity=lambda: _GPUS,
    )  # fmt: skip
    ray.init(num_cpus=_GPUS, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        begin = time.perf_counter()
        tuned(
            _stub(), queue,
            scheduler_of(settings.search, ledger, lambda number: None), folder,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
    finally:
        ray.shutdown()
    assert len(ledger.ended("finished", "stopped")) == num_trials
    begin = time.perf_counter()
    again = TrialLedger(folder / "trials.jsonl")
    scheduler_of(settings.search, again, lambda number: None)
    restored_s = time.perf_counter() - begin
    assert again.trials == ledger.trials
    shape = f"{num_trials} dry trials, {_GPUS} at a time"
    return {
        f"{shape}: all of them": row(seconds, "s"),
        f"{shape}: overhead a trial": row(1000 * seconds / num_trials, "ms"),
        f"{shape}: the ledger": row((folder / "trials.jsonl").stat().st_size / 1024, "KiB"),
        f"{shape}: to restore ledger and rungs": row(1000 * restored_s, "ms"),
    }


def _stub() -> Any:
    """A trial that trains nothing: its score is a draw, and a bit more at each rung."""
    from ray import tune as ray_tune

    class Stub(ray_tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.told, self.rung = config, 0

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            number, step = self.told["number"], 4**self.rung
            self.rung += 1
            if step > self.told["steps"]:
                return {"trial_number": number, "state": "finished", "error": None, "done": True}
            psnr_db = random.Random(number).gauss(25, 1) + step / 100
            return {"trial_number": number, "samples": step, "step": step, "psnr_db": psnr_db}

    return Stub


def _search(place: Path, folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """A whole `nafnet tune`, what it printed, and its seconds."""
    begin = time.perf_counter()
    command = _command(folder, place / "workspace", name, *overrides)
    done = subprocess.run(command, env=_environment(), check=True, stdout=subprocess.PIPE)
    result = json.loads(done.stdout)
    for trial in result["trials"]:
        trial["val_psnr_db"] = trial["psnr_db"]
    return {**result, "seconds": time.perf_counter() - begin}


def _command(folder: Path, workspace: Path, name: str, *overrides: str) -> list[str]:
    command = [sys.executable, "-m", "pipelines", "tune", "--config", "search_mobile", "--json"]
    command += ["--data", str(folder / "train"), "--val", str(folder / "val"), "--name", name]
    command += ["--workspace", str(workspace), "--set", "search.register_winner=false"]
    return command + [part for override in overrides for part in ("--set", override)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT)}


def _num_scores(runs: Path) -> int:
    path = runs / "kills" / "trials.jsonl"
    return path.read_text().count('"event": "score"') if path.exists() else 0


def _starts(workspace: Workspace, name: str) -> list[float]:
    """Seconds from each trial's line in the ledger to its worker's first line in its log."""
    begun = {}
    for line in (workspace.run_dir(name) / "trials.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "begin":
            begun[event["trial"]] = event["time"]
    found = []
    for number, begin in begun.items():
        log = (workspace.run_dir(f"{name}-{number:04d}") / "logs" / "rank0.log").read_text()
        first = re.search(r"^(\S+ \S+) INFO .* begins, process", log, re.MULTILINE)
        assert first is not None
        found.append(datetime.strptime(first[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() - begin)
    return found


def _bare_start(place: Path) -> float:
    """Ray's own trainer with one worker that does nothing but say when it began."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    place.mkdir(parents=True)
    begin = time.time()
    TorchTrainer(
        _say_when,
        train_loop_config={"file": str(place / "began")},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.95}),
        run_config=ray.train.RunConfig(storage_path=str(place), name="bare"),
    ).fit()
    return float((place / "began").read_text()) - begin


def _say_when(config: dict[str, str]) -> None:
    Path(config["file"]).write_text(str(time.time()))


if __name__ == "__main__":
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    main()
