"""Faults of a running `nafnet train`, real ones: what goes on, with what weights, and what is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.checkpoint import CheckpointLedger
from tests.pipelines.buckets import Server
from tests.pipelines.pairs import make_store, write_pairs
from tests.pipelines.train import tiny
from tests.pipelines.train.commands import Training, num_nodes, small_disk

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    source = write_pairs(root / "pairs", [f"s{n // 4}/{n}" for n in range(24)])
    return Path(make_store(source, root / "store").root)


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the run that nothing happens to."""
    training = Training(tmp_path_factory.mktemp("whole"), store)
    training.run()
    return tiny.final_weights(training.run_dir)


def _assert_same(weights: dict[str, torch.Tensor], training: Training) -> None:
    found = tiny.final_weights(training.run_dir)
    assert all(torch.equal(value, found[name]) for name, value in weights.items())


def _resumed_at(training: Training) -> list[int]:
    return [row["samples"] for row in training.rows() if row.get("event") == "resumed"]


def test_workers_that_are_killed_are_replaced(
    store: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    training = Training(tmp_path, store)
    training.start()
    training.wait_for(lambda: training.seen() > 800)
    training.signal_rank(1, signal.SIGKILL)
    training.wait_for(lambda: len(_resumed_at(training)) == 1)
    training.wait_for(lambda: training.seen() > _resumed_at(training)[0] + 800)
    training.signal_rank(0, signal.SIGKILL)
    printed = training.finish()
    assert "workers were lost: rank 1: its process or node died" in printed
    assert "workers were lost: rank 0: its process or node died" in printed
    assert len(_resumed_at(training)) == 2
    _assert_same(whole, training)


def test_a_reader_that_is_killed_is_replaced_by_its_worker(store: Path, tmp_path: Path) -> None:
    training = Training(tmp_path, store, "--set", "budget.samples=1000000")  # more than is read ahead
    training.start()
    training.wait_for(lambda: training.seen() > 400)
    training.readers()[0].kill()
    logs = training.run_dir / "logs"
    training.wait_for(lambda: any("a reader died" in log.read_text() for log in logs.glob("rank*.log")))
    seen = training.seen()
    training.wait_for(lambda: training.seen() > seen + 400)
    assert not _resumed_at(training)
    assert training.process is not None
    training.process.send_signal(signal.SIGINT)
    training.finish(code=130)


def test_a_driver_that_is_killed_goes_on_by_the_same_command(
    store: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    training = Training(tmp_path, store)
    training.start()
    training.wait_for(lambda: training.seen() > 800)
    assert training.process is not None
    training.process.kill()
    training.process.wait()
    workers = training.workers()
    training.run()
    assert not any(worker.is_running() for worker in workers.values())
    assert 0 < _resumed_at(training)[0] < 4800
    _assert_same(whole, training)


def test_a_run_that_goes_on_with_fewer_workers_ends_near(store: Path, tmp_path: Path) -> None:
    """Fewer workers sum gradients in another order; the promise is the score, not the weights."""
    whole = Training(tmp_path / "whole", store, "--val", store)
    whole.run()
    parts = Training(tmp_path / "parts", store, "--val", store)
    parts.start()
    parts.wait_for(lambda: parts.seen() > 800)
    assert parts.process is not None
    parts.process.send_signal(signal.SIGINT)
    assert "all state is saved" in parts.finish(code=130)
    alone = Training(tmp_path / "parts", store, "--val", store, "--set", "scaling.num_workers=1")
    alone.run()
    assert [row["metrics"]["workers"] for row in alone.rows() if "workers" in row["metrics"]] == [2, 1]
    final = [
        [row["metrics"]["val/psnr_db"] for row in training.rows() if "val/psnr_db" in row["metrics"]][-1]
        for training in (whole, alone)
    ]
    assert abs(final[0] - final[1]) < 0.05 and final[0] > 20


def test_a_worker_that_hangs_is_named_and_replaced(
    store: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    training = Training(tmp_path, store, "--set", "scaling.timeout_s=8")
    training.start()
    training.wait_for(lambda: training.seen() > 800)
    training.signal_rank(1, signal.SIGSTOP)
    printed = training.finish()
    assert "rank 1 does not answer" in printed
    assert len(_resumed_at(training)) == 1
    _assert_same(whole, training)


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    store: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    training = Training(tmp_path, store)
    disk = tmp_path / "disk"
    with small_disk(disk, 8):
        training.run_dir.mkdir(parents=True)
        (training.run_dir / "checkpoints").symlink_to(disk)
        training.start()
        training.wait_for(lambda: training.seen() > 800)
        with (disk / "filler").open("wb") as filler, pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(2**20))
                filler.flush()
        training.wait_for(lambda: "checkpoint not written: No space left" in str(training.rows()))
        newest = CheckpointLedger(training.run_dir).entries()[-1]
        assert CheckpointLedger(training.run_dir).fault(newest) is None
        (disk / "filler").unlink()
        printed = training.finish()
        assert "checkpoint not written: No space left" in printed
        _assert_same(whole, training)


def test_a_run_in_a_bucket_goes_on_on_another_machine(
    store: Path, whole: dict[str, torch.Tensor], tmp_path: Path, s3: Server
) -> None:
    s3.make_bucket("runs")
    option = f"checkpoint.storage={s3.url('runs/here')}"
    training = Training(tmp_path / "one", store, "--val", store, "--set", option)
    training.start()
    training.wait_for(lambda: training.seen() > 800)
    assert training.process is not None
    os.killpg(training.process.pid, signal.SIGKILL)
    training.process.wait()
    other = Training(tmp_path / "other", store, "--val", store, "--set", option)
    other.run()
    assert 0 < _resumed_at(other)[0] < 4800
    _assert_same(whole, other)
    best = CheckpointLedger(other.run_dir).best()
    assert best is not None and best.psnr_db is not None
    assert list((other.run_dir / "pictures").glob("0*.png"))


# Several nodes


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head that does no work, and a node with room for one worker."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def _num_workers(training: Training) -> list[int]:
    return [int(row["metrics"]["workers"]) for row in training.rows() if "workers" in row["metrics"]]


def test_elastic_workers_follow_the_nodes_that_come_and_go(store: Path, tmp_path: Path, cluster) -> None:  # noqa: ANN001
    options = (
        "--address",
        cluster.address,
        "--set",
        "scaling.num_workers=[1,2]",
        "--set",
        "budget.samples=1000000",
    )
    training = Training(tmp_path, store, *options)
    training.start()
    training.wait_for(lambda: training.seen() > 400)
    assert _num_workers(training) == [1]
    node = cluster.add_node(num_cpus=1)
    training.wait_for(lambda: _num_workers(training)[-1] == 2)
    training.wait_for(lambda: training.seen() > _resumed_at(training)[-1] + 400)
    cluster.remove_node(node, allow_graceful=False)
    training.wait_for(lambda: _num_workers(training)[-1] == 1)
    assert training.process is not None
    training.process.send_signal(signal.SIGINT)
    assert "all state is saved" in training.finish(code=130)


def test_validation_beside_the_training(store: Path, tmp_path: Path, cluster) -> None:  # noqa: ANN001
    cluster.add_node(num_cpus=1)
    options = ("--address", cluster.address, "--val", store, "--set", "scaling.num_workers=1")
    beside = Training(tmp_path / "beside", store, *options, "--set", "validation.beside=true")
    beside.run()
    inline = Training(tmp_path / "inline", store, *options, "--set", "validation.beside=false")
    inline.run()
    scores = [
        [(row["samples"], row["metrics"]) for row in training.rows() if "val/psnr_db" in row["metrics"]]
        for training in (beside, inline)
    ]
    assert scores[0] == scores[1] and [samples for samples, _ in scores[0]] == [2400, 4800]
    best = [CheckpointLedger(training.run_dir).best() for training in (beside, inline)]
    assert best[0] is not None and best[1] is not None and best[0].psnr_db == best[1].psnr_db is not None
    for training in (beside, inline):
        assert len(list((training.run_dir / "pictures").glob("0*.png"))) == 2


def test_storage_that_a_node_does_not_see_is_told_before_training(
    store: Path, tmp_path: Path, cluster
) -> None:  # noqa: ANN001
    hidden = tmp_path / "workspace"
    hidden.mkdir()
    mount = f'mount -t tmpfs none "{hidden}" && exec "$@"'
    start = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    start += [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.address}"]
    start += ["--num-cpus=1", "--block", "--disable-usage-stats"]
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as node:
        try:
            deadline = time.monotonic() + 60
            while num_nodes(cluster.address) < 3:
                assert time.monotonic() < deadline
            training = Training(tmp_path, store, "--address", cluster.address)
            printed = training.run(code=2)
        finally:
            node.terminate()
    assert "not every node of the cluster can use the storage" in printed
    assert "checkpoint.storage" in printed
