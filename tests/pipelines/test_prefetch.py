from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nafnet_core import InputError
from pipelines.config import DataSection, StoreSection
from pipelines.ingest import plan_for, read_patches
from pipelines.prefetch import Prefetcher
from pipelines.store import PairStore


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("NAFNET_CACHE", str(folder))
    return folder


def shards_in(cache: Path) -> set[str]:
    return {path.stem for path in cache.glob("*.parquet")}


def remote(store: PairStore) -> str:
    """The store's URL: a file system behind a URL is read as a bucket is."""
    return f"file://{Path(store.root).absolute()}"


def test_a_store_at_a_url_gives_the_same_patches(store: PairStore, cache: Path) -> None:
    plan = plan_for(DataSection(train=(StoreSection(path=remote(store)),)), seed=3)
    numbers = np.arange(60)
    here, there = (read_patches(plan, [s], numbers, 16) for s in (store, PairStore(remote(store))))
    assert np.array_equal(here.lq, there.lq) and np.array_equal(here.gt, there.gt)
    assert shards_in(cache) == {shard.sha256 for shard in store.manifest.shards}


def test_shards_are_fetched_before_a_reader_asks(store: PairStore, cache: Path) -> None:
    there = PairStore(remote(store))
    plan = plan_for(DataSection(train=(StoreSection(path=remote(store)),)), seed=3)
    Prefetcher(plan, [there], first=0, stop=1000)
    deadline = time.monotonic() + 20
    while len(shards_in(cache)) < len(store.manifest.shards) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert shards_in(cache) == {shard.sha256 for shard in store.manifest.shards}


def test_fetching_ahead_stays_a_window_ahead(
    store: PairStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.plan.SEGMENT_PAIRS", 5)
    data = DataSection(train=(StoreSection(path=remote(store)),), shuffle_window_pairs=5)
    plan, there = plan_for(data, seed=3), PairStore(remote(store))
    prefetcher = Prefetcher(plan, [there], first=0, stop=45)
    time.sleep(0.5)
    first = {store.manifest.shards[n].sha256 for n in there.shards_of(plan.samples(np.arange(5)).pair)}
    assert shards_in(cache) == first and len(first) < 3
    prefetcher.advance(44)
    deadline = time.monotonic() + 20
    while len(shards_in(cache)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(shards_in(cache)) == 3


def test_every_epoch_is_fetched_ahead(store: PairStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A cache smaller than the store has lost by then what came first.
    monkeypatch.setattr("pipelines.plan.SEGMENT_PAIRS", 5)
    data = DataSection(train=(StoreSection(path=remote(store)),), shuffle_window_pairs=8)
    prefetcher = Prefetcher(plan_for(data, seed=3), [PairStore(remote(store))], first=0, stop=450)
    for position in range(0, 450, 45):
        prefetcher.advance(position)
        _until(lambda: bool(shards_in(cache)))
        for path in cache.glob("*.parquet"):
            path.unlink()
        prefetcher.advance(position + 36)
        _until(lambda: bool(shards_in(cache)))


def test_a_small_window_is_fetched_in_parts(store: PairStore, cache: Path) -> None:
    # Of 45 pairs in three shards a window of four needs one or two, and the cache has room for no more.
    plan = replace(plan_for(DataSection(train=(StoreSection(path=remote(store)),)), seed=3), window_pairs=4)
    there = PairStore(remote(store))
    Prefetcher(plan, [there], first=0, stop=45)
    time.sleep(0.5)
    near = there.shards_of(plan.samples(np.arange(5)).pair)
    assert shards_in(cache) == {store.manifest.shards[n].sha256 for n in near}


def _until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_local_stores_need_no_fetching(store: PairStore, cache: Path) -> None:
    plan = plan_for(DataSection(train=(StoreSection(path=str(store.root)),)), seed=3)
    assert not plan.ramp
    Prefetcher(plan, [store], first=0, stop=1000).advance(10)
    assert not shards_in(cache)


def test_two_windows_fit_into_the_cache(store: PairStore) -> None:
    pair_bytes = sum(shard.bytes for shard in store.manifest.shards) / len(store)
    gib = 10 * pair_bytes / 2**30
    data = DataSection(train=(StoreSection(path=remote(store)),), cache_gib=gib)
    plan = plan_for(data, seed=3)
    assert plan.window_pairs == 4 and plan.ramp
    local = plan_for(data.model_copy(update={"train": (StoreSection(path=str(store.root)),)}), seed=3)
    assert local.window_pairs == data.shuffle_window_pairs


def test_whole_shards_are_counted_where_segments_cut_across_them(
    store: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A segment of one pair fetches a shard of fifteen.
    monkeypatch.setattr("pipelines.ingest.SEGMENT_PAIRS", 1)
    shard_bytes = sum(shard.bytes for shard in store.manifest.shards) / 3
    data = DataSection(train=(StoreSection(path=remote(store)),), cache_gib=2.6 * shard_bytes / 2**30)
    assert plan_for(data, seed=3).window_pairs == 1
    # All of it fits: nothing to be careful about.
    whole = data.model_copy(update={"cache_gib": 4 * shard_bytes / 2**30})
    assert plan_for(whole, seed=3).window_pairs == data.shuffle_window_pairs


def test_what_the_cache_removed_is_not_kept_open(store: PairStore, cache: Path) -> None:
    there = PairStore(remote(store))
    for pair in (0, 20):
        there.pair(pair)
    first = there.locate(0)[0].path
    first.unlink()
    there.pair(40)
    assert len(list(cache.glob("*.parquet"))) == 2
    assert first.name not in Path("/proc/self/maps").read_text()
    assert np.array_equal(there.pair(0).gt, store.pair(0).gt)


def test_a_fetch_that_was_killed_leaves_nothing(store: PairStore, cache: Path) -> None:
    there = PairStore(remote(store))
    left = cache / f".{store.manifest.shards[0].sha256}.part.999.tmp"
    left.write_bytes(b"half")
    there.pair(0)
    assert not left.exists() and not list(cache.glob("*.part*"))


@pytest.mark.parametrize("field", ["sha256", "file"])
def test_a_manifest_cannot_name_other_folders(own_store: Path, cache: Path, field: str) -> None:
    path = own_store / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0][field] = "../../elsewhere"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="damaged manifest"):
        PairStore(f"file://{own_store}")


def test_a_shard_missing_there_is_one_line(store: PairStore, own_store: Path, cache: Path) -> None:
    (own_store / store.manifest.shards[1].file).unlink()
    with pytest.raises(InputError, match="a missing or damaged shard") as error:
        PairStore(f"file://{own_store}").at_hand(1)
    assert store.manifest.shards[1].file in str(error.value) and "\n" not in str(error.value)


def test_a_shard_damaged_there_is_refused(store: PairStore, own_store: Path, cache: Path) -> None:
    path = own_store / store.manifest.shards[1].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="SHA-256"):
        PairStore(f"file://{own_store}").at_hand(1)
    assert not shards_in(cache)
