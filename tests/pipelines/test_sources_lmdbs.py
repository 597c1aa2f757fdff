from __future__ import annotations

import json
import pickle
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from nafnet_core import InputError
from pipelines.evaluate import Pairs
from pipelines.images import read_rgb_u8
from pipelines.png import encode_png
from pipelines.prepare import PrepareConfig, run
from pipelines.sources import FolderPairs, LmdbPairs, two_sides
from pipelines.sources.lmdbs import LmdbImage
from pipelines.store import PairStore
from tests.pipelines.pairs import piece, write_pairs

KEYS = ["GOPR0372-000047_s001", "GOPR0372-000047_s002", "000/00000001"]


def write_lmdb(root: Path, values: dict[str, bytes], *, meta: bool = True) -> Path:
    """As BasicSR's `make_lmdb_from_imgs` does."""
    root.mkdir()
    with lmdb.open(str(root), map_size=2**26) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    if meta:
        lines = [f"{key}.png (72,96,3) 1\n" for key in values]
        (root / "meta_info.txt").write_text("".join(lines))
    return root


@pytest.fixture
def folders(tmp_path: Path) -> FolderPairs:
    return write_pairs(tmp_path / "pairs", ["one/1", "one/2", "two/1"])


@pytest.fixture
def source(folders: FolderPairs, tmp_path: Path) -> LmdbPairs:
    refs = folders.pairs()
    sides = {}
    for side in ("lq", "gt"):
        images = [read_rgb_u8(getattr(ref, side)) for ref in refs]
        values = {key: encode_png(image) for key, image in zip(KEYS, images, strict=True)}
        sides[side] = write_lmdb(tmp_path / f"{side}.lmdb", values)
    found = two_sides(sides["lq"], sides["gt"])
    assert isinstance(found, LmdbPairs)
    return found


def message(source: LmdbPairs) -> str:
    with pytest.raises(InputError) as caught:
        for ref in source.pairs():
            ref.read()
    return str(caught.value)


def test_a_list_of_images_that_is_no_text(source: LmdbPairs) -> None:
    (source.gt_dir / "meta_info.txt").write_bytes("sc\xe8ne.png (72,96,3) 1\n".encode("latin-1"))
    line = message(source)
    assert "not a text file" in line and "gt.lmdb/meta_info.txt" in line


def test_pixels_are_those_of_the_files(source: LmdbPairs, folders: FolderPairs) -> None:
    refs = {ref.key: ref for ref in source.pairs()}
    assert list(refs) == sorted(KEYS)
    for key, ref in zip(KEYS, folders.pairs(), strict=True):
        for image, expected in zip(refs[key].read(), ref.read(), strict=True):
            assert np.array_equal(image, expected)
    assert not np.array_equal(*refs[KEYS[0]].read())
    # Sub-images of one picture must not be split.
    assert [refs[key].scene for key in KEYS] == ["GOPR0372-000047", "GOPR0372-000047", "000"]


def test_a_store_of_them_and_scores_on_them(source: LmdbPairs, folders: FolderPairs, tmp_path: Path) -> None:
    config = PrepareConfig(out=tmp_path / "store", crop_px=None, use_ray=False)
    manifest = run(source, source.pairs(), config).manifest
    assert manifest.adapter == "lmdb" and manifest.num_pairs == 3
    store = PairStore(tmp_path / "store")
    expected = {key: ref.read() for key, ref in zip(KEYS, folders.pairs(), strict=True)}
    for index in range(3):
        pair = store.pair(index)
        assert np.array_equal(pair.lq, expected[pair.key][0]) and np.array_equal(
            pair.gt, expected[pair.key][1]
        )
    scored = Pairs(source.lq_dir, source.gt_dir)
    assert [pair.key for pair in scored] == sorted(KEYS)


def test_damaged_pair_goes_to_quarantine(source: LmdbPairs, tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "lq2.lmdb"), map_size=2**26) as env, env.begin(write=True) as transaction:
        for ref in source.pairs():
            value = encode_png(ref.read()[0])
            transaction.put(ref.key.encode(), value[:30] if ref.key == KEYS[1] else value)
    (tmp_path / "lq2.lmdb" / "meta_info.txt").write_text("".join(f"{key}.png (72,96,3) 1\n" for key in KEYS))
    damaged = LmdbPairs(lq_dir=tmp_path / "lq2.lmdb", gt_dir=source.gt_dir)
    config = PrepareConfig(out=tmp_path / "store", crop_px=None, use_ray=False)
    result = run(damaged, damaged.pairs(), config)
    assert result.manifest.num_pairs == 2
    row = json.loads((tmp_path / "store" / "quarantine.jsonl").read_text())
    assert row["key"] == KEYS[1] and "damaged" in row["reason"] and f"lq2.lmdb#{KEYS[1]}" in row["reason"]


@pytest.mark.parametrize("meta", [True, False])
def test_pickled_pairs_are_refused_with_the_way_out(source: LmdbPairs, tmp_path: Path, meta: bool) -> None:
    # A common recipe elsewhere. Unpickling a stranger's file would run the stranger's code.
    values = {key: pickle.dumps((np.zeros(3), "gt")) for key in KEYS}
    pickled = write_lmdb(tmp_path / "pickled.lmdb", values, meta=meta)
    text = message(LmdbPairs(lq_dir=pickled, gt_dir=source.gt_dir))
    assert "pickled objects" in text and "nafnet prepare --lq BLUR --gt SHARP" in text


def test_bad_lmdbs_are_one_line_each(source: LmdbPairs, tmp_path: Path) -> None:
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    unlisted = write_lmdb(tmp_path / "a.lmdb", dict.fromkeys(KEYS, png), meta=False)
    assert "without a list of its images" in message(LmdbPairs(lq_dir=unlisted, gt_dir=source.gt_dir))
    fewer = write_lmdb(tmp_path / "b.lmdb", dict.fromkeys(KEYS[:2], png))
    text = message(LmdbPairs(lq_dir=fewer, gt_dir=source.gt_dir))
    assert "1 images without a partner" in text and KEYS[2] in text
    with (fewer / "meta_info.txt").open("a") as file:
        file.write(f"{KEYS[2]}.png (8,8,3) 1\n")
    with pytest.raises(InputError, match=r"listed, but not in the LMDB: .*b\.lmdb#000/00000001"):
        LmdbImage(fewer, KEYS[2]).read_photo()
    other = write_lmdb(tmp_path / "c.lmdb", dict.fromkeys(KEYS, png))
    assert "differ in size" in message(LmdbPairs(lq_dir=other, gt_dir=source.gt_dir))
    (other / "meta_info.txt").write_text("\n")
    assert "an empty list" in message(LmdbPairs(lq_dir=other, gt_dir=source.gt_dir))
    broken = tmp_path / "d.lmdb"
    broken.mkdir()
    (broken / "data.mdb").write_bytes(b"no data base")
    (broken / "meta_info.txt").write_text("".join(f"{key}.png (8,8,3) 1\n" for key in KEYS))
    assert "not an LMDB" in message(LmdbPairs(lq_dir=broken, gt_dir=source.gt_dir))


def test_values_are_held_to_what_files_are(source: LmdbPairs, tmp_path: Path) -> None:
    png = encode_png(piece(0))
    absurd = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    absurd += png_chunk(b"IDAT", bytes(100))
    deep = cv2.imencode(".png", np.full((72, 96, 3), 257 * 200, np.uint16))[1].tobytes()
    root = write_lmdb(tmp_path / "a.lmdb", dict(zip(KEYS, (png[:-200], absurd, deep), strict=True)))
    for key, words in ((KEYS[0], "damaged or truncated"), (KEYS[1], "absurd dimensions")):
        with pytest.raises(InputError, match=words) as caught:
            LmdbImage(root, key).read_photo()
        assert f"a.lmdb#{key}" in str(caught.value)
    assert (LmdbImage(root, KEYS[2]).read_photo().rgb_hwc_u8() == 200).all()
    with pytest.raises(InputError, match=r"absurd dimensions: .*at most 0.001 megapixels, got 96×72"):
        LmdbImage(root, KEYS[2]).read_photo(max_megapixels=0.001)


def test_threads_that_come_together_open_it_once(source: LmdbPairs) -> None:
    barrier = threading.Barrier(8)

    def size(_: int) -> int:
        barrier.wait()
        return LmdbImage(source.lq_dir, KEYS[0]).size_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(size, range(8)))) == 1
    assert LmdbImage(source.lq_dir, "none").size_bytes() == -1


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
