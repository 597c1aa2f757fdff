from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import lmdb
import pytest

from nafnet_core import InputError
from pipelines.files import sha256
from pipelines.png import encode_png
from pipelines.sources import FolderPairs
from pipelines.store import MANIFEST, PROGRESS, SCHEMA_VERSION, PairStore
from tests.pipelines.pairs import make_store

KINDS = {
    "parquet-png": {"format": "parquet", "codec": "png"},
    "lmdb-png": {"format": "lmdb", "codec": "png"},
    "lmdb-raw": {"format": "lmdb", "codec": "raw"},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def root(request: pytest.FixtureRequest, pairs: FolderPairs, tmp_path: Path) -> Path:
    """A store of every kind to damage."""
    return make_store(pairs, tmp_path / "store", **request.param).root


def shard_of(root: Path) -> Path:
    return next(root.glob("shard-00000.*"))


def edit_manifest(root: Path, **changes: Any) -> None:
    content = json.loads((root / MANIFEST).read_text())
    (root / MANIFEST).write_text(json.dumps(content | changes))


def accept(root: Path) -> None:
    """Make the manifest agree with what the first shard is now: the next line of defence must tell."""
    shards = json.loads((root / MANIFEST).read_text())["shards"]
    shards[0]["bytes"] = shard_of(root).stat().st_size
    shards[0]["sha256"] = sha256(shard_of(root))
    edit_manifest(root, shards=shards)


def assert_refused(root: Path) -> None:
    """Whichever way the first pair is read, one line names the shard and says what to do."""
    reads = (
        lambda store: store.pair(0),
        lambda store: store.patch(0, 0.5, 0.5, 8),
        lambda store: [store.pair(index) for index in range(len(store))],
    )
    for read in reads:
        with pytest.raises(InputError, match=r"missing or damaged shard: '.*shard-00000") as caught:
            read(PairStore(root))
        assert "prepare it again" in str(caught.value) and "\n" not in str(caught.value)


# Shards


def test_missing_shard(root: Path) -> None:
    shard_of(root).unlink()
    assert_refused(root)
    # The other shards serve on.
    assert PairStore(root).pair(20).key


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.999])
def test_truncated_shard(root: Path, share: float) -> None:
    # Read through the memory map, what lies beyond the end would kill the process, and pytest with it.
    content = shard_of(root).read_bytes()
    shard_of(root).write_bytes(content[: int(share * len(content))])
    assert_refused(root)


def test_shard_with_something_behind_it(root: Path) -> None:
    with shard_of(root).open("ab") as file:
        file.write(b"more")
    assert_refused(root)


def test_shard_whose_ends_are_overwritten(root: Path) -> None:
    # Parquet keeps its directory at the end, LMDB at the start.
    content = bytearray(shard_of(root).read_bytes())
    content[:8192] = bytes(8192)
    content[-64:] = bytes(64)
    shard_of(root).write_bytes(content)
    assert_refused(root)
    accept(root)
    assert_refused(root)


def test_shard_of_zeros(root: Path) -> None:
    # What a crash of some file systems leaves: the size, and none of the content.
    shard_of(root).write_bytes(bytes(shard_of(root).stat().st_size))
    assert_refused(root)
    accept(root)
    assert_refused(root)


@pytest.mark.parametrize("kind", ["parquet-png", "lmdb-png"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_bytes_flipped_in_an_image(pairs: FolderPairs, tmp_path: Path, kind: str, share: float) -> None:
    store = make_store(pairs, tmp_path / "store", **KINDS[kind])
    image = encode_png(store.pair(0).lq)
    del store
    content = bytearray(shard_of(tmp_path / "store").read_bytes())
    at = content.index(image) + int(share * len(image))
    content[at : at + 32] = bytes(value ^ 0xFF for value in content[at : at + 32])
    shard_of(tmp_path / "store").write_bytes(content)
    assert_refused(tmp_path / "store")
    accept(tmp_path / "store")
    assert_refused(tmp_path / "store")


def test_a_bit_flipped_in_raw_pixels(pairs: FolderPairs, tmp_path: Path) -> None:
    # A reader of a patch touches its pixels only and could not tell: the shard is checked as a whole, once.
    store = make_store(pairs, tmp_path / "store", **KINDS["lmdb-raw"])
    pair = store.pair(0)
    del store
    shard = shard_of(tmp_path / "store")
    content = bytearray(shard.read_bytes())
    content[content.index(pair.lq.tobytes()) + 100] ^= 1
    shard.write_bytes(content)
    assert_refused(tmp_path / "store")


@pytest.mark.parametrize("kind", ["lmdb-png", "lmdb-raw"])
def test_lmdb_of_pickled_pairs_is_refused(pairs: FolderPairs, tmp_path: Path, kind: str) -> None:
    # A common recipe elsewhere. Unpickling a stranger's file would run the stranger's code.
    root = make_store(pairs, tmp_path / "store", **KINDS[kind]).root
    shard = shard_of(root)
    shard.unlink()
    with lmdb.open(str(shard), subdir=False, lock=False) as env:
        with env.begin(write=True) as transaction:
            transaction.put(b"00000000", pickle.dumps(("lq", "gt")))
    assert_refused(root)
    accept(root)
    assert_refused(root)


def test_lmdb_with_a_pair_lost(pairs: FolderPairs, tmp_path: Path) -> None:
    root = make_store(pairs, tmp_path / "store", **KINDS["lmdb-raw"]).root
    with lmdb.open(str(shard_of(root)), subdir=False, lock=False) as env:
        with env.begin(write=True) as transaction:
            assert transaction.delete(b"00000000/lq")
    assert_refused(root)
    accept(root)
    assert_refused(root)


# Manifests


def refused(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        PairStore(root)
    line = str(caught.value)
    assert str(root) in line and "\n" not in line
    return line


def test_no_store_there(tmp_path: Path) -> None:
    line = refused(tmp_path / "nothing")
    assert "no such store" in line and "nafnet prepare" in line


def test_unfinished_store(own_store: Path) -> None:
    (own_store / MANIFEST).unlink()
    line = refused(own_store)
    assert "not a store" in line and f"`nafnet prepare {own_store} --out STORE`" in line
    (own_store / PROGRESS).mkdir()
    (own_store / PROGRESS / "job.json").touch()
    line = refused(own_store)
    assert "unfinished" in line and "Run the same `nafnet prepare` again" in line


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None])
def test_another_schema_version(own_store: Path, version: object) -> None:
    edit_manifest(own_store, schema_version=version)
    line = refused(own_store)
    assert "another version" in line and f"expected {SCHEMA_VERSION}" in line


def test_version_is_looked_at_first(own_store: Path) -> None:
    # A newer manifest has other fields: the reason is its version, not they.
    edit_manifest(own_store, schema_version=SCHEMA_VERSION + 1, new_field=1)
    assert "another version" in refused(own_store)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\x80\x81\xff", b'{"schema_version": 1}', b"{'a': 1}"]
)
def test_damaged_manifest(own_store: Path, content: bytes) -> None:
    (own_store / MANIFEST).write_bytes(content)
    line = refused(own_store)
    assert "damaged manifest" in line or "another version" in line


@pytest.mark.parametrize("changes", [{"num_pairs": "many"}, {"unknown": 1}, {"format": "zip"}, {"shards": 3}])
def test_manifest_with_impossible_fields(own_store: Path, changes: dict[str, Any]) -> None:
    edit_manifest(own_store, **changes)
    assert "damaged manifest" in refused(own_store)
