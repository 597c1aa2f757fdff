"""`prepare` into and out of buckets, against a real server."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nafnet_core import InputError
from pipelines import lease, prepare
from pipelines.lease import held
from pipelines.prepare import PrepareConfig
from pipelines.sources import FolderPairs, find_source, place, two_sides
from pipelines.storage import RemoteFolder, folder
from pipelines.store import MANIFEST, PROGRESS, QUARANTINE, SCENES, SUSPECTS, PairStore, read_manifest
from tests.pipelines.buckets import Server
from tests.pipelines.pairs import make_store, write_pairs

ROOT = Path(__file__).resolve().parents[2]


def config_for(out: str | Path, **options: Any) -> PrepareConfig:
    config = PrepareConfig(out=out, crop_px=32, stride_px=32, pairs_per_shard=2, use_ray=False)
    return replace(config, **options)


def remote(url: str) -> RemoteFolder:
    place = folder(url)
    assert isinstance(place, RemoteFolder)
    return place


# Stores


@pytest.mark.parametrize("format", ["parquet", "lmdb"])
def test_a_bucket_holds_what_a_disk_would(
    pairs: FolderPairs, s3: Server, bucket: str, tmp_path: Path, format: Any
) -> None:
    url = s3.url(f"{bucket}/stores/mine")
    result = prepare.run(pairs, pairs.pairs(), config_for(url, format=format))
    local = make_store(pairs, tmp_path / "mine", format=format)
    assert read_manifest(url) == result.manifest and result.manifest.digest == local.digest
    objects = s3.objects(f"{bucket}/stores/mine")
    assert set(objects) == {path.name for path in local.root.iterdir()}
    for shard in result.manifest.shards:
        assert objects[shard.file] == shard.bytes and remote(url).sha256(shard.file) == shard.sha256
    store = PairStore(url)
    assert [store.pair(n).digest() for n in (0, 44)] == [local.pair(n).digest() for n in (0, 44)]
    with pytest.raises(InputError, match="finished store already"):
        prepare.run(pairs, pairs.pairs(), config_for(url, format=format))


def test_an_interrupted_job_goes_on_in_a_bucket(
    pairs: FolderPairs, s3: Server, bucket: str, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    url = s3.url(f"{bucket}/store")
    with pytest.raises(KeyboardInterrupt):
        prepare.run(pairs, pairs.pairs(), config_for(url), on_progress=stop)
    with pytest.raises(InputError, match=r"an unfinished store: 's3://.*Run the same"):
        PairStore(url)
    with pytest.raises(InputError, match=r"unfinished store of other.*expected crop_px 32, got crop_px 16"):
        prepare.run(pairs, pairs.pairs(), config_for(url, crop_px=16))
    steps: list[int] = []
    again = prepare.run(pairs, pairs.pairs(), config_for(url), on_progress=lambda d, _: steps.append(d))
    assert steps == [2, 3]
    whole = make_store(pairs, tmp_path / "whole")
    assert again.manifest.digest == whole.digest
    assert set(s3.objects(f"{bucket}/store")) == {path.name for path in whole.root.iterdir()}


def test_killed_between_the_manifest_and_the_end(pairs: FolderPairs, s3: Server, bucket: str) -> None:
    url = s3.url(f"{bucket}/store")
    prepare.run(pairs, pairs.pairs(), config_for(url))
    remote(url).below(PROGRESS).write("shard-00000.json", b"{}")
    with pytest.raises(InputError, match="finished store already"):
        prepare.run(pairs, pairs.pairs(), config_for(url))
    assert not [name for name in s3.objects(bucket) if PROGRESS in name]


def test_what_was_refused_or_looks_wrong_lies_beside_it(s3: Server, bucket: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", [f"s{n // 2}/{n}" for n in range(6)])
    refs = source.pairs()
    refs[0].lq.write_bytes(refs[0].lq.read_bytes()[:99])
    shutil.copy(refs[1].gt, refs[1].lq)
    url = s3.url(f"{bucket}/store")
    here = prepare.run(source, refs, config_for(tmp_path / "store"))
    there = prepare.run(source, refs, config_for(url))
    assert there.refused == here.refused and len(there.refused) == 1
    for name in (QUARANTINE, SUSPECTS, SCENES):
        assert remote(url).read(name) == (tmp_path / "store" / name).read_bytes() != b""


def test_no_such_bucket(pairs: FolderPairs, s3: Server) -> None:
    with pytest.raises(InputError, match="the storage refuses this.*NO_SUCH_BUCKET"):
        prepare.run(pairs, pairs.pairs(), config_for(s3.url("no-such-bucket/store")))


def test_a_file_url_is_a_path(pairs: FolderPairs, tmp_path: Path) -> None:
    prepare.run(pairs, pairs.pairs(), config_for(f"file://{tmp_path}/a%20store"))
    assert PairStore(tmp_path / "a store").digest == make_store(pairs, tmp_path / "other").digest


def test_another_file_system(pairs: FolderPairs, tmp_path: Path) -> None:
    url = "memory://stores/mine"
    result = prepare.run(pairs, pairs.pairs(), config_for(url))
    assert result.manifest.digest == make_store(pairs, tmp_path / "mine").digest
    assert PairStore(url).pair(3).key


# One run at a time

_HOLDING_JOB = """
import sys, time
from pipelines.lease import held
from pipelines.storage import folder

with held(folder(sys.argv[1]), ".progress"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_run_at_a_time_and_a_killed_one_is_seen_at_once(
    pairs: FolderPairs, s3: Server, bucket: str
) -> None:
    url = s3.url(f"{bucket}/store")
    arguments = [sys.executable, "-c", _HOLDING_JOB, url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    assert job.stdout is not None
    with job.stdout:
        try:
            assert job.stdout.readline() == b"held\n"
            with pytest.raises(InputError, match=rf"another run is at work.*process {job.pid} on .*Wait for"):
                prepare.run(pairs, pairs.pairs(), config_for(url))
            assert not [name for name in s3.objects(f"{bucket}/store") if "shard" in name]
        finally:
            job.send_signal(signal.SIGKILL)
            job.wait()
    assert [name for name in s3.objects(f"{bucket}/store") if "run-" in name]
    prepare.run(pairs, pairs.pairs(), config_for(url))
    assert not [name for name in s3.objects(f"{bucket}/store") if "run-" in name]


def test_of_several_that_begin_together_at_most_one_goes_on(s3: Server, bucket: str) -> None:
    store = remote(s3.url(f"{bucket}/store"))
    begin, all_tried = threading.Barrier(4), threading.Barrier(4)

    def one() -> bool:
        begin.wait(60)
        try:
            with held(store, PROGRESS):
                all_tried.wait(60)
                return True
        except InputError:
            all_tried.wait(60)
            return False

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            assert sum(job.result() for job in [pool.submit(one) for _ in range(4)]) <= 1
        assert store.below(PROGRESS).names() == []
    with held(store, PROGRESS) as check:
        check()


def test_the_note_of_another_machine_holds_for_two_minutes(
    s3: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = remote(s3.url(f"{bucket}/store"))
    notes = store.below(PROGRESS)
    notes.write(
        "run-1.json", json.dumps({"host": "far", "machine": "other", "pid": 7, "started": 0}).encode()
    )
    with pytest.raises(InputError, match=r"process 7 on far.*run this again in 1(20|19|18|17) s"):
        with held(store, PROGRESS):
            raise AssertionError
    assert notes.names() == ["run-1.json"]  # ours is gone
    monkeypatch.setattr(lease, "EXPIRE_S", -1.0)
    with held(store, PROGRESS) as check:
        check()
        assert len(notes.names()) == 1 and notes.names() != ["run-1.json"]
    assert notes.names() == []


def test_a_damaged_note_is_of_somebody(s3: Server, bucket: str) -> None:
    store = remote(s3.url(f"{bucket}/store"))
    notes = store.below(PROGRESS)
    notes.write("run-1.json", b"{")
    with pytest.raises(InputError, match="another run is at work"):
        with held(store, PROGRESS):
            raise AssertionError


def test_who_was_taken_over_stops(s3: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_S", 0.05)
    store = remote(s3.url(f"{bucket}/store"))
    notes = store.below(PROGRESS)
    with held(store, PROGRESS) as check:
        name = next(iter(notes.written_at()))
        check()
        with pytest.raises(InputError, match="another run has taken this folder over"):
            for _ in range(200):
                notes.delete(name)  # again and again: a renewal under way may write it once more
                check()
                lease.threading.Event().wait(0.05)


# Credentials


def test_credentials_in_a_url_are_written_nowhere(
    s3: Server, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_pairs(tmp_path / "pairs", ["a/1", "a/2", "b/1"])
    source.pairs()[0].lq.write_bytes(b"no image")  # a line in quarantine.jsonl
    s3.upload(tmp_path / "pairs", f"{bucket}/pairs")
    caplog.set_level(logging.DEBUG)
    secret = "PLANTEDKEY:PLANTED%2FSECRET@"
    there, out = (
        s3.url(f"{bucket}/{name}").replace("s3://", f"s3://{secret}") for name in ("pairs", "store")
    )
    found = find_source(place(there), split="train")

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    told = [str(found.options()), repr(place(there)), repr(folder(out)), str(folder(out))]
    with pytest.raises(KeyboardInterrupt):
        prepare.run(found, found.pairs(), config_for(out), on_progress=stop)
    with pytest.raises(InputError) as other:
        prepare.run(found, found.pairs(), config_for(out, crop_px=16))
    notes = {name: remote(out).read(name) for name in s3.objects(f"{bucket}/store")}
    assert f"{PROGRESS}/job.json" in notes
    result = prepare.run(found, found.pairs(), config_for(out))
    with pytest.raises(InputError) as again:
        prepare.run(found, found.pairs(), config_for(out))
    notes |= {name: remote(out).read(name) for name in s3.objects(f"{bucket}/store")}
    told += [str(other.value), str(again.value), caplog.text, repr(result), str(result.refused)]
    assert result.refused[0]["lq"].startswith(f"s3://{bucket}/pairs/blur/a/1.png?endpoint_override=http://")
    for name, content in [*notes.items(), *enumerate(line.encode() for line in told)]:
        assert b"PLANTED" not in content, name
    assert result.manifest.adapter_options["lq_dir"].startswith(f"s3://{bucket}/pairs/blur?")
    # One who has them reads it all the same.
    assert PairStore(out).digest == PairStore(s3.url(f"{bucket}/store")).digest


# Sources


@pytest.fixture
def layouts(tmp_path: Path) -> Path:
    """The same six pairs as two folders, lists, GoPro, HIDE, RealBlur and REDS."""
    root = tmp_path / "layouts"
    names = [f"s{n // 2}/{n}" for n in range(6)]
    pairs = write_pairs(root / "folders", names).pairs()
    rows = [
        {"lq": f"../folders/blur/{r.key}.png", "gt": f"../folders/sharp/{r.key}.png", "key": r.key}
        for r in pairs
    ]
    (root / "lists").mkdir()
    (root / "lists" / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{row['lq']},{row['gt']}\n" for row in rows]
    (root / "lists" / "list.csv").write_text("lq,gt\n" + "".join(lines))

    def copy(source: Path, target: str) -> None:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / target)

    for ref in pairs:
        scene, name = ref.key.split("/")
        for side, image in (("blur", ref.lq), ("sharp", ref.gt)):
            copy(image, f"gopro/train/{scene}/{side}/{name}.png")
            copy(image, f"reds/train/train_{side}/{scene}/{name}.png")
        copy(ref.lq, f"hide/train/{name}from{scene}.png")
        copy(ref.gt, f"hide/GT/{name}from{scene}.png")
        copy(ref.lq, f"realblur/{scene}/blur/blur_{name}.png")
        copy(ref.gt, f"realblur/{scene}/gt/gt_{name}.png")
    (root / "realblur" / "RealBlur_J_train_list.txt").write_text(
        "".join("{0}/gt/gt_{1}.png {0}/blur/blur_{1}.png\n".format(*name.split("/")) for name in names)
    )
    return root


LAYOUTS = ["folders", "lists/list.jsonl", "lists/list.csv", "gopro", "hide", "realblur", "reds"]


def test_every_layout_is_read_from_a_bucket_as_from_a_disk(
    layouts: Path, s3: Server, bucket: str, tmp_path: Path
) -> None:
    s3.upload(layouts, f"{bucket}/layouts")
    for number, layout in enumerate(LAYOUTS):
        here = find_source(layouts / layout, split="train")
        there = find_source(place(s3.url(f"{bucket}/layouts/{layout}")), split="train")
        assert there.adapter == here.adapter
        refs, others = here.pairs(), there.pairs()
        assert [ref.key for ref in others] == [ref.key for ref in refs] and len(refs) == 6
        if not layout.startswith("lists"):
            assert [ref.scene for ref in others] == [ref.scene for ref in refs]
        if number in (0, 3):
            config = config_for(tmp_path / str(number))
            digest = prepare.run(here, refs, config).manifest.digest
            config = config_for(s3.url(f"{bucket}/stores/{number}"))
            assert prepare.run(there, others, config).manifest.digest == digest


def test_a_data_set_is_listed_once(s3: Server, bucket: str, layouts: Path) -> None:
    s3.upload(layouts, f"{bucket}/layouts")
    before = len(s3.requests())
    refs = find_source(place(s3.url(f"{bucket}/layouts/gopro")), split="train").pairs()
    assert len(refs) == 6
    assert len(s3.requests()) - before <= 2
    before = len(s3.requests())
    assert len(find_source(place(s3.url(f"{bucket}/layouts/lists/list.csv")), split="train").pairs()) == 6
    assert len(s3.requests()) - before <= 5  # the list itself is looked for and read


def test_lists_name_urls_and_never_leave_the_bucket(s3: Server, bucket: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", ["a"])
    url = s3.upload(tmp_path / "pairs", f"{bucket}/pairs")
    lq, gt = (url.replace("/pairs?", f"/pairs/{side}/a.png?") for side in ("blur", "sharp"))
    rows = {"there": {"lq": lq, "gt": gt}, "root": {"lq": "/etc/passwd", "gt": gt}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        remote(url).upload(tmp_path / f"{name}.jsonl", f"{name}.jsonl")
    for root in (tmp_path / "there.jsonl", place(url) / "there.jsonl"):
        (ref,) = find_source(root, split="train").pairs()
        assert ref.key == "pairs/blur/a" and ref.read()[0].shape == (72, 96, 3)
    with pytest.raises(InputError, match="a path from the root"):
        find_source(place(url) / "root.jsonl", split="train").pairs()


def test_what_is_missing_or_bad_in_a_bucket(s3: Server, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"no such folder: 's3://{bucket}/nothing"):
        find_source(place(s3.url(f"{bucket}/nothing")), split="train")
    write_pairs(tmp_path / "pairs", ["a", "b", "c"])
    (tmp_path / "pairs" / "blur" / "b.png").write_bytes(b"no image")
    there = two_sides(*(place(s3.upload(tmp_path / "pairs" / s, f"{bucket}/{s}")) for s in ("blur", "sharp")))
    refs = there.pairs()
    remote(s3.url(bucket)).delete("sharp/c.png")  # since it was listed
    result = prepare.run(there, refs, config_for(tmp_path / "store"))
    reasons = {row["key"]: row["reason"] for row in result.refused}
    assert "not an image" in reasons["b"] and f"s3://{bucket}/blur/b.png" in reasons["b"]
    assert "no such image" in reasons["c"] and result.manifest.num_pairs == 9


def test_lmdbs_are_not_read_from_a_bucket(s3: Server, bucket: str) -> None:
    for side in ("lq", "gt"):
        remote(s3.url(bucket)).write(f"{side}.lmdb/data.mdb", b"x")
    sides = (place(s3.url(f"{bucket}/{side}.lmdb")) for side in ("lq", "gt"))
    with pytest.raises(InputError, match=r"an LMDB is not read from a URL.*Copy both to a disk"):
        two_sides(*sides)


def test_a_pair_in_a_bucket_that_comes_twice(s3: Server, bucket: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", ["a", "b"])
    for side in ("blur", "sharp"):
        shutil.copy(tmp_path / "pairs" / side / "a.png", tmp_path / "pairs" / side / "z.png")
    there = find_source(place(s3.upload(tmp_path / "pairs", f"{bucket}/pairs")), split="train")
    result = prepare.run(there, there.pairs(), config_for(tmp_path / "store"))
    assert [row["key"] for row in result.refused] == ["z"] and "of pair 'a'" in result.refused[0]["reason"]


def test_manifest_is_written_last(pairs: FolderPairs, s3: Server, bucket: str) -> None:
    before = len(s3.requests())
    prepare.run(pairs, pairs.pairs(), config_for(s3.url(f"{bucket}/store")))
    written = [r for r in s3.requests()[before:] if r.startswith("PUT") and "partNumber" in r]
    keys = [request.split("?")[0].rpartition("/")[2] for request in written]
    assert keys[-1] == MANIFEST
    for number in range(3):
        assert keys.index(f"shard-0000{number}.parquet") < keys.index(f"shard-0000{number}.json")
