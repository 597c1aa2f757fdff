"""`prepare` killed with SIGKILL at random moments, again and again, until it has finished."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipelines.sources import FolderPairs
from pipelines.storage import folder
from pipelines.store import PairStore
from tests.pipelines.buckets import Server
from tests.pipelines.pairs import make_store, write_pairs

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 20
SEED = int(os.environ.get("NAFNET_KILL_SEED", time.time_ns() % 10**6))

_JOB = """
import sys
from pathlib import Path
from pipelines import prepare
from pipelines.sources import FolderPairs

pairs, out = Path(sys.argv[1]), sys.argv[2]
source = FolderPairs(lq_dir=pairs / "blur", gt_dir=pairs / "sharp")
config = prepare.PrepareConfig(
    out=out, crop_px=32, stride_px=4, pairs_per_shard=2, format=sys.argv[3], codec=sys.argv[4], use_ray=False
)
prepare.run(source, source.pairs(), config)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderPairs:
    return write_pairs(tmp_path_factory.mktemp("pairs"), [f"s{n // 4}/{n:02}" for n in range(24)])


@dataclass
class Killer:
    """Runs a command, and kills its process group at a random moment."""

    command: list[str]
    longest_s: float
    scratch: Path
    moments_s: list[float] = field(default_factory=list)
    kills: int = 0
    kills_at_work: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(SEED)
        self.scratch.mkdir()

    def run(self, is_begun: Callable[[], bool], earliest_s: float = 0.0) -> bool:
        """Whether the command came to its end this time."""
        moment = self.random.uniform(earliest_s, self.longest_s)
        self.moments_s.append(round(moment, 3))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.scratch)}
        job = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True
        )
        assert job.stderr is not None
        with job.stderr:
            try:
                code = job.wait(moment)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
                self.kills += 1
                self.kills_at_work += is_begun()
                return False
            told = job.stderr.read().decode()
            # Killed once the manifest was written, it has finished without saying so.
            assert code == 0 or "there is a finished store already" in told, f"{self}: {told}"
        return True

    def __str__(self) -> str:
        return f"NAFNET_KILL_SEED={SEED}, moments {self.moments_s} s"


def kill_until_done(killer: Killer, finished: Callable[[], None], is_begun: Callable[[], bool]) -> None:
    """Until all kills are spent and one last run has finished; a run that finishes before begins anew."""
    while True:
        is_last = killer.kills >= NUM_KILLS
        killer.longest_s = 300.0 if is_last else killer.longest_s
        if killer.run(is_begun, earliest_s=300.0 if is_last else 0.0):
            finished()
            if killer.kills >= NUM_KILLS:
                break
    # Else the moments say nothing: most must fall into the work, not into the start of the interpreter.
    assert killer.kills_at_work >= NUM_KILLS // 3, str(killer)
    left = [path.name for path in killer.scratch.rglob("*") if path.is_file() and path.name != "lock"]
    assert not left, f"{killer}: {left}"


@pytest.mark.slow
def test_a_store_on_a_disk(source: FolderPairs, tmp_path: Path) -> None:
    kind = {"format": "lmdb", "codec": "raw"}
    whole = make_store(source, tmp_path / "whole", stride_px=4, **kind)
    out = tmp_path / "store"
    pairs = str(source.lq_dir.parent)
    killer = Killer([sys.executable, "-c", _JOB, pairs, str(out), *kind.values()], 3.0, tmp_path / "tmp")

    def finished() -> None:
        assert PairStore(out).digest == whole.digest, str(killer)
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.root.iterdir()}, str(
            killer
        )
        shutil.rmtree(out)

    kill_until_done(killer, finished, lambda: (out / ".progress" / "job.json").exists())


@pytest.mark.slow
def test_a_store_in_a_bucket(source: FolderPairs, s3: Server, bucket: str, tmp_path: Path) -> None:
    whole = make_store(source, tmp_path / "whole", stride_px=4)
    url = s3.url(f"{bucket}/store")
    pairs = str(source.lq_dir.parent)
    killer = Killer([sys.executable, "-c", _JOB, pairs, url, "parquet", "png"], 5.0, tmp_path / "tmp")

    def finished() -> None:
        store = PairStore(url)
        assert store.digest == whole.digest, str(killer)
        for shard in store.manifest.shards:
            assert folder(url).sha256(shard.file) == shard.sha256, str(killer)
        assert set(s3.objects(f"{bucket}/store")) == {path.name for path in whole.root.iterdir()}, str(killer)
        s3.remove(f"{bucket}/store")

    kill_until_done(killer, finished, lambda: bool(s3.objects(f"{bucket}/store/.progress")))


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_and_its_workers(source: FolderPairs, s3: Server, bucket: str, tmp_path: Path) -> None:
    # Workers of a killed driver may still be at it when the next one begins.
    whole = make_store(source, tmp_path / "whole", stride_px=4)
    url = s3.url(f"{bucket}/store")
    options = ["--out", url, "--crop", "32", "--stride", "4", "--pairs-per-shard", "2"]
    command = [sys.executable, "-m", "pipelines", "prepare", str(source.lq_dir.parent), *options]
    short = Path(tempfile.mkdtemp(prefix="k"))  # Ray's sockets lie below it, and their names are bounded
    killer = Killer(command, 10.0, short / "tmp")
    while killer.kills < 2 and not killer.run(lambda: True, earliest_s=3.0):
        pass
    killer.longest_s = 300.0
    if killer.kills == 2:
        assert killer.run(lambda: True, earliest_s=300.0)
    assert PairStore(url).digest == whole.digest, str(killer)
    assert set(s3.objects(f"{bucket}/store")) == {path.name for path in whole.root.iterdir()}, str(killer)
    shutil.rmtree(short)
