from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nafnet_core import CapabilityError
from pipelines import shard_cache
from pipelines.store import PairStore


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_readers_that_come_together_compare_a_shard_once(
    store: PairStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []

    def slowly(path: Path) -> str:
        taken.append(path)
        time.sleep(0.2)
        return digest(path)

    digest = shard_cache.sha256
    monkeypatch.setattr(shard_cache, "sha256", slowly)
    readers = [PairStore(store.root) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda reader: reader.at_hand(1), readers))) == 1
    assert len(taken) == 1


def test_a_full_disk_is_no_fault_of_the_storage(
    store: PairStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: object, name: str) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pipelines.storage.RemoteFolder._blocks", full)
    there, start = PairStore(f"file://{Path(store.root).absolute()}"), time.monotonic()
    with pytest.raises(CapabilityError, match="no room for shards.*No space left.*NAFNET_CACHE"):
        there.pair(0)
    assert time.monotonic() - start < 5  # it is not asked again and again
