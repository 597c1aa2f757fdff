from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.images import read_rgb_u8
from pipelines.shards import Pair, write_shard
from pipelines.sources import FolderPairs
from pipelines.store import (
    MANIFEST,
    QUARANTINE,
    SCENES,
    SCHEMA_VERSION,
    SUSPECTS,
    PairStore,
    digest_of,
    shard_info,
)
from tests.pipelines.pairs import make_store, piece

KINDS = [
    {"format": "parquet", "codec": "png"},
    {"format": "lmdb", "codec": "png"},
    {"format": "lmdb", "codec": "raw"},
]
ANY_SHARE = st.floats(0, 1, exclude_max=True)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind.values()))
def each_store(
    request: pytest.FixtureRequest, pairs: FolderPairs, tmp_path_factory: pytest.TempPathFactory
) -> PairStore:
    """The same crops in every format and codec."""
    return make_store(pairs, tmp_path_factory.mktemp("each") / "store", **request.param)


def first_shard(store: PairStore) -> Path:
    return store.root / store.manifest.shards[0].file


# Contents


def test_pixels_keys_and_scenes_are_exact(each_store: PairStore, pairs: FolderPairs) -> None:
    refs, index = pairs.pairs(), 0
    for ref in refs:
        lq, gt = read_rgb_u8(ref.lq), read_rgb_u8(ref.gt)
        assert not np.array_equal(lq, gt)
        for top in (0, 32, 40):
            for left in (0, 32, 64):
                pair = each_store.pair(index)
                window = (slice(top, top + 32), slice(left, left + 32))
                assert (pair.key, pair.scene) == (f"{ref.key}@{top},{left}", ref.scene)
                assert each_store.scene(index) == ref.scene
                assert pair.lq.dtype == pair.gt.dtype == np.uint8
                assert np.array_equal(pair.lq, lq[window]) and np.array_equal(pair.gt, gt[window])
                index += 1
    assert index == len(each_store) == 45


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_is_writable_and_outlives_the_store(
    pairs: FolderPairs, tmp_path: Path, kind: dict[str, Any]
) -> None:
    # A view into the memory map would crash the process once the map is gone.
    store = make_store(pairs, tmp_path / "store", **kind)
    pair, patch = store.pair(3), store.patch(3, 0.2, 0.9, 16)
    del store
    again = PairStore(tmp_path / "store")
    assert np.array_equal(patch[0], again.patch(3, 0.2, 0.9, 16)[0])
    assert all(side.flags.writeable for side in (pair.lq, pair.gt, *patch))
    np.bitwise_xor(pair.lq, 255, out=pair.lq)
    assert not np.array_equal(pair.lq, again.pair(3).lq)


@given(
    index=st.integers(0, 44), top_share=ANY_SHARE, left_share=ANY_SHARE, patch_px=st.sampled_from([1, 13, 32])
)
def test_patch_is_a_crop_of_the_pair(
    each_store: PairStore, index: int, top_share: float, left_share: float, patch_px: int
) -> None:
    top, left = (int(share * (32 - patch_px + 1)) for share in (top_share, left_share))
    window = (slice(top, top + patch_px), slice(left, left + patch_px))
    pair, patch = each_store.pair(index), each_store.patch(index, top_share, left_share, patch_px)
    assert patch[0].shape == patch[1].shape == (patch_px, patch_px, 3)
    assert np.array_equal(patch[0], pair.lq[window]) and np.array_equal(patch[1], pair.gt[window])


def test_patches_reach_every_corner(each_store: PairStore) -> None:
    pair, almost_one = each_store.pair(0), np.nextafter(1.0, 0)
    assert np.array_equal(each_store.patch(0, 0, 0, 8)[0], pair.lq[:8, :8])
    assert np.array_equal(each_store.patch(0, almost_one, almost_one, 8)[0], pair.lq[-8:, -8:])
    assert np.array_equal(each_store.patch(0, 0, almost_one, 8)[1], pair.gt[:8, -8:])


@pytest.mark.parametrize("index", [-1, 45, 10**9])
def test_there_is_no_such_pair(each_store: PairStore, index: int) -> None:
    with pytest.raises(IndexError):
        each_store.pair(index)


# Digest and manifest


def test_digest_is_that_of_the_pixels_only(
    each_store: PairStore, store: PairStore, pairs: FolderPairs, tmp_path: Path
) -> None:
    assert each_store.digest == store.digest == each_store.manifest.digest
    options = {"format": each_store.manifest.format, "codec": each_store.manifest.codec}
    other = make_store(pairs, tmp_path / "store", pairs_per_shard=1, name="other", split="test", **options)
    assert len(other.manifest.shards) == 5
    assert other.digest == store.digest


def test_digest_can_be_taken_again_from_what_is_read(each_store: PairStore) -> None:
    # So a report can be checked against the store, long after.
    digests = [each_store.pair(index).digest() for index in range(len(each_store))]
    assert digest_of(b"".join(digests)) == each_store.digest
    assert digest_of(b"".join(digests[::-1])) != each_store.digest


def test_digest_tells_any_change_of_a_pair() -> None:
    pair = Pair(key="k", scene="s", lq=piece(0, 4, 6), gt=piece(1, 4, 6))
    changed = pair.gt.copy()
    changed[3, 5, 2] ^= 1
    others = [
        Pair(key="k2", scene="s", lq=pair.lq, gt=pair.gt),
        Pair(key="k", scene="s2", lq=pair.lq, gt=pair.gt),
        Pair(key="k", scene="s", lq=pair.gt, gt=pair.lq),
        Pair(key="k", scene="s", lq=pair.lq, gt=changed),
        Pair(key="k", scene="s", lq=pair.lq.reshape(6, 4, 3), gt=pair.gt.reshape(6, 4, 3)),
    ]
    assert len({pair.digest(), *(other.digest() for other in others)}) == 6
    # A view that is not contiguous is the same pixels.
    view = Pair(key="k", scene="s", lq=pair.lq[::-1][::-1], gt=np.asfortranarray(pair.gt))
    assert view.digest() == pair.digest()


def test_manifest_tells_the_truth(each_store: PairStore) -> None:
    manifest = each_store.manifest
    assert manifest.schema_version == SCHEMA_VERSION
    assert (manifest.num_pairs, manifest.num_refused, manifest.min_side_px) == (45, 0, 32)
    assert (manifest.crop_px, manifest.stride_px, manifest.color) == (32, 32, "RGB")
    assert [shard.pairs for shard in manifest.shards] == [18, 18, 9]
    for shard in manifest.shards:
        content = (each_store.root / shard.file).read_bytes()
        assert shard.bytes == len(content)
        assert shard.sha256 == hashlib.sha256(content).hexdigest()
    files = {path.name for path in each_store.root.iterdir()}
    assert files == {MANIFEST, QUARANTINE, SUSPECTS, SCENES, *(shard.file for shard in manifest.shards)}


def test_parquet_is_read_by_other_tools(store: PairStore) -> None:
    table = pq.read_table(first_shard(store))
    assert table.column_names == ["key", "scene", "height_px", "width_px", "lq", "gt"]
    assert table["lq"][0].as_py().startswith(b"\x89PNG")
    # One row group a pair: a reader of one pair reads no other.
    assert pq.ParquetFile(first_shard(store)).num_row_groups == 18


def test_small_pairs_are_stored_once(tmp_path: Path) -> None:
    # Statistics of a column held each PNG of up to 4 KiB twice more.
    pairs = [Pair(key=str(n), scene="s", lq=piece(n, 32, 32), gt=piece(n, 32, 32)) for n in range(8)]
    path = tmp_path / "shard.parquet"
    write_shard(path, pairs, format="parquet", codec="png")
    table = pq.read_table(path)
    pngs = sum(len(value.as_py()) for side in ("lq", "gt") for value in table[side])
    assert path.stat().st_size < 1.5 * pngs


def test_lmdb_holds_no_pickle(pairs: FolderPairs, tmp_path: Path) -> None:
    store = make_store(pairs, tmp_path / "store", format="lmdb", codec="raw")
    with lmdb.open(str(first_shard(store)), subdir=False, readonly=True, lock=False) as env:
        with env.begin() as transaction:
            entries = dict(transaction.cursor())
    assert json.loads(entries.pop(b"index"))[0] == ["a/1@0,0", "a", 32, 32]
    assert {len(value) for value in entries.values()} == {32 * 32 * 3}
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(next(iter(entries.values())))


@pytest.mark.parametrize("kind", KINDS)
def test_shard_of_nothing_and_shard_that_fails(tmp_path: Path, kind: dict[str, Any]) -> None:
    assert write_shard(tmp_path / "empty", [], **kind) == (0, b"", 0)
    assert shard_info(tmp_path / "empty", 0).pairs == 0

    def failing() -> Any:
        yield Pair(key="k", scene="s", lq=piece(0, 4, 4), gt=piece(1, 4, 4))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_shard(tmp_path / "half", failing(), **kind)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_may_be_opened_twice(
    pairs: FolderPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    # One store twice in a mixture, blurred in two ways; and behind a link.
    one, other = make_store(pairs, tmp_path / "store", **kind), PairStore(tmp_path / "store")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    for index in (0, 40, 3):
        for again in (other, PairStore(tmp_path / "link")):
            assert np.array_equal(one.pair(index).gt, again.pair(index).gt)
    # Few are kept open; the other store's stay usable.
    monkeypatch.setattr("pipelines.store._MOST_OPEN", 1)
    few = PairStore(tmp_path / "store")
    for index in (0, 40, 3, 44):
        assert np.array_equal(few.pair(index).gt, one.pair(index).gt)
        assert len(few._open) == 1


def test_lmdb_grows_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.shards._LMDB_START_BYTES", 2**16)
    pairs = [Pair(key=str(n), scene="s", lq=piece(n), gt=piece(n + 1)) for n in range(12)]
    count, digests, _ = write_shard(tmp_path / "shard", pairs, format="lmdb", codec="raw")
    assert (count, len(digests)) == (12, 12 * 32)
    assert (tmp_path / "shard").stat().st_size > 2**18
