"""Buckets that fail for a while, or for good: real servers, connections and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nafnet_core import CapabilityError, InputError, NAFNet, NAFNetConfig, save_model
from pipelines import evaluate, prepare, storage
from pipelines.config import DataSection, StoreSection
from pipelines.evaluate import Pairs
from pipelines.ingest import Span, plan_for, read_patches, slice_numbers
from pipelines.models import open_model
from pipelines.prepare import PrepareConfig
from pipelines.sources import FolderPairs, find_source, place
from pipelines.storage import RemoteFolder, folder
from pipelines.store import MANIFEST, PairStore
from pipelines.workspace import Workspace
from tests.pipelines.buckets import Proxy, Server
from tests.pipelines.pairs import make_store, write_pairs

ROOT = Path(__file__).resolve().parents[2]
_TINY = NAFNetConfig(width=4, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,))


def config_for(out: str | Path, **options: Any) -> PrepareConfig:
    config = PrepareConfig(out=out, crop_px=32, stride_px=32, pairs_per_shard=2, use_ray=False)
    return replace(config, **options)


def nafnet(*arguments: object, workspace: Path, **environment: str) -> tuple[int, str, str]:
    """Run the command in a process of its own: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "NAFNET_WORKSPACE": str(workspace), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def proxy(s3: Server) -> Iterator[Proxy]:
    proxy = Proxy(s3)
    yield proxy
    proxy.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote_store(s3: Server, bucket: str, own_store: Path) -> str:
    """A store in a bucket, to damage."""
    return s3.upload(own_store, f"{bucket}/store")


def remote(url: str) -> RemoteFolder:
    place = folder(url)
    assert isinstance(place, RemoteFolder)
    return place


# Damage


@pytest.mark.parametrize("fault", ["missing", "damaged", "short"])
def test_a_bad_shard_is_one_line(remote_store: str, cache: Path, tmp_path: Path, fault: str) -> None:
    bucket = remote(remote_store)
    name = PairStore(remote_store).manifest.shards[1].file
    content = bytearray(bucket.read(name))
    if fault == "missing":
        bucket.delete(name)
    else:
        content[len(content) // 2] ^= 1
        bucket.write(name, bytes(content[: -1 if fault == "short" else None]))
    with pytest.raises(InputError, match=f"a missing or damaged shard: 's3://.*{name}") as caught:
        list(Pairs(remote_store))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    code, out, err = nafnet("inspect", remote_store, "--json", workspace=tmp_path)
    assert code == 2 and "Traceback" not in err
    (problem,) = json.loads(out)["problems"]
    assert problem in err and name in problem and json.loads(out)["verification"]["bad_shards"] == [1]


def test_a_damaged_manifest_is_one_line(remote_store: str) -> None:
    remote(remote_store).write(MANIFEST, b'{"schema_version": 1')
    with pytest.raises(InputError, match=r"damaged manifest: 's3://.*manifest\.json"):
        PairStore(remote_store)


def test_inspect_a_store_in_a_bucket(remote_store: str, cache: Path, own_store: Path, tmp_path: Path) -> None:
    code, out, _ = nafnet("inspect", remote_store, "--deep", "--json", workspace=tmp_path)
    found = json.loads(out)
    assert code == 0 and found["verification"]["digest_of_pixels"] == PairStore(own_store).digest
    assert found["verification"]["ok"] and not found["verification"]["extra_files"]


def test_evaluate_on_a_store_and_on_pairs_in_a_bucket(
    s3: Server, bucket: str, cache: Path, tmp_path: Path
) -> None:
    source = write_pairs(tmp_path / "pairs", ["a", "b"])
    local = make_store(source, tmp_path / "store", crop_px=None, split="test")
    save_model(NAFNet(_TINY), tmp_path / "tiny.safetensors", metadata={"train_patch_px": 32})
    workspace = Workspace(tmp_path / "workspace")
    loaded = open_model(str(tmp_path / "tiny.safetensors"), workspace)
    pairs = [Pairs(local.root)]
    pairs += [Pairs(s3.upload(tmp_path / name, f"{bucket}/{name}")) for name in ("store", "pairs")]
    pairs.append(Pairs(*(s3.url(f"{bucket}/pairs/{side}") for side in ("blur", "sharp"))))
    reports = [evaluate.run(loaded, each, workspace.make()).report for each in pairs]
    assert {report.data_digest for report in reports} == {local.digest}
    assert len({report.psnr_restored_db for report in reports}) == 1
    assert reports[1].data.startswith(f"s3://{bucket}/store?")


@pytest.mark.parametrize("command", ["synth", "train"])
def test_what_must_be_on_a_disk_says_so(tmp_path: Path, command: str) -> None:
    arguments = {
        "synth": ["synth", tmp_path, "--out", "s3://k:PLANTED@bucket/pairs"],
        "train": [
            "train",
            "--config",
            "mobile",
            "--data",
            "s3://bucket/a",
            "--workspace",
            "s3://bucket/runs",
        ],
    }
    code, _, err = nafnet(*arguments[command], workspace=tmp_path)
    assert code == 2 and "this must be on a disk: 's3://bucket/" in err and "PLANTED" not in err
    assert not Path("s3:").exists()


def test_training_takes_no_credentials_in_a_url(tmp_path: Path) -> None:
    code, _, err = nafnet("train", "--config", "mobile", "--data", "s3://k:PLANTED@b/s", workspace=tmp_path)
    assert code == 2 and "would be written into the run's records: 's3://b/s'" in err and "AWS_PROFILE" in err
    assert "PLANTED" not in err and len(err.splitlines()) == 1


# Faults that pass


def test_an_answer_that_breaks_off_is_asked_for_again(proxy: Proxy, bucket: str) -> None:
    content = os.urandom(400_000)
    place = remote(proxy.address.url(f"{bucket}/x"))
    place.write("file", content)
    proxy.fail("cut")
    threading.Timer(1.0, proxy.fail, [""]).start()
    assert place.read("file") == content
    assert proxy.num_faults


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "drop", "down", "slow"])
@pytest.mark.parametrize("use_ray", [False, True])
@pytest.mark.usefixtures("ray_session")
def test_prepare_outlasts_a_fault(
    proxy: Proxy, s3: Server, bucket: str, tmp_path: Path, fault: str, use_ray: bool
) -> None:
    # At its start, and again in the middle, when images are read and shards are uploaded.
    source = write_pairs(tmp_path / "pairs", [f"s{n // 4}/{n}" for n in range(12)])
    s3.upload(tmp_path / "pairs", f"{bucket}/pairs")
    there = find_source(place(proxy.address.url(f"{bucket}/pairs")), split="train")
    refs = there.pairs()

    def fail_for(seconds: float) -> None:
        proxy.fail(fault)
        threading.Timer(seconds, proxy.fail, [""]).start()

    fail_for(3)
    result = prepare.run(
        there,
        refs,
        config_for(proxy.address.url(f"{bucket}/store"), use_ray=use_ray),
        on_progress=lambda done, total: fail_for(3) if done == 2 else None,
    )
    whole = make_store(source, tmp_path / "whole")
    assert result.manifest.digest == whole.digest and not result.refused
    assert set(s3.objects(f"{bucket}/store")) == {path.name for path in whole.root.iterdir()}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("fault", ["503", "drop", "down", "slow"])
def test_training_reads_outlast_a_fault(
    ray_session: None, proxy: Proxy, s3: Server, bucket: str, tmp_path: Path, fault: str
) -> None:
    from pipelines.feeder import ray_batches

    # Pairs of its own: what other tests have read lies in the node's cache.
    size = 100 + 4 * ["503", "drop", "down", "slow"].index(fault)
    source = write_pairs(tmp_path / "pairs", [f"s/{n}" for n in range(6)], height=size)
    local = make_store(source, tmp_path / "store")
    s3.upload(local.root, f"{bucket}/store")
    url = proxy.address.url(f"{bucket}/store")
    plan = plan_for(DataSection(train=(StoreSection(path=url),)), seed=3)
    span = Span(start=0, num_batches=12, batch=4, patch_px=16)
    proxy.fail(fault)
    threading.Timer(6.0, proxy.fail, [""]).start()
    batches = ray_batches(
        plan, [url], span, rank=0, world_size=1, num_readers=2, reader_cpus=0.1, cache_gib=1.0
    )
    for number, batch in enumerate(batches):
        expected = read_patches(plan, [local], slice_numbers(span, (0, 4), np.array([number]))[0], 16)
        assert np.array_equal(batch.lq, expected.lq) and np.array_equal(batch.gt, expected.gt)
    assert number == 11
    assert proxy.num_faults or fault == "down"


# Faults that stay


def test_patience_ends_with_one_line(
    proxy: Proxy, bucket: str, pairs: FolderPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_DELAYS_S", (0.1,))
    url = proxy.address.url(f"{bucket}/store")
    config = config_for(url)

    def cut_off(done: int, total: int) -> None:
        if done == 1:
            # The S3 client itself asks many times, for seconds; what it is refused in the end is no matter.
            monkeypatch.setattr(RemoteFolder, "_at", refuse)

    def refuse(self: RemoteFolder, name: str = "") -> Any:
        raise OSError("no route to host")

    with pytest.raises(
        CapabilityError, match=r"the storage does not answer: 's3://.*no route.*goes on"
    ) as error:
        prepare.run(pairs, pairs.pairs(), config, on_progress=cut_off)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)
    monkeypatch.undo()
    result = prepare.run(pairs, pairs.pairs(), config)
    assert result.manifest.digest == make_store(pairs, tmp_path / "whole").digest


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_gone_for_good_ends_prepare_with_exit_code_4(
    proxy: Proxy, s3: Server, bucket: str, tmp_path: Path
) -> None:
    # In the middle of a job of many shards: 80 s of patience, then one line, and the next run goes on.
    source = write_pairs(tmp_path / "pairs", [f"s/{n:03}" for n in range(120)])
    out = proxy.address.url(f"{bucket}/store")
    arguments = [
        "prepare",
        tmp_path / "pairs",
        "--out",
        out,
        "--crop",
        32,
        "--stride",
        8,
        "--pairs-per-shard",
        2,
    ]
    result: list[tuple[int, str, str]] = []
    thread = threading.Thread(target=lambda: result.append(nafnet(*arguments, workspace=tmp_path)))
    thread.start()
    until(lambda: sum("shard" in name for name in s3.objects(f"{bucket}/store")) > 4)
    proxy.fail("down")
    thread.join()
    code, _, err = result[0]
    lines = [line for line in err.splitlines() if line.startswith("nafnet: the storage does not answer")]
    assert code == 4 and len(lines) == 1 and "Traceback" not in err, err
    assert "The same command goes on" in lines[0]
    proxy.fail("")
    done = len([name for name in s3.objects(f"{bucket}/store/.progress") if name.startswith("shard-")])
    code, out_text, err = nafnet(*arguments, "--json", workspace=tmp_path)
    assert code == 0 and f"prepare: {done}/60 shards" in err, err
    whole = make_store(source, tmp_path / "whole", stride_px=8)
    assert json.loads(out_text)["digest"] == whole.digest


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_gone_for_good_ends_reading_with_one_line(
    ray_session: None, proxy: Proxy, s3: Server, bucket: str, tmp_path: Path
) -> None:
    from pipelines.feeder import ray_batches

    source = write_pairs(tmp_path / "pairs", [f"s/{n}" for n in range(6)], height=128)
    s3.upload(make_store(source, tmp_path / "store").root, f"{bucket}/store")
    url = proxy.address.url(f"{bucket}/store")
    plan = plan_for(DataSection(train=(StoreSection(path=url),)), seed=3)
    span = Span(start=0, num_batches=12, batch=4, patch_px=16)
    proxy.fail("down")
    with pytest.raises(CapabilityError, match="the storage does not answer") as error:
        list(
            ray_batches(plan, [url], span, rank=0, world_size=1, num_readers=1, reader_cpus=0.1, cache_gib=1)
        )
    assert error.value.exit_code == 4 and "\n" not in str(error.value)
