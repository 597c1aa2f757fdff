from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nafnet_core import InputError
from pipelines import prepare
from pipelines.images import read_rgb_u8
from pipelines.png import encode_png
from pipelines.prepare import PrepareConfig
from pipelines.sources import FolderPairs
from pipelines.store import MANIFEST, PROGRESS, QUARANTINE, SCENES, SUSPECTS, PairStore
from tests.pipelines.pairs import blurred, make_store, piece, write_pairs

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"s{number // 2}/{number}" for number in range(6)]


@pytest.fixture
def source(tmp_path: Path) -> FolderPairs:
    """Six pairs of 96×72 in three scenes; ours to damage."""
    return write_pairs(tmp_path / "pairs", NAMES)


def config_for(out: Path, **options: Any) -> PrepareConfig:
    config = PrepareConfig(out=out, crop_px=32, stride_px=32, pairs_per_shard=2, use_ray=False)
    return replace(config, **options)


def quarantine(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / QUARANTINE).read_text().splitlines()]


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# Crops


@pytest.mark.parametrize(
    ("crop", "stride", "remainder", "tops", "lefts"),
    [
        (32, 32, 0, [0, 32, 40], [0, 32, 64]),
        (32, 16, 0, [0, 16, 32, 40], [0, 16, 32, 48, 64]),
        (72, 24, 0, [0], [0, 24]),
        (32, 32, 8, [0, 32], [0, 32, 64]),  # the 8 rows that remain are dropped
        (32, 32, 7, [0, 32, 40], [0, 32, 64]),
    ],
)
def test_crops(
    source: FolderPairs,
    tmp_path: Path,
    crop: int,
    stride: int,
    remainder: int,
    tops: list[int],
    lefts: list[int],
) -> None:
    options = {"crop_px": crop, "stride_px": stride, "min_remainder_px": remainder}
    store = make_store(source, tmp_path / "store", **options)
    corners = [(top, left) for top in tops for left in lefts]
    assert len(store) == 6 * len(corners)
    assert store.manifest.min_remainder_px == remainder
    whole = read_rgb_u8(source.pairs()[0].gt)
    rebuilt = np.zeros_like(whole)
    for index, (top, left) in enumerate(corners):
        pair = store.pair(index)
        assert pair.key == f"s0/0@{top},{left}"
        rebuilt[top : top + crop, left : left + crop] = pair.gt
    covered = 72 if remainder < 8 else 64
    assert np.array_equal(rebuilt[:covered], whole[:covered])


def test_whole_images(source: FolderPairs, tmp_path: Path) -> None:
    store = make_store(source, tmp_path / "store", crop_px=None, split="test")
    assert len(store) == 6
    manifest = store.manifest
    assert (manifest.crop_px, manifest.stride_px, manifest.min_side_px) == (None, None, 72)
    assert manifest.min_remainder_px is None
    ref = source.pairs()[5]
    assert store.pair(5).key == "s2/5"
    assert np.array_equal(store.pair(5).lq, read_rgb_u8(ref.lq))


def test_whole_images_of_many_sizes(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", ["large"], height=80, width=90)
    source = write_pairs(tmp_path / "pairs", ["small"], height=40, width=51)
    store = make_store(source, tmp_path / "store", crop_px=None, format="lmdb", codec="raw")
    assert [store.pair(index).lq.shape for index in (0, 1)] == [(80, 90, 3), (40, 51, 3)]
    assert store.manifest.min_side_px == 40


def test_manifest_says_where_it_came_from(source: FolderPairs, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = prepare.run(
        source,
        source.pairs(),
        config_for(tmp_path / "mine", split="test"),
        on_progress=lambda done, total: steps.append((done, total)),
    )
    manifest = result.manifest
    assert manifest == PairStore(tmp_path / "mine").manifest
    assert (manifest.name, manifest.split, manifest.adapter) == ("mine", "test", "folders")
    assert manifest.adapter_options == source.options() and manifest.licence == source.licence
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    named = config_for(tmp_path / "other", name="named")
    assert prepare.run(source, source.pairs(), named).manifest.name == "named"


# Bad pairs


def test_bad_pairs_go_to_quarantine(source: FolderPairs, tmp_path: Path) -> None:
    refs = source.pairs()
    truncate(refs[0].lq)
    refs[2].gt.write_bytes(encode_png(piece(0, 72, 95)))
    for path, image in ((refs[3].lq, blurred(piece(1, 31, 96))), (refs[3].gt, piece(1, 31, 96))):
        path.write_bytes(encode_png(image))
    refs[5].gt.write_text("no image")
    result = prepare.run(source, refs, config_for(tmp_path / "store"))
    rows = quarantine(tmp_path / "store")
    assert list(result.refused) == rows and result.manifest.num_refused == 4
    assert [row["key"] for row in rows] == ["s0/0", "s1/2", "s1/3", "s2/5"]
    assert [row["lq"] for row in rows] == [str(refs[number].lq) for number in (0, 2, 3, 5)]
    reasons = [row["reason"] for row in rows]
    assert "truncated" in reasons[0] and str(refs[0].lq) in reasons[0]
    assert "differ in size" in reasons[1] and "95×72" in reasons[1] and "96×72" in reasons[1]
    assert "smaller than a crop" in reasons[2] and "96×31" in reasons[2] and "--crop" in reasons[2]
    assert "not an image" in reasons[3] and str(refs[5].gt) in reasons[3]
    # The shard of pairs 2 and 3 holds nothing, so it is none; what is left is as if the rest were all.
    assert [shard.file for shard in result.manifest.shards] == ["shard-00000.parquet", "shard-00002.parquet"]
    alone = prepare.run(source, [refs[1], refs[4]], config_for(tmp_path / "alone"))
    assert result.manifest.digest == alone.manifest.digest


def test_strict_stops_at_the_first_bad_pair(source: FolderPairs, tmp_path: Path) -> None:
    refs = source.pairs()
    truncate(refs[3].gt)
    with pytest.raises(InputError, match=r"truncated image: .*sharp/s1/3\.png"):
        prepare.run(source, refs, config_for(tmp_path / "store", strict=True))
    assert not (tmp_path / "store" / MANIFEST).exists()
    # Without it the same job goes on to its end.
    assert prepare.run(source, refs, config_for(tmp_path / "store")).manifest.num_refused == 1


def test_no_usable_pair_and_what_follows_once_it_is_repaired(source: FolderPairs, tmp_path: Path) -> None:
    ref = source.pairs()[0]
    whole = ref.lq.read_bytes()
    truncate(ref.lq)
    with pytest.raises(InputError, match=r"no usable pair among \d+; the first: .*truncated"):
        prepare.run(source, [ref], config_for(tmp_path / "store"))
    assert not (tmp_path / "store" / MANIFEST).exists()
    ref.lq.write_bytes(whole)
    assert prepare.run(source, [ref], config_for(tmp_path / "store")).manifest.num_pairs == 9


def test_no_pairs_at_all(source: FolderPairs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable pair"):
        prepare.run(source, [], config_for(tmp_path / "store"))


# Options and places that cannot be


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"codec": "raw"}, "codec raw needs --format lmdb"),
        ({"crop_px": 0}, "crop and stride must be positive"),
        ({"crop_px": -32}, "crop and stride must be positive"),
        ({"stride_px": 0}, "crop and stride must be positive"),
        ({"pairs_per_shard": 0}, "pairs per shard must be at least 1"),
    ],
)
def test_impossible_options(source: FolderPairs, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        prepare.run(source, source.pairs(), config_for(tmp_path / "store", **options))
    assert not (tmp_path / "store").exists()


def test_finished_store_is_left_alone(source: FolderPairs, tmp_path: Path) -> None:
    make_store(source, tmp_path / "store")
    before = {path: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    with pytest.raises(InputError, match="finished store already.*another --out"):
        make_store(source, tmp_path / "store")
    assert {path: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


def test_place_that_cannot_be_written(source: FolderPairs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write into this folder"):
        make_store(source, tmp_path / "file" / "store")


# Going on


class InterruptedTestError(Exception):
    """Stands for Ctrl-C."""


def interrupt(source: FolderPairs, config: PrepareConfig, *, after: int) -> None:
    def stop(done: int, total: int) -> None:
        if done == after:
            raise InterruptedTestError

    with pytest.raises(InterruptedTestError):
        prepare.run(source, source.pairs(), config, on_progress=stop)
    assert not (config.out / MANIFEST).exists()


@pytest.mark.parametrize("format", ["parquet", "lmdb"])
def test_interrupted_job_goes_on(source: FolderPairs, tmp_path: Path, format: Any) -> None:
    out = tmp_path / "store"
    config = config_for(out, format=format)
    truncate(source.pairs()[0].lq)
    interrupt(source, config, after=2)
    first = out / f"shard-00000.{format}"
    written = first.stat().st_mtime_ns
    steps: list[int] = []
    # What does not change the pairs may differ from the first time.
    again = replace(config, strict=True, use_ray=True)
    result = prepare.run(source, source.pairs(), again, on_progress=lambda done, total: steps.append(done))
    assert steps == [2, 3]
    assert first.stat().st_mtime_ns == written, "a finished shard was written again"
    # Refused pairs of shards written before are still told.
    assert [row["key"] for row in quarantine(out)] == ["s0/0"]
    whole = prepare.run(source, source.pairs(), config_for(tmp_path / "whole", format=format))
    assert result.manifest.digest == whole.manifest.digest
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.out.iterdir()}


@pytest.mark.parametrize("lost", ["shard", "note", "end of the shard"])
def test_half_finished_shard_is_written_again(source: FolderPairs, tmp_path: Path, lost: str) -> None:
    config = config_for(tmp_path / "store")
    interrupt(source, config, after=2)
    files = {"shard": "shard-00001.parquet", "note": ".progress/shard-00001.json"}
    if lost in files:
        (config.out / files[lost]).unlink()
    else:
        os.truncate(config.out / files["shard"], 100)
    result = prepare.run(source, source.pairs(), config)
    whole = make_store(source, tmp_path / "whole")
    assert result.manifest.digest == whole.digest
    store = PairStore(config.out)
    assert [store.pair(n).digest() for n in range(54)] == [whole.pair(n).digest() for n in range(54)]


def test_unfinished_store_of_another_job_is_refused(source: FolderPairs, tmp_path: Path) -> None:
    out = tmp_path / "store"
    interrupt(source, config_for(out), after=1)
    for other in (
        config_for(out, crop_px=16),
        config_for(out, format="lmdb"),
        config_for(out, split="test"),
        config_for(out, pairs_per_shard=3),
    ):
        with pytest.raises(InputError, match="unfinished store of other data or options"):
            prepare.run(source, source.pairs(), other)
    with pytest.raises(InputError, match="unfinished store of other data or options"):
        prepare.run(source, source.pairs()[1:], config_for(out))
    elsewhere = write_pairs(tmp_path / "elsewhere", NAMES)
    with pytest.raises(InputError, match="unfinished store of other data or options"):
        prepare.run(elsewhere, elsewhere.pairs(), config_for(out))
    assert prepare.run(source, source.pairs(), config_for(out)).manifest.num_pairs == 54


def test_what_differs_from_an_unfinished_store_is_named(source: FolderPairs, tmp_path: Path) -> None:
    interrupt(source, config_for(tmp_path / "store"), after=1)
    with pytest.raises(InputError, match=r"expected crop_px \d+, got crop_px 16\)"):
        prepare.run(source, source.pairs(), config_for(tmp_path / "store", crop_px=16))


def test_nothing_written_yet_is_no_store_to_protect(source: FolderPairs, tmp_path: Path) -> None:
    # A crop that is too large, stopped at the first pair: the corrected command must not be refused.
    out = tmp_path / "store"
    with pytest.raises(InputError, match="smaller than a crop"):
        prepare.run(source, source.pairs(), config_for(out, crop_px=4096, strict=True))
    result = prepare.run(source, source.pairs(), config_for(out))
    assert result.manifest.digest == make_store(source, tmp_path / "whole").digest


_HOLDING_JOB = """
import sys, time
from pathlib import Path
from pipelines.files import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_run_at_a_time_and_no_lock_outlives_its_holder(source: FolderPairs, tmp_path: Path) -> None:
    lock = tmp_path / "store" / PROGRESS / "lock"
    arguments = [sys.executable, "-c", _HOLDING_JOB, str(lock)]
    job = subprocess.Popen(
        arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    try:
        assert job.stdout is not None and job.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another run is at work") as caught:
            make_store(source, tmp_path / "store")
        assert caught.value.exit_code == 2
        assert not list((tmp_path / "store").glob("shard-*"))
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert job.stdout is not None
        job.stdout.close()
    assert lock.exists()
    assert make_store(source, tmp_path / "store").digest == make_store(source, tmp_path / "whole").digest


_HANGING_JOB = """
import sys, time
from pathlib import Path
from pipelines import prepare
from pipelines.sources import FolderPairs
from tests.pipelines.test_prepare import config_for

pairs, out, format = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
read = prepare._read_pair

def hang_at_the_fourth(ref, config):
    if ref.key == "s1/3":
        (out / "hanging").touch()
        time.sleep(600)
    return read(ref, config)

prepare._read_pair = hang_at_the_fourth
source = FolderPairs(lq_dir=pairs / "blur", gt_dir=pairs / "sharp")
prepare.run(source, source.pairs(), config_for(out, format=format))
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "lmdb"])
def test_killed_job_goes_on(source: FolderPairs, tmp_path: Path, format: Any) -> None:
    # Killed in the middle of the second shard, with no chance to clean up.
    out = tmp_path / "store"
    refs = source.pairs()
    truncate(refs[0].lq)
    shutil.copy(refs[1].gt, refs[1].lq)  # suspect
    arguments = [sys.executable, "-c", _HANGING_JOB, str(source.lq_dir.parent), str(out), format]
    job = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 120
        while not (out / "hanging").exists():
            assert job.poll() is None and time.monotonic() < deadline, "the job did not get that far"
            time.sleep(0.05)
        # While it is at it nobody else may be.
        with pytest.raises(InputError, match="another run is at work in this folder: .*store'.*Wait for it"):
            make_store(source, out, format=format)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    (out / "hanging").unlink()
    assert any(path.name.endswith(".tmp") for path in out.iterdir())
    with pytest.raises(InputError, match="an unfinished store.*Run the same"):
        PairStore(out)
    store = make_store(source, out, format=format)
    whole = make_store(source, tmp_path / "whole", format=format)
    assert store.digest == whole.digest
    for name in (QUARANTINE, SUSPECTS, SCENES):
        assert (out / name).read_text() == (whole.root / name).read_text() != ""
    # Half a shard would lie there for ever.
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.root.iterdir()}


# Through Ray


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_through_ray(source: FolderPairs, tmp_path: Path) -> None:
    truncate(source.pairs()[1].lq)
    config = config_for(tmp_path / "ray", use_ray=True)
    with pytest.raises(InputError, match=r"truncated image: .*blur/s0/1\.png"):
        prepare.run(source, source.pairs(), replace(config, strict=True))
    by_ray = prepare.run(source, source.pairs(), config)
    alone = prepare.run(source, source.pairs(), config_for(tmp_path / "alone"))
    assert by_ray.manifest.digest == alone.manifest.digest
    assert [shard.sha256 for shard in by_ray.manifest.shards] == [
        shard.sha256 for shard in alone.manifest.shards
    ]
    assert by_ray.refused == alone.refused and len(by_ray.refused) == 1
