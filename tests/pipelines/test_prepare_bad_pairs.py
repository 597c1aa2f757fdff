"""One by one, the ways in which a pair can be bad, and those which only look so."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from nafnet_core import InputError
from pipelines import prepare
from pipelines.images import read_photo
from pipelines.png import encode_png
from pipelines.sources import FolderPairs
from tests.pipelines.pairs import blurred, make_store, piece, write_pairs
from tests.pipelines.test_prepare import NAMES, config_for, quarantine, truncate


@pytest.fixture
def source(tmp_path: Path) -> FolderPairs:
    """Six pairs of 96×72 in three scenes; ours to damage."""
    return write_pairs(tmp_path / "pairs", NAMES)


def gray_of(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(rgb).convert("L")


def with_exif(image: np.ndarray, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(path, exif=exif)


def bomb() -> bytes:
    """The start of a PNG that declares 60000×60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    signature, length, checksum = (
        b"\x89PNG\r\n\x1a\n",
        struct.pack(">I", 13),
        struct.pack(">I", zlib.crc32(header)),
    )
    return signature + length + header + checksum + struct.pack(">I", 1000) + b"IDAT" + bytes(100)


def animated(path: Path) -> None:
    frames = [Image.fromarray(piece(number)) for number in range(2)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


BAD = {
    "empty": (lambda lq, gt: lq.write_bytes(b""), ["an empty file", "0 bytes", "blur/s0/0.png"]),
    "truncated": (lambda lq, gt: truncate(gt), ["damaged or truncated", "sharp/s0/0.png"]),
    "unreadable": (lambda lq, gt: lq.write_text("<html>"), ["not an image", "6 bytes"]),
    "animated": (lambda lq, gt: animated(lq), ["animated or multi-page"]),
    "gray blurred, colour sharp": (
        lambda lq, gt: gray_of(piece(0)).save(lq),
        ["one of the two images is gray: ", "blur/s0/0.png", "colour as", "sharp/s0/0.png"],
    ),
    "colour blurred, gray sharp": (
        lambda lq, gt: gray_of(piece(0)).save(gt),
        ["one of the two images is gray: ", "sharp/s0/0.png' (expected colour as"],
    ),
    "turned on one side": (
        lambda lq, gt: with_exif(piece(0), lq, 6),
        ["differ in size: EXIF turns one of them by a quarter", "96×72", "72×96", "Save both upright"],
    ),
    "32 bit": (
        lambda lq, gt: Image.fromarray(piece(0)[..., 0].astype(np.float32)).save(lq, "TIFF"),
        ["values of 32 bit"],
    ),
    "a bomb": (
        lambda lq, gt: lq.write_bytes(bomb()),
        ["absurd dimensions"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_each_way_to_be_bad_is_refused_with_its_reason(
    source: FolderPairs, tmp_path: Path, fault: str
) -> None:
    ref = source.pairs()[0]
    assert isinstance(ref.lq, Path) and isinstance(ref.gt, Path)
    damage, words = BAD[fault]
    damage(ref.lq, ref.gt)
    result = prepare.run(source, source.pairs(), config_for(tmp_path / "store"))
    assert [row["key"] for row in quarantine(tmp_path / "store")] == ["s0/0"]
    missing = [word for word in words if word not in result.refused[0]["reason"]]
    assert not missing, result.refused[0]["reason"]
    with pytest.raises(InputError):
        prepare.run(source, source.pairs(), replace(config_for(tmp_path / "strict"), strict=True))


FINE = {
    "gray both": lambda rgb, path: gray_of(rgb).save(path),
    "gray, saved as colour on one side": lambda rgb, path: (
        gray_of(rgb) if path.parts[-3] == "blur" else gray_of(rgb).convert("RGB")
    ).save(path),
    "alpha on one side": lambda rgb, path: Image.fromarray(
        np.dstack([rgb, np.full_like(rgb[..., 0], 255 if path.parts[-3] == "blur" else 90)])
    ).save(path),
    "palette": lambda rgb, path: Image.fromarray(rgb).quantize(200).save(path),
    "CMYK": lambda rgb, path: Image.fromarray(rgb).convert("CMYK").save(path, "JPEG", quality=95),
    "16 bit on one side": lambda rgb, path: path.write_bytes(
        encode_png(rgb)
        if path.parts[-3] == "blur"
        else cv2.imencode(".png", rgb[..., ::-1].astype(np.uint16) * 257 + 100)[1].tobytes()
    ),
    "turned on both sides": lambda rgb, path: with_exif(rgb, path, 6),
}


@pytest.mark.parametrize("kind", FINE)
def test_what_can_be_brought_to_rgb_is_taken(source: FolderPairs, tmp_path: Path, kind: str) -> None:
    for index, ref in enumerate(source.pairs()):
        assert isinstance(ref.lq, Path) and isinstance(ref.gt, Path)
        FINE[kind](blurred(piece(index)), ref.lq)
        FINE[kind](piece(index), ref.gt)
    store = make_store(source, tmp_path / "store", crop_px=None)
    assert (store.manifest.num_refused, store.manifest.num_suspect, len(store)) == (0, 0, 6)
    pair, expected = store.pair(1), piece(1)
    if kind == "turned on both sides":
        expected = np.rot90(expected, -1)
    if kind.startswith("gray"):
        assert (pair.gt == pair.gt[..., :1]).all() and (pair.lq == pair.lq[..., :1]).all()
        expected = np.repeat(np.asarray(gray_of(expected))[..., None], 3, axis=2)
    assert np.abs(pair.gt.astype(int) - expected).mean() < (9 if kind in ("palette", "CMYK") else 0.01)


def test_size_cap_is_an_option(source: FolderPairs, tmp_path: Path) -> None:
    ref = source.pairs()[4]
    assert isinstance(ref.lq, Path) and isinstance(ref.gt, Path)
    ref.lq.write_bytes(encode_png(blurred(piece(4, 100, 120))))
    ref.gt.write_bytes(encode_png(piece(4, 100, 120)))
    result = prepare.run(source, source.pairs(), config_for(tmp_path / "store", max_megapixels=0.01))
    assert [row["key"] for row in result.refused] == ["s2/4"]
    assert "at most 0.01 megapixels, got 120×100" in result.refused[0]["reason"]
    assert "--max-megapixels" in result.refused[0]["reason"]
    with pytest.raises(InputError, match="more than 0 megapixels"):
        prepare.run(source, source.pairs(), config_for(tmp_path / "none", max_megapixels=0.0))


def test_size_cap_can_be_raised_beyond_pillows(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (13_500, 13_500)).save(path)
    with pytest.raises(InputError, match="absurd dimensions"):
        read_photo(path)
    before = Image.MAX_IMAGE_PIXELS
    try:
        assert read_photo(path, max_megapixels=200).rgb_hwc.shape == (13_500, 13_500, 3)
    finally:
        Image.MAX_IMAGE_PIXELS = before
