from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import ray.data
from ray.exceptions import RayTaskError

from nafnet_core import InputError
from pipelines.lmdb_source import LmdbPairSource, read_lmdb_pairs
from pipelines.png import decode_png, encode_png
from pipelines.sources import FolderPairs
from pipelines.sources.lmdbs import opened_lmdb
from pipelines.store import opened_store
from tests.pipelines.pairs import make_store, write_pairs
from tests.pipelines.test_sources_lmdbs import write_lmdb

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def in_order(ray_session: None) -> Iterator[None]:
    options = ray.data.DataContext.get_current().execution_options
    options.preserve_order = True
    yield
    options.preserve_order = False


@pytest.fixture(scope="module", params=["png", "raw"])
def store(request: pytest.FixtureRequest, pairs: FolderPairs, tmp_path_factory: Any) -> Path:
    """45 crops of 32 px in three LMDB shards of 18, 18 and 9."""
    folder = tmp_path_factory.mktemp("lmdb") / request.param
    return make_store(pairs, folder, format="lmdb", codec=request.param).root


@pytest.fixture
def sizes(tmp_path: Path) -> FolderPairs:
    """Six pairs of three sizes."""
    for number, (height, width) in enumerate([(40, 48), (48, 40), (64, 64)]):
        write_pairs(tmp_path / "sizes", [f"{number}/a", f"{number}/b"], height=height, width=width)
    return FolderPairs(lq_dir=tmp_path / "sizes" / "blur", gt_dir=tmp_path / "sizes" / "sharp")


def as_lmdbs(source: FolderPairs, root: Path) -> tuple[Path, Path]:
    root.mkdir(exist_ok=True)
    sides: dict[str, dict[str, bytes]] = {"lq": {}, "gt": {}}
    for ref in source.pairs():
        for side, image in zip(sides, ref.read(), strict=True):
            sides[side][ref.key] = encode_png(image)
    lq, gt = (write_lmdb(root / f"{side}.lmdb", values) for side, values in sides.items())
    return lq, gt


def assert_holds(dataset: ray.data.Dataset, expected: list[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    rows = dataset.take_all()
    assert [row["key"] for row in rows] == [key for key, *_ in expected]
    for row, (_, scene, lq, gt) in zip(rows, expected, strict=True):
        assert row["scene"] == scene and row["lq"].dtype == np.uint8
        assert np.array_equal(row["lq"], lq) and np.array_equal(row["gt"], gt)


def of_store(root: Path) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    read = opened_store(root.resolve())  # as LMDB opens a file once a process
    return [(p.key, p.scene, p.lq, p.gt) for p in (read.pair(i) for i in range(len(read)))]


def message(dataset: ray.data.Dataset) -> str:
    with pytest.raises(RayTaskError) as caught:
        dataset.take_all()
    assert isinstance(caught.value.cause, InputError)
    # Ray Data writes advice of its own below our line.
    return str(caught.value.cause).splitlines()[0]


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 1000])
def test_pixels_and_order_of_a_store(store: Path, num_tasks: int) -> None:
    # Two tasks of 22 and 23 pairs cross the shards' ends at 18 and 36; a thousand are more than keys.
    dataset = read_lmdb_pairs(store, override_num_blocks=num_tasks)
    assert_holds(dataset, of_store(store))


def test_ranges_cover_every_key_once(store: Path) -> None:
    source = LmdbPairSource(store)
    for parallelism in (1, 2, 7, 44, 45, 46, 1000):
        tasks = source.get_read_tasks(parallelism)
        rows = [task.metadata.num_rows for task in tasks]
        assert len(tasks) == min(parallelism, 45)
        assert sum(rows) == 45 and max(rows) - min(rows) <= 1
        assert sum(task.metadata.size_bytes for task in tasks) == source.estimate_inmemory_data_size()
    assert source.estimate_inmemory_data_size() == 45 * 6 * 32 * 32


def test_planning_opens_no_lmdb(store: Path, tmp_path: Path) -> None:
    shutil.copy(store / "manifest.json", tmp_path)
    dataset = read_lmdb_pairs(tmp_path, override_num_blocks=3)
    assert dataset.count() == 45
    assert "a missing or damaged shard" in message(dataset)


def test_blocks_of_the_size_that_ray_wants(store: Path) -> None:
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 10 * 6 * 32 * 32
    (task,) = LmdbPairSource(store).get_read_tasks(1, data_context=context)
    assert [len(block["key"]) for block in task()] == [11, 11, 11, 11, 1]
    (task,) = LmdbPairSource(store).get_read_tasks(1, per_task_row_limit=4)
    assert sum(len(block["key"]) for block in task()) == 4


@pytest.mark.parametrize("codec", ["png", "raw"])
def test_sizes_may_differ(sizes: FolderPairs, tmp_path: Path, codec: str) -> None:
    root = make_store(sizes, tmp_path / "store", crop_px=None, format="lmdb", codec=codec).root
    expected = [(ref.key, ref.scene, *ref.read()) for ref in sizes.pairs()]
    # Of one size within a block and another in the next; then all in one block.
    for num_tasks in (3, 1):
        assert_holds(read_lmdb_pairs(root, override_num_blocks=num_tasks), expected)
    areas = read_lmdb_pairs(root).map(lambda row: {"area": row["gt"].shape[0] * row["gt"].shape[1]})
    assert areas.sum("area") == 4 * 40 * 48 + 2 * 64 * 64


def test_one_pair(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "one", ["only"])
    root = make_store(source, tmp_path / "store", crop_px=None, format="lmdb").root
    dataset = read_lmdb_pairs(root, override_num_blocks=8)
    assert dataset.count() == 1
    assert_holds(dataset, of_store(root))


def test_lmdbs_as_basicsr_writes_them(sizes: FolderPairs, tmp_path: Path) -> None:
    lq, gt = as_lmdbs(sizes, tmp_path / "basicsr")
    expected = [(ref.key, ref.scene, *ref.read()) for ref in sizes.pairs()]
    for num_tasks in (1, 4, 50):
        assert_holds(read_lmdb_pairs(str(lq), str(gt), override_num_blocks=num_tasks), expected)
    # `write_lmdb` lists every image as 72×96.
    assert LmdbPairSource(lq, gt).estimate_inmemory_data_size() == 6 * 6 * 72 * 96


def test_encoded_bytes(sizes: FolderPairs, store: Path, tmp_path: Path) -> None:
    lq, gt = as_lmdbs(sizes, tmp_path / "basicsr")
    rows = read_lmdb_pairs(lq, gt, decode=False).take_all()
    for row, ref in zip(rows, sizes.pairs(), strict=True):
        blurred, sharp = ref.read()
        assert isinstance(row["lq"], bytes)
        assert np.array_equal(decode_png(row["lq"]), blurred) and np.array_equal(decode_png(row["gt"]), sharp)
    if store.name == "raw":
        with pytest.raises(InputError, match="raw pixels are not encoded"):
            read_lmdb_pairs(store, decode=False)
    else:
        rows = read_lmdb_pairs(store, decode=False).take_all()
        assert np.array_equal(decode_png(rows[20]["gt"]), of_store(store)[20][3])


def test_faults_are_one_line_that_names_the_key(sizes: FolderPairs, tmp_path: Path) -> None:
    keys = [ref.key for ref in sizes.pairs()]
    whole = {ref.key: encode_png(ref.read()[0]) for ref in sizes.pairs()}
    _, gt = as_lmdbs(sizes, tmp_path / "whole")

    def faulty(name: str, value: bytes | None) -> str:
        values = {**whole, keys[4]: value} if value else {k: v for k, v in whole.items() if k != keys[4]}
        root = write_lmdb(tmp_path / name, values)  # type: ignore[arg-type]
        (root / "meta_info.txt").write_text("".join(f"{key}.png (40,48,3) 1\n" for key in keys))
        return message(read_lmdb_pairs(root, gt, override_num_blocks=2))

    assert "listed, but not in the LMDB" in (text := faulty("missing", None)) and f"missing#{keys[4]}" in text
    assert "a damaged image" in (text := faulty("damaged", whole[keys[4]][:20])) and keys[4] in text
    assert "pickled objects" in faulty("pickled", pickle.dumps(np.zeros(3)))
    assert (
        "differ in size" in (text := faulty("other", whole[keys[0]])) and "expected 64×64, got 48×40" in text
    )
    text = message(read_lmdb_pairs(tmp_path / "pickled", gt, decode=False))
    assert "pickled objects" in text


def test_damaged_stores(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "cut")
    shard = tmp_path / "cut" / "shard-00001.lmdb"
    shard.write_bytes(shard.read_bytes()[:-4096])
    assert "shard-00001.lmdb" in (text := message(read_lmdb_pairs(tmp_path / "cut"))) and "bytes" in text
    # A pair that the index lists is taken out.
    shutil.copytree(store, tmp_path / "less")
    shard = tmp_path / "less" / "shard-00000.lmdb"
    with lmdb.open(str(shard), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        assert transaction.delete(b"00000003/gt")
    text = message(read_lmdb_pairs(tmp_path / "less"))
    assert "shard-00000.lmdb" in text and ("SHA-256" in text or "bytes instead of" in text)


def test_what_is_no_pair_of_lmdbs(sizes: FolderPairs, tmp_path: Path, own_store: Path) -> None:
    lq, _ = as_lmdbs(sizes, tmp_path / "basicsr")
    for arguments, words in (
        ((own_store,), "a store of another format.*got parquet.*--format lmdb"),
        ((lq,), "one side of a pair"),
        ((tmp_path / "nothing",), "no such store"),
        ((lq, tmp_path), "not an LMDB"),
        ((tmp_path,), "not a store"),
    ):
        with pytest.raises(InputError, match=words):
            read_lmdb_pairs(*arguments)


def test_a_process_opens_each_file_once(sizes: FolderPairs, tmp_path: Path) -> None:
    lq, gt = as_lmdbs(sizes, tmp_path / "basicsr")
    before = opened_lmdb(lq.resolve())
    for task in LmdbPairSource(lq, gt).get_read_tasks(3):
        list(task())
    assert opened_lmdb(lq.resolve()) is before
