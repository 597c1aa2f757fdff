"""Groups of processes on nodes of this machine, and what they measured: see `_scale_worker.py`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _nodes as nodes
from benchmarks._scale_worker import QUIET, Job

_ROOT = Path(__file__).resolve().parent.parent
_LEAST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a group tells."""

    samples: dict[str, list[tuple[float, float, float]]]
    """By way and round: seconds, part of the cores that other processes took meanwhile, processor time."""
    gradient_bytes: int

    def seconds(self, way: str) -> float:
        """Median of the rounds in which others left the machine alone, or of the three nearest to that."""
        return statistics.median(seconds for seconds, _, _ in self._quiet(way))

    def others(self, way: str) -> float:
        """What others took of the cores in these rounds."""
        return statistics.median(share for _, share, _ in self._quiet(way))

    def processor_s(self, way: str) -> float:
        """Processor time of a worker: what steps that wait for nothing take where nobody else is at work."""
        return statistics.median(own_s for _, _, own_s in self._quiet(way))

    def _quiet(self, way: str) -> list[tuple[float, float, float]]:
        quietest = sorted(self.samples[way], key=lambda sample: sample[1])
        num_quiet = sum(share <= QUIET for _, share, _ in quietest)
        return quietest[: max(_LEAST_ROUNDS, num_quiet)]


def measure(num_workers: int, job: Job, *, limited: bool) -> Measured:
    """Have so many processes do `job`, each on a node of its own, of limited bandwidth or over loopback."""
    made = nodes.limited_nodes(num_workers) if limited else contextlib.nullcontext(None)
    with made as found:
        places, port = found or nodes.local_nodes(num_workers), _free_port()
        workers = [
            subprocess.Popen(
                [*place.prefix, sys.executable, str(Path(__file__).parent / "_scale_worker.py")],
                env={
                    **os.environ,
                    "PYTHONPATH": str(_ROOT),
                    "OMP_NUM_THREADS": "1",
                    "RANK": str(rank),
                    "WORLD_SIZE": str(num_workers),
                    "MASTER_ADDR": places[0].address,
                    "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": nodes.INTERFACE if limited else "lo",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, place in enumerate(places)
        ]
        try:
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write(job.dumped())
                worker.stdin.close()
            assert workers[0].stdout is not None
            told = workers[0].stdout.read()
            codes = [worker.wait() for worker in workers]
            if any(codes):
                raise SystemExit(f"workers of the benchmark ended with {codes}")
        finally:
            for worker in workers:
                worker.kill()
    content = json.loads(told.splitlines()[-1])
    return Measured(
        samples={way: [(a, b, c) for a, b, c in rows] for way, rows in content["samples"].items()},
        gradient_bytes=content["gradient_bytes"],
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
