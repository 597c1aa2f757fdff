"""One process of a group: takes steps in the ways that a list names, in turns, and times each.

Started by `scale.py`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; reads a `Job` as JSON from the
standard input. Rank 0 prints as JSON, of each way and round, seconds from a barrier until the slowest is
done, what part of the cores others took meanwhile, and the most processor time that one of the group had.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from benchmarks import _nodes as nodes  # noqa: E402
from benchmarks._course import bare_context, random_batch  # noqa: E402
from pipelines.config import load_config  # noqa: E402
from pipelines.train.trainer import Trainer  # noqa: E402

_TOTAL_SAMPLES = 10**9
_NUM_WARM_UPS = 2
# Part of the cores that others may take in a sample that counts.
QUIET = 0.05
_LOOK_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to take a step, or a part of it."""

    name: str
    kind: str
    """`alone`: rank 0, others wait. `apart`: all, none knows of another. `ddp`: gradients summed. `no_sync`:
    the same step without summing. `all_reduce`: gradients summed, and nothing else."""
    scaling: dict[str, Any] = field(default_factory=dict)
    """Of `ddp` and `no_sync`: fields of the recipe's section."""
    mbit_s: float | None = None
    mib: float = 0.0
    """Of `all_reduce`; 0 for the whole gradient, of fp32."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a group does."""

    recipe: str
    overrides: list[str]
    patch_px: int
    batch: int
    """Samples of one worker."""
    rounds: int
    ways: list[Way]
    patience_s: float = 240.0
    """Time to wait in all for others to leave the machine alone."""
    pinned: bool = True
    """Whether each process stays on a core of its own."""

    def dumped(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def loaded(text: str) -> Job:
        content = json.loads(text)
        return Job(**{**content, "ways": [Way(**way) for way in content["ways"]]})


def main() -> None:
    job = Job.loaded(sys.stdin.read())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if job.pinned:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as run_dir:
        told = _Worker(job, rank, world_size, Path(run_dir)).run()
    if rank == 0:
        print(json.dumps(told))
    dist.destroy_process_group()


class _Worker:
    def __init__(self, job: Job, rank: int, world_size: int, run_dir: Path) -> None:
        self._job, self._rank, self._world_size, self._run_dir = job, rank, world_size, run_dir
        self._batch = random_batch(job.patch_px, job.batch, seed=rank)
        self._trainers: dict[str, Trainer] = {}
        self._mbit_s: float | None = None
        self._patience_s = job.patience_s

    def run(self) -> dict[str, Any]:
        """Samples by way, as `_timed` takes them, and bytes of the whole gradient.

        Rounds are added for ways that were disturbed too often, so many again at most three times.
        """
        ways, rounds = self._job.ways, self._job.rounds
        work = {way.name: self._work(way) for way in ways}
        samples: dict[str, list[tuple[float, float, float]]] = {way.name: [] for way in ways}
        for number in range(_NUM_WARM_UPS + 4 * rounds):
            for way in ways:
                if sum(others <= QUIET for _, others, _ in samples[way.name]) >= rounds:
                    continue
                is_warm = number >= _NUM_WARM_UPS
                if is_warm and self._rank == 0:
                    self._await_quiet()
                told = self._timed(way, work[way.name])
                if is_warm:
                    samples[way.name].append(told)
                    self._say(way.name, *told[:2])
        self._limit(None)
        return {"samples": samples, "gradient_bytes": self._gradient_bytes()}

    def _timed(self, way: Way, work: Callable[[], object]) -> tuple[float, float, float]:
        """Seconds of the slowest, part of the cores that went to others, most processor time of a worker."""
        self._limit(way.mbit_s)
        dist.barrier()
        busy_s, own_s, start = _busy_s(), time.process_time(), time.perf_counter()
        if way.kind != "alone" or self._rank == 0:
            work()
        seconds = time.perf_counter() - start
        dist.barrier()
        own_s, busy_s = time.process_time() - own_s, _busy_s() - busy_s
        ours = torch.tensor([own_s], dtype=torch.float64)
        most = torch.tensor([seconds, own_s], dtype=torch.float64)
        dist.all_reduce(ours)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        seconds, own_s = most.tolist()
        others = torch.tensor([(busy_s - float(ours)) / (seconds * (os.cpu_count() or 1))])
        dist.broadcast(others, src=0)  # all must agree on who is quiet
        return seconds, max(0.0, float(others)), own_s

    def _work(self, way: Way) -> Callable[[], object]:
        count = self._job.batch
        if way.kind in ("alone", "apart"):
            trainer = self._trainer("plain", 1, {})
            return lambda: trainer.step(self._batch, count, _TOTAL_SAMPLES)
        if way.kind == "all_reduce":
            values = torch.zeros(round(way.mib * 2**20) // 4 or self._gradient_bytes() // 4)
            return lambda: dist.all_reduce(values)
        trainer = self._trainer(json.dumps(way.scaling), self._world_size, way.scaling)
        global_batch = count * self._world_size
        if way.kind == "ddp":
            return lambda: trainer.step(self._batch, global_batch, _TOTAL_SAMPLES)

        def without_sum() -> None:
            with trainer.replica.no_sync():  # type: ignore[operator]  # DDP's
                trainer.step(self._batch, global_batch, _TOTAL_SAMPLES)

        return without_sum

    def _trainer(self, key: str, world_size: int, scaling: dict[str, Any]) -> Trainer:
        """Trainers are kept: a replica on a network that has one already would sum twice."""
        if key not in self._trainers:
            job = self._job
            stage = f"stages=[{{patch_px: {job.patch_px}, batch: {job.batch * world_size}}}]"
            section = f"scaling={json.dumps({'num_workers': world_size, **scaling})}"
            config = load_config(job.recipe, [*job.overrides, stage, section], train=[])
            context = bare_context(self._run_dir, self._rank if world_size > 1 else 0, world_size)
            self._trainers[key] = Trainer(config, context)
            self._trainers[key].warm_up(64, world_size, _NUM_WARM_UPS)
        return self._trainers[key]

    def _say(self, way: str, seconds: float, others: float) -> None:
        if self._rank == 0:
            print(f"{self._world_size} workers, {way}: {seconds:.3f} s, others {others:.2f}", file=sys.stderr)

    def _await_quiet(self) -> None:
        """Let others finish what they do, as long as there is patience left; our own all wait."""
        cores = os.cpu_count() or 1
        while self._patience_s > 0:
            busy_s = _busy_s()
            time.sleep(_LOOK_S)
            if (_busy_s() - busy_s) / (_LOOK_S * cores) <= QUIET:
                return
            self._patience_s -= _LOOK_S

    def _gradient_bytes(self) -> int:
        return sum(4 * p.numel() for p in self._trainer("plain", 1, {}).model.parameters())

    def _limit(self, mbit_s: float | None) -> None:
        if mbit_s != self._mbit_s:
            nodes.limit(mbit_s)
            self._mbit_s = mbit_s


def _busy_s() -> float:
    """Processor time that processes of this machine, and others of its host, have had."""
    user, nice, system, _, _, _, _, steal, *_ = Path("/proc/stat").read_text().split()[1:11]
    return sum(map(int, (user, nice, system, steal))) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
