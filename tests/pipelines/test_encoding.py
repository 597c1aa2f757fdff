from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from nafnet_core import InputError
from pipelines.encoding import what_is_lost, write_photo
from pipelines.images import Photo, read_photo
from tests.pipelines.pairs import piece

SHARP = piece(0, 24, 40)
DEEP = SHARP.astype(np.uint16) * 257 + np.arange(40, dtype=np.uint16)[:, None] % 7
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKE, ORIENTATION, EXIF_IFD, GPS_IFD = 0x010F, 0x0112, 0x8769, 0x8825
EXPOSURE_TIME, LATITUDE_REF = 0x829A, 1


def exif_of_a_camera() -> bytes:
    exif = Image.Exif()
    exif[MAKE], exif[ORIENTATION] = "Maker", 1
    exif.get_ifd(EXIF_IFD)[EXPOSURE_TIME] = (1, 60)
    exif.get_ifd(GPS_IFD)[LATITUDE_REF] = "N"
    return exif.tobytes()


def photo_of(pixels: np.ndarray, **changes: Any) -> Photo:
    plain = Photo(rgb_hwc=pixels, alpha_hw=None, is_gray=False, exif=None, icc=None)
    return replace(plain, **changes)


def gray_of(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., :1], 3, axis=2)


def written(path: Path, photo: Photo) -> Photo:
    write_photo(path, photo)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "something was left behind"
    return read_photo(path)


def assert_same(again: Photo, photo: Photo) -> None:
    assert again.rgb_hwc.dtype == photo.rgb_hwc.dtype
    assert np.array_equal(again.rgb_hwc, photo.rgb_hwc)
    assert again.is_gray == photo.is_gray
    assert (again.alpha_hw is None) == (photo.alpha_hw is None)
    if photo.alpha_hw is not None:
        assert np.array_equal(again.alpha_hw, photo.alpha_hw)


# Round trips


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_8_bit_comes_back_exactly(tmp_path: Path, suffix: str, gray: bool, alpha: bool) -> None:
    pixels = gray_of(SHARP) if gray else SHARP
    photo = photo_of(pixels, is_gray=gray, alpha_hw=SHARP[..., 2].copy() if alpha else None)
    assert_same(written(tmp_path / f"photo{suffix}", photo), photo)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_comes_back_exactly(tmp_path: Path, suffix: str, gray: bool, alpha: bool) -> None:
    pixels = gray_of(DEEP) if gray else DEEP
    photo = photo_of(pixels, is_gray=gray, alpha_hw=DEEP[..., 2].copy() if alpha else None)
    again = written(tmp_path / f"photo{suffix}", photo)
    # Gray with alpha becomes RGBA: values and alpha matter more than a file's size.
    assert_same(again, replace(photo, is_gray=gray and not alpha))


@pytest.mark.parametrize("gray", [False, True])
def test_bmp_keeps_pixels_and_drops_alpha(tmp_path: Path, gray: bool) -> None:
    photo = photo_of(gray_of(SHARP) if gray else SHARP, is_gray=gray, alpha_hw=SHARP[..., 2].copy())
    assert_same(written(tmp_path / "photo.bmp", photo), replace(photo, alpha_hw=None))


@pytest.mark.parametrize("gray", [False, True])
def test_jpeg_keeps_grayness_and_drops_alpha(tmp_path: Path, gray: bool) -> None:
    photo = photo_of(gray_of(SHARP) if gray else SHARP, is_gray=gray, alpha_hw=SHARP[..., 2].copy())
    again = written(tmp_path / "photo.jpg", photo)
    assert again.is_gray == gray and again.alpha_hw is None
    assert np.abs(again.rgb_hwc.astype(int) - photo.rgb_hwc).mean() < 4


def test_webp_keeps_alpha(tmp_path: Path) -> None:
    photo = photo_of(SHARP, alpha_hw=SHARP[..., 2].copy())
    again = written(tmp_path / "photo.webp", photo)
    assert again.alpha_hw is not None and np.array_equal(again.alpha_hw, photo.alpha_hw)
    assert np.abs(again.rgb_hwc.astype(int) - SHARP)[photo.alpha_hw > 0].mean() < 6


@pytest.mark.parametrize(
    ("suffix", "pixels"),
    [(".jpg", SHARP), (".webp", SHARP), (".png", SHARP), (".tif", SHARP), (".png", DEEP), (".tif", DEEP)],
)
@pytest.mark.parametrize("gray", [False, True])
def test_exif_and_icc_are_kept(tmp_path: Path, suffix: str, pixels: np.ndarray, gray: bool) -> None:
    # Without its profile a 16-bit ProPhoto file shows other colours, so 16 bit matters most.
    photo = photo_of(gray_of(pixels) if gray else pixels, is_gray=gray, exif=exif_of_a_camera(), icc=ICC)
    again = written(tmp_path / f"photo{suffix}", photo)
    assert again.icc == ICC
    with Image.open(tmp_path / f"photo{suffix}") as image:
        exif = image.getexif()
        assert exif[MAKE] == "Maker" and exif[ORIENTATION] == 1
        assert exif.get_ifd(EXIF_IFD)[EXPOSURE_TIME] == (1, 60) or float(
            exif.get_ifd(EXIF_IFD)[EXPOSURE_TIME]
        ) == pytest.approx(1 / 60)
        assert exif.get_ifd(GPS_IFD)[LATITUDE_REF] == "N"
    # Once more through our hands: nothing wears off.
    assert again.exif is not None
    assert written(tmp_path / f"photo{suffix}", again).exif == again.exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_written_photo_is_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKE] = orientation, "Maker"
    Image.fromarray(SHARP).save(tmp_path / f"photo{suffix}", exif=exif)
    photo = read_photo(tmp_path / f"photo{suffix}")
    again = written(tmp_path / f"photo{suffix}", photo)
    # A second turn would show here.
    assert np.array_equal(again.rgb_hwc, photo.rgb_hwc)
    with Image.open(tmp_path / f"photo{suffix}") as image:
        assert image.getexif()[ORIENTATION] == 1


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LAB", "YCbCr"])
def test_tiff_of_any_kind_can_be_written_again(tmp_path: Path, mode: str, compression: str | None) -> None:
    # A TIFF's EXIF lies among the tags that say how its pixels are stored. Carried over, these made files
    # that nothing could read, or that showed other colours.
    if mode in ("P", "1") and compression == "jpeg":
        compression = "packbits"
    image = Image.fromarray(SHARP)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
        assert converted is not None
        image = converted
    else:
        image = image.convert(mode)
    source, copy = tmp_path / "in" / "photo.tif", tmp_path / "out" / "photo.tif"
    source.parent.mkdir()
    copy.parent.mkdir()
    image.save(source, compression=compression, dpi=(300, 300), software="Developer")
    photo = read_photo(source)
    assert_same(written(copy, photo), photo)
    with Image.open(copy) as again:
        assert again.info["dpi"] == (300, 300)
        assert again.getexif()[0x0131] == "Developer"


def test_jpeg_quality_is_heeded(tmp_path: Path) -> None:
    sizes = []
    for quality in (30, 95):
        write_photo(tmp_path / "photo.jpg", photo_of(SHARP), quality=quality)
        sizes.append((tmp_path / "photo.jpg").stat().st_size)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".png", ".tif"])
def test_what_a_format_cannot_hold_is_told(tmp_path: Path, suffix: str) -> None:
    deep = replace(photo_of(DEEP), alpha_hw=np.full(DEEP.shape[:2], 30_000, np.uint16))
    lost = what_is_lost(deep, suffix)
    holds_16_bit, holds_alpha = suffix in (".png", ".tif"), suffix not in (".jpg", ".bmp")
    assert ("16 bit became 8" in lost) is not holds_16_bit
    assert ("alpha is left out" in lost) is not holds_alpha
    again = written(tmp_path / f"photo{suffix}", deep)
    assert again.rgb_hwc.dtype == (np.uint16 if holds_16_bit else np.uint8)
    assert (again.alpha_hw is not None) is holds_alpha
    assert np.abs(again.rgb_hwc_u8().astype(int) - deep.rgb_hwc_u8()).mean() < 3


def test_jpeg_keeps_the_colour_of_a_pixel_at_high_quality(tmp_path: Path) -> None:
    lines = np.zeros((32, 32, 3), np.uint8)
    lines[:, ::2, 0] = 255
    errors = []
    for quality in (95, 80):
        write_photo(tmp_path / "lines.jpg", photo_of(lines), quality=quality)
        errors.append(np.abs(read_photo(tmp_path / "lines.jpg").rgb_hwc.astype(int) - lines).mean())
    assert errors[0] < 5 < 20 < errors[1]


# Writes that fail


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write this format.*xyz"):
        write_photo(tmp_path / "photo.xyz", photo_of(SHARP))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pixels", [SHARP, DEEP])
def test_no_folder_to_write_into(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match="cannot write the image"):
        write_photo(tmp_path / "nothing" / "photo.png", photo_of(pixels))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_full_disk_leaves_the_file_that_was_there(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"photo{suffix}"
    write_photo(path, photo_of(SHARP))
    before = path.read_bytes()

    def half_written(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(InputError, match=r"cannot write the image.*No space left on device"):
        write_photo(path, photo_of(255 - SHARP))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
