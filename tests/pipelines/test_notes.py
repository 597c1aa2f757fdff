from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipelines import prepare
from pipelines.files import json_bytes
from pipelines.notes import claim, note_name, notes, shard_name, whole_shards
from pipelines.sources import PairRef, SharpPhotos
from pipelines.storage import LocalFolder, folder
from pipelines.store import PROGRESS


@pytest.fixture
def store(tmp_path: Path) -> LocalFolder:
    """Shards 0 to 129 are noted; of 3 the file is gone, and of 4 the end of it."""
    place = folder(tmp_path)
    assert isinstance(place, LocalFolder)
    place.below(PROGRESS).make()
    for number in range(130):
        note = {"info": {"pairs": 1, "bytes": 5}, "number": number}
        place.below(PROGRESS).write(note_name(number), json_bytes(note))
        place.write(shard_name(number, "parquet"), b"half" if number == 4 else b"whole")
    place.delete(shard_name(3, "parquet"))
    return place


@pytest.mark.parametrize("keys", [[], ["a"], ["a/1", 'b"', "é\n", "日"] * 100])
def test_a_job_is_named_by_its_keys_as_a_json_list(tmp_path: Path, keys: list[str]) -> None:
    # Else a store that an older version began could not be gone on with.
    refs = [PairRef(key=key, scene="s", lq=None, gt=tmp_path / "a.png") for key in keys]
    identity = prepare._identity(prepare.PrepareConfig(out=tmp_path), SharpPhotos(root=tmp_path), refs)
    assert identity["pairs"] == hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def test_notes_come_in_the_order_that_is_asked_for(store: LocalFolder) -> None:
    numbers = [*range(129, -1, -1), 7]
    assert [note["number"] for note in notes(store.below(PROGRESS), numbers)] == numbers
    assert list(notes(store.below(PROGRESS), [])) == []


def test_a_shard_is_whole_by_its_note_and_its_size(store: LocalFolder) -> None:
    assert whole_shards(store, 200, "parquet") == set(range(130)) - {3, 4}
    assert whole_shards(store, 2, "parquet") == {0, 1} and whole_shards(store, 200, "lmdb") == set()


def test_the_same_job_is_taken_for_the_same(store: LocalFolder) -> None:
    for _ in range(2):
        claim(store, {"root": Path("/a"), "shape": (1, 2)})
    assert whole_shards(store, 1, "parquet") == {0}
