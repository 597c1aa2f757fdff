"""`nafnet registry promote` with both reports at hand: the whole command, and what each part of it takes.

    python benchmarks/registry.py

Two versions of the size of `mobile` take turns as champion, on a SQLite registry with some history. Each
round is a process of its own, as a command is. The timing of the two models against each other is told apart:
how long it takes is a matter of the models. The peer is what a script would do with MLflow alone: import it
and set the alias, with no gate, no history and no care for others.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage import data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._rows import Rows, row, show  # noqa: E402
from nafnet_core import PRESETS, NAFNet, save_model  # noqa: E402
from pipelines import prepare, registry  # noqa: E402
from pipelines.models import REGISTERED_NAME  # noqa: E402
from pipelines.png import encode_png  # noqa: E402
from pipelines.registry.connection import asking  # noqa: E402
from pipelines.registry.moves import carry_out  # noqa: E402
from pipelines.registry.versions import CHAMPION  # noqa: E402
from pipelines.sources import find_source  # noqa: E402
from pipelines.workspace import Workspace  # noqa: E402

_ROOT = Path(__file__).resolve().parent.parent
_NUM_PAIRS, _SIDE_PX = 6, 256
_LIMIT_S, _REACH_S = 5.0, 2.0
_PARTS = ("reading the history", "opening both models", "finding both reports", "moving")
# The command itself, with a clock around its imports and its parts.
_COMMAND = """
import json, sys, time
begin = time.perf_counter()
from pipelines.cli import main
import mlflow, torch
from pipelines import registry
from pipelines.registry import connection, promotion
parts = {"imports": time.perf_counter() - begin}

def timed(name, module, label):
    original = getattr(module, name)
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            parts[label] = parts.get(label, 0) + time.perf_counter() - start
    setattr(module, name, call)

timed("mlflow_client", connection, "connecting")
timed("settle", promotion, "reading the history")
timed("open_model", promotion, "opening both models")
timed("report_of", promotion, "finding both reports")
timed("latency_ratio", promotion, "timing")
timed("carry_out", promotion, "moving")
path = sys.argv.pop(1)
try:
    main()
finally:
    parts["command"] = time.perf_counter() - begin
    with open(path, "w") as file:
        json.dump(parts, file)
"""
_BARE = """
import sys, mlflow
client = mlflow.MlflowClient(tracking_uri=sys.argv[1])
client.set_registered_model_alias("nafnet-deblur", "champion", sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--moves", type=int, default=50, help="in the history before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workspace, store = _prepared(folder, options.moves)
        rounds = [_round(workspace, store, 1 + number % 2) for number in range(options.rounds + 1)][1:]
    show(_rows(rounds, options.moves), as_json=options.json, versions=_versions())


def _rows(rounds: list[dict[str, float]], num_moves: int) -> Rows:
    median = {name: statistics.median(part.get(name, 0.0) for part in rounds) for name in rounds[0]}
    apart = statistics.median(part["process"] - part["timing"] for part in rounds)
    name = f"registry promote, {num_moves} moves before"
    work_s = statistics.median(
        part["command"] - part["imports"] - part["connecting"] - part["timing"] for part in rounds
    )
    rows = {
        f"{name}: the whole process, timing of the models apart": row(apart, "s", at_most=_LIMIT_S),
        f"{name}: the work itself, without imports": row(work_s, "s", at_most=_REACH_S),
    }
    for part in _PARTS:
        rows[f"  {part}"] = row(median[part], "s")
    rows["  connecting, which imports MLflow's SQL store"] = row(median["connecting"], "s")
    rows["  importing MLflow, torch and ours"] = row(median["imports"], "s")
    rows["  timing the two models, on one thread"] = row(median["timing"], "s")
    rows["MLflow alone, a script that sets the alias: the whole process"] = row(median["bare"], "s")
    return rows


def _round(workspace: Workspace, store: Path, number: int) -> dict[str, float]:
    """One promotion and one bare move of the alias to where it is, each in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "NAFNET_WORKSPACE": str(workspace.root)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    parts_file = workspace.root / "parts.json"
    command = ["registry", "promote", str(number), "--on", str(store), "--force", "--reason", "benchmark"]
    begin = time.perf_counter()
    _run([sys.executable, "-c", _COMMAND, str(parts_file), *command], environment)
    process_s = time.perf_counter() - begin
    begin = time.perf_counter()
    _run([sys.executable, "-c", _BARE, f"sqlite:///{workspace.database}", str(number)], environment)
    bare_s = time.perf_counter() - begin
    assert registry.champion(workspace) == number
    return {**json.loads(parts_file.read_text()), "process": process_s, "bare": bare_s}


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def _prepared(folder: Path, num_moves: int) -> tuple[Workspace, Path]:
    """Two versions with their reports, and a history of moves between them."""
    for number in range(_NUM_PAIRS):
        photo = (data.astronaut, data.chelsea, data.coffee)[number % 3]()
        sharp = np.ascontiguousarray(photo[:_SIDE_PX, 20 * number : 20 * number + _SIDE_PX])
        for side, image in (("blur", cv2.GaussianBlur(sharp, (5, 5), 0)), ("sharp", sharp)):
            path = folder / "pairs" / side / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(image))
    source, store = find_source(folder / "pairs", split="test"), folder / "store"
    prepare.run(
        source, source.pairs(), prepare.PrepareConfig(out=store, crop_px=None, split="test", use_ray=False)
    )
    workspace = Workspace(folder / "workspace").make()
    for number in (1, 2):
        torch.manual_seed(number)
        path = folder / f"{number}.safetensors"
        save_model(NAFNet(PRESETS["mobile"]), path, metadata={"train_patch_px": 64})
        registry.register(str(path), workspace, on=store)
    with asking(workspace) as client:
        for number in range(num_moves):
            before, to = (None if number == 0 else 2 - number % 2), 1 + number % 2
            carry_out(
                client,
                workspace,
                {"action": "force", "from": before, "to": to, "reason": "history"},
                obstacle=lambda: None,
                commit=lambda to=to: client.set_registered_model_alias(REGISTERED_NAME, CHAMPION, str(to)),
            )
    return workspace, store


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("mlflow", "torch", "SQLAlchemy")}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
