"""Disks that cannot take what `prepare` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lmdb
import pytest

from pipelines import prepare
from pipelines.prepare import PrepareConfig
from tests.pipelines.pairs import write_pairs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "is_full", "told"),
    [
        (lmdb.DiskError("mdb_txn_commit: No space left on device"), False, "No space left on device"),
        # So it says of most disks that fill up.
        (lmdb.Error("mdb_txn_commit: Input/output error"), True, "No space left on device"),
        (lmdb.Error("mdb_txn_commit: Input/output error"), False, "mdb_txn_commit: Input/output error"),
    ],
)
def test_a_disk_that_lmdb_cannot_write_names_the_shard(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: lmdb.Error,
    is_full: bool,
    told: str,
) -> None:
    source = write_pairs(tmp_path / "pairs", ["one"])
    config = PrepareConfig(out=tmp_path / "store", crop_px=32, stride_px=32, format="lmdb", use_ray=False)

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("pipelines.shards._put", fail)
    if is_full:
        monkeypatch.setattr("os.statvfs", lambda place: SimpleNamespace(f_bavail=0, f_frsize=4096))
    with pytest.raises(OSError, match=rf"{told}.*shard-00000\.lmdb"):
        prepare.run(source, source.pairs(), config)
    assert not list(tmp_path.rglob("shard-*"))


def test_a_limit_that_lmdb_meets_is_one_line(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", ["large"], height=700, width=900)
    # As a quota does it: the system writes a part, and then no more.
    limited = (
        "import resource; from pipelines.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); main()"
    )
    command = [sys.executable, "-c", limited, "prepare", "--lq", tmp_path / "pairs/blur"]
    command += ["--gt", tmp_path / "pairs/sharp", "--out", tmp_path / "out"]
    command += ["--format", "lmdb", "--codec", "raw"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nafnet: mdb_") and "shard-00000.lmdb" in last
