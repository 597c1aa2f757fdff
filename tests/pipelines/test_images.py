from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nafnet_core import InputError
from pipelines.images import Photo, list_images, read_photo, read_rgb_u8
from tests.pipelines.pairs import piece

ORIENTATION = 0x0112
# No two rows or columns alike and not square, so that no two ways of turning it look the same.
SHARP = piece(0, 24, 40)
DEEP = SHARP.astype(np.uint16) * 257
DEEP[0, 0] = (0, 1, 65_535)
DEEP[1, 1] = (255, 256, 257)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def refused(path: Path) -> str:
    """The one line that the user reads."""
    with pytest.raises(InputError) as caught:
        read_photo(path)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line
    return line


def write_deep(path: Path, pixels: NDArray[np.uint16]) -> Path:
    """16 bit by OpenCV; gray, RGB or RGBA."""
    bgr = pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    assert cv2.imwrite(str(path), bgr)
    return path


def png(width: int, height: int, *, bit_depth: int, color_type: int, rows: bytes) -> bytes:
    """A PNG by hand, for headers that no library would write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# Turning upright


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_photo_comes_out_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(SHARP).save(path, exif=oriented(orientation))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    photo = read_photo(path)
    assert np.array_equal(photo.rgb_hwc, upright)
    assert photo.rgb_hwc.shape == ((40, 24, 3) if orientation >= 5 else (24, 40, 3))
    assert photo.rgb_hwc.flags.c_contiguous


@pytest.mark.parametrize("orientation", range(1, 9))
def test_alpha_is_turned_with_the_pixels(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "photo.png"
    rgba = np.dstack([SHARP, SHARP[::-1, ::-1, 0]])
    Image.fromarray(rgba).save(path, exif=oriented(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    photo = read_photo(path)
    assert photo.alpha_hw is not None
    assert np.array_equal(np.dstack([photo.rgb_hwc, photo.alpha_hw]), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_comes_out_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(DEEP[..., 1]).save(path, exif=oriented(orientation))
    # Pillow turns 8 bit; the upper byte of 257 v is v.
    eight = Image.fromarray((DEEP[..., 1] >> 8).astype(np.uint8))
    eight.getexif()[ORIENTATION] = orientation
    photo = read_photo(path)
    assert photo.rgb_hwc.dtype == np.uint16
    assert np.array_equal(photo.rgb_hwc[..., 0] >> 8, np.asarray(ImageOps.exif_transpose(eight)))


def test_odd_orientation_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(SHARP).save(path, exif=oriented(99))
    assert np.array_equal(read_photo(path).rgb_hwc, SHARP)


# Kinds of pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_every_mode_becomes_rgb(tmp_path: Path, suffix: str, mode: str) -> None:
    image = Image.fromarray(SHARP).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(SHARP[..., 2]))
    path = tmp_path / f"photo{suffix}"
    image.save(path)
    photo = read_photo(path)
    assert photo.rgb_hwc.dtype == np.uint8
    assert np.array_equal(photo.rgb_hwc, np.asarray(image.convert("RGB")))
    assert photo.is_gray == (mode in ("1", "L", "LA"))
    if mode in ("LA", "RGBA"):
        assert photo.alpha_hw is not None and np.array_equal(photo.alpha_hw, SHARP[..., 2])
    else:
        assert photo.alpha_hw is None
    assert photo.exif is None and photo.icc is None


def test_transparent_palette_entry_is_alpha(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    indices = (SHARP[..., 0] // 64).astype(np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    image.save(path, transparency=2)
    photo = read_photo(path)
    values = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]], np.uint8)
    assert set(np.unique(indices)) == {0, 1, 2, 3}
    assert np.array_equal(photo.rgb_hwc, values[indices])
    assert photo.alpha_hw is not None
    assert np.array_equal(photo.alpha_hw, np.where(indices == 2, 0, 255))
    assert not photo.is_gray


def test_transparent_colour_is_alpha(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    key = tuple(int(value) for value in SHARP[3, 5])
    Image.fromarray(SHARP).save(path, transparency=key)
    photo = read_photo(path)
    assert photo.alpha_hw is not None
    assert np.array_equal(photo.alpha_hw == 0, (SHARP == key).all(axis=2))


def test_cmyk_jpeg_becomes_rgb_without_the_profile_of_its_inks(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(SHARP).convert("CMYK").save(path, quality=100, subsampling=0, icc_profile=b"inks" * 32)
    photo = read_photo(path)
    assert np.abs(photo.rgb_hwc.astype(int) - SHARP).mean() < 2
    # Kept, it would tell viewers that the RGB values are inks.
    assert photo.icc is None


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_values_are_exact(tmp_path: Path, suffix: str) -> None:
    gray = read_photo(write_deep(tmp_path / f"gray{suffix}", DEEP[..., 0]))
    assert gray.is_gray and gray.rgb_hwc.dtype == np.uint16
    assert np.array_equal(gray.rgb_hwc, np.dstack([DEEP[..., 0]] * 3))
    color = read_photo(write_deep(tmp_path / f"rgb{suffix}", DEEP))
    assert not color.is_gray and color.alpha_hw is None
    assert np.array_equal(color.rgb_hwc, DEEP)
    alpha = read_photo(write_deep(tmp_path / f"rgba{suffix}", np.dstack([DEEP, DEEP[::-1, :, 0]])))
    assert np.array_equal(alpha.rgb_hwc, DEEP)
    assert alpha.alpha_hw is not None and np.array_equal(alpha.alpha_hw, DEEP[::-1, :, 0])


def test_16_bit_gray_with_alpha(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP[..., :2])
    path.write_bytes(png(40, 24, bit_depth=16, color_type=4, rows=rows))
    photo = read_photo(path)
    assert np.array_equal(photo.rgb_hwc, np.dstack([DEEP[..., 0]] * 3))
    assert photo.alpha_hw is not None and np.array_equal(photo.alpha_hw, DEEP[..., 1])


def test_16_bit_is_rounded_to_8(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 385, 386, 65_406, 65_407, 65_535]], np.uint16)
    path = write_deep(tmp_path / "photo.png", values)
    assert read_rgb_u8(path)[0, :, 0].tolist() == [0, 0, 1, 1, 1, 2, 254, 255, 255]


def test_reading_as_8_bit_drops_alpha(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(np.dstack([SHARP, SHARP[..., 0]])).save(path)
    assert np.array_equal(read_rgb_u8(path), SHARP)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_32_bit_is_refused(tmp_path: Path, kind: type) -> None:
    # Pillow would clip it: a float image in 0…1 came out black.
    path = tmp_path / "photo.tif"
    Image.fromarray(SHARP[..., 0].astype(kind)).save(path)
    assert "32 bit" in refused(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
def test_one_pixel(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(np.full((1, 1, 3), 77, np.uint8)).save(path)
    assert np.abs(read_photo(path).rgb_hwc.astype(int) - 77).max() <= 1


def test_first_picture_of_a_stereo_camera(tmp_path: Path) -> None:
    # Phones write MPO, a JPEG with a depth map or a second view behind it, and call it .jpg.
    path = tmp_path / "photo.jpg"
    first, second = Image.fromarray(SHARP), Image.fromarray(255 - SHARP)
    first.save(path, format="MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(read_photo(path).rgb_hwc.astype(int) - SHARP).mean() < 5


# What is refused


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    assert "no such image" in refused(tmp_path / "photo.png")
    (tmp_path / "folder.png").mkdir()
    assert "no such image" in refused(tmp_path / "folder.png")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"This is no image, whatever its name says.\n"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_no_image_at_all(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(content)
    line = refused(path)
    assert "not an image" in line and f"{len(content)} bytes" in line


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(piece(1, 96, 128)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "damaged" in refused(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_truncated_16_bit(tmp_path: Path, suffix: str, share: float) -> None:
    path = write_deep(tmp_path / f"photo{suffix}", DEEP)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "damaged" in refused(path)


@pytest.mark.parametrize("name", ["photo.png", "photo.webp", "gif-named.png", "photo.tif"])
def test_animation_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    frames = [Image.fromarray(SHARP), Image.fromarray(255 - SHARP)]
    kind = "GIF" if name.startswith("gif") else None
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:])
    assert "animated or multi-page" in refused(path)


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_absurd_dimensions_are_refused_from_the_header(tmp_path: Path, bit_depth: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(65_500, 65_500, bit_depth=bit_depth, color_type=2, rows=b"\0" * 1000))
    assert "absurd dimensions" in refused(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
def test_damaged_bytes_give_a_photo_or_a_line(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # A batch of a thousand photos must not end at the one that makes Pillow raise something rare.
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(SHARP).save(path, exif=oriented(6))
    whole, refusals = path.read_bytes(), 0
    rng = np.random.default_rng(5)
    for turn in range(60):
        content = bytearray(whole)
        # Headers are where the variety is.
        reach = len(content) if turn % 3 == 0 else min(len(content), 300)
        for place in rng.integers(0, reach, rng.integers(1, 6)):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            photo = read_photo(path)
        except InputError as error:
            assert str(path) in str(error)
            refusals += 1
        else:
            assert isinstance(photo, Photo) and photo.rgb_hwc.shape[2] == 3
    assert refusals > 0
    capfd.readouterr()  # libtiff and libpng complain on their own


# Listing


def test_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "sub/deep/c.TiFF", "sub/d.webp", "e.jpeg", "f.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("notes.txt", "raw.CR2", ".hidden.png", "._a.jpg", ".thumbnails/a.png", "no-suffix"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["a.jpg", "b.PNG", "e.jpeg", "f.bmp", "sub/d.webp", "sub/deep/c.TiFF"]


def test_folder_below_a_hidden_one_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "photos"
    folder.mkdir(parents=True)
    (folder / "a.png").touch()
    assert list_images(folder) == [folder / "a.png"]


def test_links_to_files_are_listed_and_folders_are_not_gone_into_twice(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").touch()
    links = {"again": "one", "up": "..", "b.png": "one/a.png", "gone.png": "nothing.png", "c.png": "c.png"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    # Those to nowhere as well: who reads them is told.
    expected = [tmp_path / name for name in ("b.png", "c.png", "gone.png")]
    assert list_images(tmp_path) == [*expected, tmp_path / "one" / "a.png"]


def test_no_folder_to_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        list_images(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a folder"):
        list_images(tmp_path / "file")
