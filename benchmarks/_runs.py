"""`nafnet train` as a user starts it: its command line, its journal, its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from pipelines.tracking import Row, read_rows  # noqa: E402

_POLL_S = 0.2
_WORKER_TITLE = "RayTrainWorker"  # what Ray calls the processes of a training group


class TrainRun:
    """A running `nafnet train` of a recipe, in a workspace of its own below `folder`."""

    def __init__(self, folder: Path, name: str, recipe: str, store: Path, overrides: Sequence[str]) -> None:
        workspace = folder / "workspace"
        self.run_dir = workspace / "runs" / name
        self._journal = self.run_dir / "metrics.jsonl"
        self._log = folder / f"{name}.log"
        command = [sys.executable, "-m", "pipelines", "train", "--config", recipe, "--data", str(store)]
        command += ["--name", name, "--workspace", str(workspace), "--json"]
        for override in overrides:
            command += ["--set", override]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        self.started_at = time.time()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)

    def rows(self) -> list[Row]:
        """The journal so far."""
        return read_rows(self._journal)

    def wait_for(self, reached: Callable[[list[Row]], bool], *, limit_s: float) -> list[Row]:
        """The journal, once `reached` says so of it."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            rows = self.rows()
            if reached(rows):
                return rows
            if self._process.poll() is not None:
                raise SystemExit(f"nafnet train ended early with {self._process.returncode}: {self._said()}")
            time.sleep(_POLL_S)
        self.stop()
        raise SystemExit(f"nafnet train took longer than {limit_s:g} s: {self._said()}")

    def workers(self) -> list[psutil.Process]:
        """The training processes."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        return [process for process in family if _WORKER_TITLE in " ".join(process.cmdline())]

    def result(self, *, limit_s: float) -> dict[str, Any]:
        """What it prints at its end."""
        told, _ = self._process.communicate(timeout=limit_s)
        if self._process.returncode:
            raise SystemExit(f"nafnet train ended with {self._process.returncode}: {self._said()}")
        return json.loads(told)

    def stop(self) -> None:
        """As Ctrl-C does; returns when it is gone."""
        self._process.send_signal(signal.SIGINT)
        self._process.communicate()

    def _said(self) -> str:
        return self._log.read_text()[-500:]


def steps(rows: Sequence[Row]) -> list[Row]:
    """Rows of training steps, of which each has the rate since the one before."""
    return [row for row in rows if "train/samples_per_s" in row.metrics]


def since_resumed(rows: Sequence[Row]) -> list[Row]:
    """The journal of the last attempt, if it is not the first."""
    starts = [number for number, row in enumerate(rows) if row.event == "resumed"]
    return list(rows[starts[-1] :]) if starts else []


def first_step_at(rows: Sequence[Row], batch: int) -> float:
    """Time at which the first step of a run was done, as its first row implies."""
    begin = next(row for row in rows if row.event in ("started", "resumed"))
    row = steps(rows)[0]
    return row.time_s - (row.samples - begin.samples - batch) / row.metrics["train/samples_per_s"]


def torchrun(script: str, arguments: Sequence[str]) -> dict[str, float]:
    """Run a script beside this file in two processes of one thread, and return what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(Path(__file__).parent / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{script} ended with {done.returncode}: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])
