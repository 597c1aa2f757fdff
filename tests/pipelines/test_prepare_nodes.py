"""Several nodes with one disk, and with a disk each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nafnet_core import InputError
from pipelines import nodes
from pipelines.sources import FolderPairs, PairRef, place
from pipelines.storage import folder
from pipelines.store import PairStore
from tests.pipelines.pairs import make_store, write_pairs

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_is_known_by_its_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_WAIT_S", 0.0)
    ours, other = folder(tmp_path / "ours" / ".progress"), folder(tmp_path / "other" / ".progress")
    ours.make()
    nodes.mark(ours, "this run")
    nodes.check_folder(ours, "this run")
    with pytest.raises(InputError, match=rf"do not share the folder to write: '{tmp_path}/ours'.*or a URL"):
        nodes.check_folder(ours, "another run, of another machine")
    with pytest.raises(InputError, match="do not share"):
        nodes.check_folder(other, "this run")
    nodes.check_folder(folder("s3://bucket/store"), "this run")  # which all see; nothing is asked


def test_a_mark_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path)
    monkeypatch.setattr(nodes.time, "sleep", lambda _: nodes.mark(place, "this run"))
    nodes.check_folder(place, "this run")


def test_images_that_are_not_on_this_node(tmp_path: Path) -> None:
    def ref(lq: Any, gt: Any) -> PairRef:
        return PairRef(key="a", scene="a", lq=lq, gt=gt)

    (tmp_path / "here").mkdir()
    here, gone = tmp_path / "here" / "a.png", tmp_path / "gone" / "a.png"
    with pytest.raises(InputError, match=rf"do not share the folder of the images: '{tmp_path}/gone'"):
        nodes.check_pairs([ref(gone, gone)])
    # A file that was deleted meanwhile is a pair's own fault, and goes to the quarantine.
    nodes.check_pairs([ref(here, here)])
    nodes.check_pairs([ref(gone, here)])
    nodes.check_pairs([ref(place("s3://bucket/a.png"), gone)])
    nodes.check_pairs([])


@contextmanager
def two_nodes(hidden: Path | None = None) -> Iterator[str]:
    """A head that does no work and a node that does, which sees an empty folder in the place of `hidden`."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.address}"]
    start += ["--num-cpus=1", "--block", "--disable-usage-stats"]
    if hidden is not None:
        # A name space of its own, with another disk there.
        mount = f'mount -t tmpfs none "{hidden}" && exec "$@"'
        start = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *start]
    node = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while _num_nodes(cluster.address) < 2:
            assert node.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield cluster.address
    finally:
        node.terminate()
        node.wait(30)
        cluster.shutdown()


def _num_nodes(address: str) -> int:
    code = (
        f"import ray; ray.init({address!r}, log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return int(done.stdout.strip() or 0)


def prepare(pairs: Path, out: Path, address: str, workspace: Path) -> subprocess.CompletedProcess[str]:
    options = ["--out", out, "--crop", 32, "--stride", 32, "--pairs-per-shard", 2, "--address", address]
    return subprocess.run(
        [sys.executable, "-m", "pipelines", "prepare", *map(str, [pairs, *options])],
        cwd=ROOT,
        env={**os.environ, "NAFNET_WORKSPACE": str(workspace)},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def source(tmp_path: Path) -> FolderPairs:
    return write_pairs(tmp_path / "pairs", [f"s{n // 2}/{n}" for n in range(6)])


@pytest.mark.slow
@pytest.mark.ray
def test_nodes_that_share_the_disk(source: FolderPairs, tmp_path: Path) -> None:
    with two_nodes() as address:
        done = prepare(tmp_path / "pairs", tmp_path / "store", address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert PairStore(tmp_path / "store").digest == make_store(source, tmp_path / "whole").digest


_CAN_HIDE = (
    shutil.which("unshare") is not None
    and subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "true"], stderr=subprocess.DEVNULL
    ).returncode
    == 0
)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not _CAN_HIDE, reason="this machine allows no name spaces of one's own")
@pytest.mark.parametrize("hidden", ["stores", "pairs"])
def test_a_node_with_a_disk_of_its_own(source: FolderPairs, tmp_path: Path, hidden: str) -> None:
    (tmp_path / "stores").mkdir()
    with two_nodes(tmp_path / hidden) as address:
        done = prepare(tmp_path / "pairs", tmp_path / "stores" / "one", address, tmp_path)
    what = {"stores": "folder to write", "pairs": "folder of the images"}[hidden]
    lines = [line for line in done.stderr.splitlines() if line.startswith("nafnet: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert f"the nodes of this cluster do not share the {what}" in lines[0] and "URL" in lines[0]
    assert not (tmp_path / "stores" / "one" / "manifest.json").exists()
