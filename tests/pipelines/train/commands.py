"""`nafnet train` as a user runs it, in a process of its own whose Ray workers can be found and killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pipelines.train.files import METRICS

ROOT = Path(__file__).resolve().parents[3]
RECIPE = """
model: {width: 8, enc_blk_nums: [1, 1], middle_blk_num: 1, dec_blk_nums: [1, 1]}
budget: {samples: 4800}
stages: [{share: 0.5, patch_px: 16, batch: 8}, {share: 0.5, patch_px: 32, batch: 8}]
optim: {lr: 2.0e-3, weight_decay: 0, clip_norm: 1.0, ema_decay: 0.98, residual_scale: 0.2}
loss: {l1: 1.0}
checkpoint: {every_minutes: 0.02}
tracking: {log_every_s: 0.1}
scaling: {num_workers: 2, threads_per_worker: 1}
validation: {times: 2, max_images: 3}
"""


class Training:
    """One `nafnet train` in a workspace of its own."""

    def __init__(self, root: Path, store: Path, *options: object) -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / "recipe.yaml").write_text(RECIPE)
        self.workspace = root / "workspace"
        self.run_dir = self.workspace / "runs" / "run"
        arguments = ["train", "--config", root / "recipe.yaml", "--data", store, "--name", "run", *options]
        self._command = [sys.executable, "-m", "pipelines", *map(str, arguments)]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "NAFNET_WORKSPACE": str(self.workspace)}
        self._errors = root / "stderr.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._errors.open("wb") as file:
            self.process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def finish(self, code: int = 0, timeout_s: float = 500) -> str:
        """Wait for the end; returns what was printed."""
        assert self.process is not None
        try:
            self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        # In soft-wrapped lines, as a terminal shows them.
        printed = self._errors.read_text()
        assert self.process.returncode == code, printed
        return printed

    def run(self, code: int = 0) -> str:
        self.start()
        return self.finish(code)

    def rows(self) -> list[dict[str, Any]]:
        journal = self.run_dir / METRICS
        if not journal.exists():
            return []
        lines = journal.read_text().split("\n")[:-1]  # the last may be half a line
        return [json.loads(line) for line in lines]

    def seen(self) -> int:
        """Samples in the journal."""
        return max((row["samples"] for row in self.rows()), default=0)

    def wait_for(self, what: Callable[[], object], timeout_s: float = 240) -> None:
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, self._errors.read_text()
            assert time.monotonic() < deadline, self._errors.read_text()
            time.sleep(0.05)

    def workers(self) -> dict[int, psutil.Process]:
        """Process of each rank, from the newest line that the rank wrote when it began."""
        found = {}
        for log in (self.run_dir / "logs").glob("rank*.log"):
            begun = re.findall(r"rank (\d+) of \d+ begins, process (\d+)", log.read_text())
            if begun and psutil.pid_exists(int(begun[-1][1])):
                found[int(begun[-1][0])] = psutil.Process(int(begun[-1][1]))
        return found

    def readers(self) -> list[psutil.Process]:
        """Ray Data's processes that read for the workers."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                if "MapWorker" in "".join(process.info["cmdline"] or ()) and process.environ().get(
                    "NAFNET_WORKSPACE"
                ) == str(self.workspace):
                    found.append(process)
        return found

    def signal_rank(self, rank: int, number: int) -> None:
        self.workers()[rank].send_signal(number)


@contextlib.contextmanager
def small_disk(place: Path, size_mib: int) -> Iterator[None]:
    """A file system of its own at `place`, which is soon full."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def num_nodes(address: str) -> int:
    """Nodes of a cluster that are alive."""
    code = (
        f"import ray; ray.init({address!r}, log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return int(done.stdout.strip() or 0)
