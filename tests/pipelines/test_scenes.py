from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipelines.scenes import SceneList, scenes_of, shared_scenes
from pipelines.sources import FolderPairs
from pipelines.store import MANIFEST, SCENES, PairStore, read_manifest
from tests.pipelines.pairs import make_store, write_pairs

ODD = [
    "",
    " led",
    'quo"te',
    '"first',
    "two\nlines",
    "\u2028",
    "\udcff",
    "straße",
    "日本",
    "tab\t",
    "a",
    "a b",
]


@pytest.mark.parametrize("in_memory", [1, 3, 100])
def test_names_come_back_once_each_and_sorted(tmp_path: Path, in_memory: int) -> None:
    scenes = SceneList(tmp_path, names_in_memory=in_memory)
    for name in (*ODD, *reversed(ODD)):
        scenes.add([name, "a"])
    assert scenes.write(tmp_path / SCENES) == len(ODD)
    found = scenes_of(tmp_path)
    assert found is not None and list(found) == sorted(ODD)


def test_a_store_lists_its_scenes(store: PairStore) -> None:
    assert (store.root / SCENES).read_text() == "a\nb\nc\n"
    assert store.manifest.num_scenes == 3


def test_scenes_of_refused_pairs_are_left_out(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", ["a/1", "b/1"])
    source.pairs()[0].lq.write_bytes(b"")
    store = make_store(source, tmp_path / "store")
    assert (store.root / SCENES).read_text() == "b\n" and store.manifest.num_scenes == 1


def test_shared_scenes(pairs: FolderPairs, store: PairStore, tmp_path: Path) -> None:
    refs = write_pairs(tmp_path / "pairs", ["b/7", "d/1", "c/2"])
    other = make_store(refs, tmp_path / "other")
    assert shared_scenes(store.root, other.root) == (2, "b") == shared_scenes(other.root, store.root)
    apart = make_store(write_pairs(tmp_path / "more", ["x/7"]), tmp_path / "apart")
    assert shared_scenes(store.root, apart.root) == (0, "")


def test_a_store_of_before_the_list_still_loads(store: PairStore, own_store: Path) -> None:
    (own_store / SCENES).unlink()
    manifest = json.loads((own_store / MANIFEST).read_text())
    del manifest["num_scenes"], manifest["num_suspect"], manifest["min_remainder_px"]
    (own_store / MANIFEST).write_text(json.dumps(manifest))
    assert (read_manifest(own_store).num_scenes, read_manifest(own_store).num_suspect) == (0, 0)
    assert scenes_of(own_store) is None
    assert shared_scenes(store.root, own_store) == (0, "")


def test_parts_of_reds_number_their_sequences_alike(
    tmp_path: Path, store: PairStore, own_store: Path
) -> None:
    manifest = json.loads((own_store / MANIFEST).read_text())
    roots = []
    for split in ("train", "val"):
        root = tmp_path / split
        root.mkdir()
        changed = {**manifest, "adapter": "reds", "adapter_options": {"split": split}}
        (root / MANIFEST).write_text(json.dumps(changed))
        (root / SCENES).write_text("000\n001\n")
        roots.append(root)
    assert shared_scenes(*roots) == (0, "")
    assert shared_scenes(roots[0], roots[0]) == (2, "000")


def test_training_warns_of_one_folder_prepared_twice(
    pairs: FolderPairs, store: PairStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pipelines.config import load_config
    from pipelines.train.checks import warn

    whole = make_store(pairs, tmp_path / "whole", crop_px=None, split="test")
    config = load_config("mobile", [f"data.train=[{{path: {store.root}}}]", f"data.val={whole.root}"])
    with caplog.at_level(logging.WARNING):
        warn(config)
    assert "3 of the 3 scenes of the validation have the names of scenes in" in caplog.text
    assert "(the first: 'a')" in caplog.text and "--holdout" in caplog.text
