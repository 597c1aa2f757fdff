"""A hundred files that are bad each in its own way, between two that are good."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nafnet_core import InputError
from pipelines.images import MAX_MEGAPIXELS, Photo, declared_pixels, read_photo
from pipelines.models import LoadedModel
from pipelines.png import encode_png
from tests.pipelines.pairs import piece
from tests.pipelines.restore.conftest import RestoreFiles

SHARP = piece(0, 48, 64)
_KINDS = {".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF", ".webp": "WEBP", ".bmp": "BMP"}
_TRUNCATED_AT = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)


def encoded(suffix: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(SHARP)).save(file, _KINDS[suffix], **options)
    return file.getvalue()


def png_declaring(width: int, height: int, *, colour: int = 2, depth: int = 8) -> bytes:
    """A PNG of a few bytes whose header declares any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def bad_files() -> Iterator[tuple[str, bytes]]:
    """Name and content of files of which nothing can be restored."""
    for suffix in _KINDS:
        whole = encoded(suffix)
        for share in _TRUNCATED_AT:
            yield f"cut at {share}{suffix}", whole[: int(share * len(whole))]
        yield f"one byte short{suffix}", whole[: len(whole) // 2 - 1]
        yield f"wrong magic{suffix}", b"\0\0\0\0" + whole[4:]
        yield f"zeros{suffix}", bytes(len(whole))
        yield f"text{suffix}", "no image, but a text ☂\n".encode() * 40
        yield f"noise{suffix}", np.random.default_rng(len(suffix)).bytes(5000)
        yield f"header, then zeros{suffix}", whole[:24] + bytes(len(whole) - 24)
    for size in ((65_500, 65_500), (2**31 - 1, 2**31 - 1), (0, 10), (10, 0)):
        yield f"declares {size[0]}×{size[1]}.png", png_declaring(*size)
    yield "declares 200,000 px in a row.png", png_declaring(200_000, 1000)
    yield "no such colour.png", png_declaring(8, 8, colour=5)
    yield "no such depth.png", png_declaring(8, 8, depth=3)
    jpeg = bytearray(encoded(".jpg"))
    frame = jpeg.find(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    yield "declares 65,500².jpg", bytes(jpeg)
    frames = [Image.fromarray(piece(number, 16, 16)) for number in range(3)]
    for suffix in (".png", ".webp", ".tif"):
        yield f"animated{suffix}", encoded(suffix, frames[0], save_all=True, append_images=frames[1:])
    floats = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(floats, "TIFF")
    yield "floats.tif", floats.getvalue()
    for suffix in (".png", ".jpg"):
        yield f"a line\nbreak and {suffix[1:]} \N{PILE OF POO}{suffix}", b"no image"


def odd_files() -> Iterator[tuple[str, bytes]]:
    """Name and content of files that are odd and can be restored."""
    inks = Image.fromarray(SHARP).convert("CMYK")
    yield "inks.jpg", encoded(".jpg", inks)
    yield "inks.tif", encoded(".tif", inks)
    yield "1×1.png", encode_png(SHARP[:1, :1].copy())
    yield "strip.png", encode_png(np.repeat(SHARP[:3, :1], 30_000, axis=1).copy())
    yield "palette.png", encoded(".png", Image.fromarray(SHARP).quantize(16))
    yield "bits.png", encoded(".png", Image.fromarray(SHARP).convert("1"))
    yield "really a jpeg.png", encoded(".jpg")
    yield "new\nline \N{CAMERA}.png", encoded(".png")


def test_none_stops_the_others_and_each_is_told(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    bad, odd = dict(bad_files()), dict(odd_files())
    for name, content in {**bad, **odd, "a good one.png": encoded(".png"), "z.jpg": encoded(".jpg")}.items():
        (folder / name).write_bytes(content)
    (folder / "to nowhere.png").symlink_to(tmp_path / "nothing")
    (folder / "to itself.jpg").symlink_to(folder / "to itself.jpg")
    os.mkfifo(folder / "a pipe.png")
    read_bytes = Path.read_bytes

    def forbidden(path: Path) -> bytes:
        # Root, as tests in containers are, may read whatever its mode says.
        if path.name == "forbidden.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    (folder / "forbidden.png").write_bytes(encoded(".png"))
    result = restore_files(folder, loaded, tmp_path / "out")
    failed = {Path(file.input).name: file.error for file in result.files if file.status == "failed"}
    links = {"to nowhere.png", "to itself.jpg", "forbidden.png"}
    assert len(bad) + len(links) >= 100
    assert failed.keys() == bad.keys() | links
    for name, error in failed.items():
        assert error is not None and "\n" not in error and repr(name)[1:-1] in error, error
    assert "Permission denied" in (failed["forbidden.png"] or "")
    assert result.count("restored") == len(odd) + 2
    assert read_photo(tmp_path / "out" / "strip.png").rgb_hwc.shape == (3, 30_000, 3)
    assert read_photo(tmp_path / "out" / "new\nline \N{CAMERA}.png").rgb_hwc.shape == SHARP.shape
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


WHOLE = [encoded(suffix) for suffix in _KINDS] + [
    encoded(".tif", compression=how) for how in ("tiff_lzw", "tiff_deflate", "packbits")
]


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    whole=st.sampled_from(WHOLE),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=6),
    cut=st.floats(0, 1),
    is_cut=st.booleans(),
)
def test_any_bytes_give_a_photo_or_a_line(
    whole: bytes, changes: list[tuple[float, bytes]], cut: float, is_cut: bool
) -> None:
    content = bytearray(whole[: int(cut * len(whole))] if is_cut else whole)
    for place, patch in changes:
        start = int(place * max(0, len(content) - len(patch)))
        content[start : start + len(patch)] = patch
    before = psutil.Process().memory_info().rss
    pixels = declared_pixels(bytes(content))
    try:
        photo = read_photo(bytes(content), name="fuzzed", max_megapixels=1)
    except InputError as error:
        assert "fuzzed" in str(error) and "\n" not in str(error)
    else:
        assert isinstance(photo, Photo) and photo.rgb_hwc.ndim == 3
        assert pixels == photo.rgb_hwc.shape[0] * photo.rgb_hwc.shape[1] <= 1e6
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


def test_the_limit_is_below_what_memory_holds() -> None:
    assert MAX_MEGAPIXELS * 1e6 * 6 < 1.1 * 2**30
