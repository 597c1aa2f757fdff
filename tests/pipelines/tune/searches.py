"""Searches for tests: a recipe in few lines, and `nafnet tune` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipelines.config import SearchConfig
from pipelines.config.recipe import load_search
from pipelines.tune.ledger import TrialLedger

ROOT = Path(__file__).resolve().parents[3]
SPACE = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "optim.ema_decay": {"choice": [0.9, 0.98]}}


def content(**search: Any) -> dict[str, Any]:
    """A recipe whose trials take seconds."""
    return {
        "name": "s",
        "model": {"width": 8, "enc_blk_nums": [1, 1], "middle_blk_num": 1, "dec_blk_nums": [1, 1]},
        "budget": {"samples": 256},
        "stages": [{"share": 1.0, "patch_px": 16, "batch": 8}],
        "optim": {"lr": 2e-3, "weight_decay": 0.0, "clip_norm": 1.0, "residual_scale": 0.2},
        "loss": {"l1": 1.0},
        "scaling": {"num_workers": 1, "threads_per_worker": 1},
        "checkpoint": {"every_minutes": 0.02},
        "tracking": {"log_every_s": 0.1},
        "validation": {"times": 3, "max_images": 3},
        "search": {"trials": 3, "space": SPACE, "register_winner": False, **search},
    }


def recipe(path: Path, changes: dict[str, Any] | None = None, **search: Any) -> Path:
    path.write_text(yaml.safe_dump({**content(**search), **(changes or {})}))
    return path


def config(tmp_path: Path, changes: dict[str, Any] | None = None, **search: Any) -> SearchConfig:
    return load_search(recipe(tmp_path / "recipe.yaml", changes, **search))


class Search:
    """One `nafnet tune` in a workspace of its own."""

    def __init__(self, root: Path, recipe: Path, store: Path, *options: object) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.workspace = root / "workspace"
        self.folder = self.workspace / "runs" / "s"
        arguments = ["tune", "--config", recipe, "--data", store, "--val", store, "--json", *options]
        self._command = [sys.executable, "-m", "pipelines", *map(str, arguments)]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "NAFNET_WORKSPACE": str(self.workspace)}
        self._printed, self._errors = root / "stdout.json", root / "stderr.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._errors.open("ab") as errors, self._printed.open("wb") as printed:
            self.process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self.environment,
                stdout=printed,
                stderr=errors,
                start_new_session=True,
            )

    def finish(self, code: int = 0, timeout_s: float = 500) -> dict[str, Any]:
        """Wait for the end; returns the JSON that was printed, or what was said instead."""
        assert self.process is not None
        try:
            self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                self.kill()
        assert self.process.returncode == code, self.said()
        return json.loads(self._printed.read_text()) if code == 0 else {}

    def run(self, code: int = 0) -> dict[str, Any]:
        self.start()
        return self.finish(code)

    def kill(self) -> None:
        """The driver alone, as a machine's out-of-memory killer does it; Ray's own processes find out."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self._errors.read_text()

    def ledger(self) -> TrialLedger:
        """As it is now."""
        return TrialLedger(self.folder / "trials.jsonl")

    def journal(self, number: int) -> list[dict[str, Any]]:
        path = self.workspace / "runs" / f"s-{number:04d}" / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for(self, what: Callable[[], object], timeout_s: float = 240) -> None:
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def processes(self, title: str) -> list[psutil.Process]:
        """Ray's processes of this search whose title holds this."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                if title in "".join(process.info["cmdline"] or ()) and process.environ().get(
                    "NAFNET_WORKSPACE"
                ) == str(self.workspace):
                    found.append(process)
            except psutil.Error:
                continue
        return found
