from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest

from nafnet_core import InputError
from pipelines import prepare
from pipelines.duplicates import find_duplicates, same_content
from pipelines.png import encode_png
from pipelines.prepare import PrepareConfig
from pipelines.sources import FolderPairs, LmdbPairs
from pipelines.store import MANIFEST
from tests.pipelines.pairs import piece, write_pairs

NAMES = [f"s{number // 2}/{number}" for number in range(6)]


@pytest.fixture
def source(tmp_path: Path) -> FolderPairs:
    """Six pairs in three scenes; ours to damage."""
    return write_pairs(tmp_path / "pairs", NAMES)


def config_for(out: Path) -> PrepareConfig:
    return PrepareConfig(out=out, crop_px=32, stride_px=32, pairs_per_shard=2, use_ray=False)


def copy(source: FolderPairs, name: str, to: str, *sides: str) -> None:
    for side in sides or ("blur", "sharp"):
        folder = source.lq_dir.parent / side
        (folder / f"{to}.png").write_bytes((folder / f"{name}.png").read_bytes())


def write(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


# Contents


def test_same_content_is_found_and_nothing_else(tmp_path: Path) -> None:
    long = bytes(range(256)) * 8192  # 2 MiB: more than one block
    late = long[:-1] + b"x"  # differs where the sample does not reach
    early = b"x" + long[1:]
    images = write(tmp_path, b"a", b"b", long, late, b"a", early, long, late, b"", b"")
    assert same_content(images).tolist() == [0, 1, 2, 3, 0, 5, 2, 3, 8, 9]


def test_missing_files_and_unreadable_ones_equal_nothing(tmp_path: Path) -> None:
    images = write(tmp_path, b"a" * 9000)
    (tmp_path / "folder-1").mkdir()
    (tmp_path / "folder-2").mkdir()
    others = [tmp_path / name for name in ("none-1", "none-2", "folder-1", "folder-2")]
    assert same_content([*others, *images]).tolist() == [0, 1, 2, 3, 4]
    assert same_content([]).tolist() == []


def test_hard_links_are_one_file(tmp_path: Path) -> None:
    images = write(tmp_path, b"one" * 5000, b"two" * 5000, b"one" * 5000)
    for number, index in ((3, 2), (4, 1), (5, 2)):
        os.link(images[index], tmp_path / str(number))
    images += [tmp_path / str(number) for number in (3, 4, 5)]
    assert same_content(images).tolist() == [0, 1, 0, 0, 1, 0]


# In a store


def test_a_pair_that_comes_twice_is_refused(source: FolderPairs, tmp_path: Path) -> None:
    copy(source, "s0/0", "s0/1")
    copy(source, "s0/0", "s2/5")
    result = prepare.run(source, source.pairs(), config_for(tmp_path / "store"))
    assert [row["key"] for row in result.refused] == ["s0/1", "s2/5"]
    assert "byte for byte those of pair 's0/0'" in result.refused[1]["reason"]
    rest = [ref for ref in source.pairs() if ref.key not in ("s0/1", "s2/5")]
    alone = prepare.run(source, rest, config_for(tmp_path / "alone"))
    assert result.manifest.digest == alone.manifest.digest
    with pytest.raises(InputError, match=r"those of pair 's0/0': .*blur/s0/1\.png"):
        prepare.run(source, source.pairs(), replace(config_for(tmp_path / "strict"), strict=True))
    assert not list((tmp_path / "strict").glob("shard-*")) and not (tmp_path / "strict" / MANIFEST).exists()


def test_variants_of_one_sharp_photo_are_no_duplicates(
    source: FolderPairs, caplog: pytest.LogCaptureFixture
) -> None:
    copy(source, "s0/0", "s0/1", "sharp")  # two blurs of it
    copy(source, "s1/2", "s1/3", "blur")
    assert find_duplicates(source.pairs()) == {}
    assert not caplog.records


def test_a_sharp_image_of_two_scenes_is_warned_of(
    source: FolderPairs, caplog: pytest.LogCaptureFixture
) -> None:
    copy(source, "s0/0", "s2/4", "sharp")
    with caplog.at_level(logging.WARNING):
        assert find_duplicates(source.pairs()) == {}
    line = caplog.records[0].getMessage()
    assert line.startswith("1 sharp images belong to several scenes") and "'s2'" in line and "'s0'" in line


def test_values_of_an_lmdb_are_compared_too(tmp_path: Path) -> None:
    roots = []
    for side in ("lq", "gt"):
        root = tmp_path / f"{side}.lmdb"
        with lmdb.open(str(root), map_size=2**26) as env, env.begin(write=True) as transaction:
            for number in range(40):
                image = piece(min(number, 38) + (100 if side == "lq" else 0))
                transaction.put(b"%03d" % number, encode_png(np.ascontiguousarray(image)))
        (root / "meta_info.txt").write_text("".join(f"{n:03d}.png (72,96,3) 1\n" for n in range(40)))
        roots.append(root)
    assert find_duplicates(LmdbPairs(lq_dir=roots[0], gt_dir=roots[1]).pairs()) == {"039": "038"}
