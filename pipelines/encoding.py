"""Photos out: whole or not at all, with what the file they came from held beside its colours."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from nafnet_core import InputError
from pipelines.images import TIFF_TAGS_KEPT, Photo, reason
from pipelines.png import encode_png

JPEG_QUALITY = 95
_FULL_COLOUR_QUALITY = 90  # from here on JPEG keeps the colours of every pixel, which others halve
_PNG_IHDR_END = 33
_PNG_LEVEL = 1  # photos hardly get smaller beyond, and take five times as long
_FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
    ".bmp": "BMP",
}  # fmt: skip
_HOLDS_16_BIT = frozenset({".png", ".tif", ".tiff"})
_HOLDS_ALPHA = frozenset({".png", ".tif", ".tiff", ".webp"})


def what_is_lost(photo: Photo, suffix: str) -> list[str]:
    """What a format cannot hold of a photo, in words."""
    lost = []
    if photo.rgb_hwc.dtype == np.uint16 and suffix.lower() not in _HOLDS_16_BIT:
        lost.append("16 bit became 8")
    if photo.alpha_hw is not None and suffix.lower() not in _HOLDS_ALPHA:
        lost.append("alpha is left out")
    return lost


def encode_photo(photo: Photo, suffix: str, *, quality: int = JPEG_QUALITY) -> bytes:
    """Encode by a suffix, keeping alpha, grayness, EXIF and ICC as far as the format holds them.

    Args:
        photo: as `read_photo` returns it; `what_is_lost` tells what the format cannot hold.
        suffix: `.jpg`, `.png`, `.tif`, `.webp` or `.bmp`, or another spelling of these.
        quality: 1 to 100, of JPEG and WebP.

    Raises:
        InputError: another format, or an image that is too large for it.
    """
    kind = _FORMATS.get(suffix.lower())
    if kind is None:
        raise InputError("cannot write this format", got=suffix, expected=" ".join(sorted(_FORMATS)))
    try:
        if photo.rgb_hwc.dtype == np.uint16 and suffix.lower() in _HOLDS_16_BIT:
            pixels = _pixels(photo)
            return _png_of(pixels, photo) if kind == "PNG" else _tiff_of(pixels, photo)
        if kind == "PNG" and not (photo.is_gray and photo.alpha_hw is not None):  # which only Pillow writes
            return _png_of(_pixels(photo), photo)
        return _with_pillow(photo, kind, quality)
    except (OSError, ValueError, cv2.error) as error:  # ValueError: too large for WebP
        raise InputError("cannot write the image", got=reason(error)) from error


def write_photo(path: Path, photo: Photo, *, quality: int = JPEG_QUALITY) -> bytes:
    """Write by the suffix of `path`, as `encode_photo` does, whole or not at all.

    Returns:
        What was written.

    Raises:
        InputError: the folder cannot be written, or as `encode_photo`.
    """
    content = encode_photo(photo, path.suffix, quality=quality)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError("cannot write the image", file=path, got=reason(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return content


def _pixels(photo: Photo) -> NDArray:
    """(H, W, 1), (H, W, 3) or, with alpha, (H, W, 4)."""
    if photo.alpha_hw is not None:
        return np.dstack([photo.rgb_hwc, photo.alpha_hw])
    return _gray(photo)[..., None] if photo.is_gray else photo.rgb_hwc


def _with_pillow(photo: Photo, kind: str, quality: int) -> bytes:
    rgb = photo.rgb_hwc_u8()
    image = Image.fromarray(_gray(photo, rgb) if photo.is_gray else rgb)
    if photo.alpha_hw is not None and kind in ("PNG", "TIFF", "WEBP"):
        alpha = photo.alpha_hw
        alpha = alpha if alpha.dtype == np.uint8 else np.rint(alpha / 257.0).astype(np.uint8)
        image.putalpha(Image.fromarray(alpha))
    extras: dict[str, object] = {"exif": photo.exif, "icc_profile": photo.icc}
    extras = {name: value for name, value in extras.items() if value}
    if kind in ("JPEG", "WEBP"):
        extras["quality"] = quality
    if kind == "JPEG":
        extras["subsampling"] = 0 if quality >= _FULL_COLOUR_QUALITY else 2
    file = io.BytesIO()
    image.save(file, kind, **extras)
    return file.getvalue()


def _png_of(pixels: NDArray, photo: Photo) -> bytes:
    """OpenCV and our own encoder are many times faster than Pillow, and know neither EXIF nor ICC."""
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        plain = encode_png(pixels)
    else:
        channels = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]
        level = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL]
        ok, encoded = cv2.imencode(".png", pixels[..., channels], level)
        assert ok
        plain = encoded.tobytes()
    extras = b""
    if photo.icc:
        extras += _png_chunk(b"iCCP", b"ICC\0\0" + zlib.compress(photo.icc))
    if photo.exif:
        extras += _png_chunk(b"eXIf", photo.exif.removeprefix(b"Exif\0\0"))
    return b"".join((plain[:_PNG_IHDR_END], extras, plain[_PNG_IHDR_END:]))


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _tiff_of(pixels: NDArray[np.uint16], photo: Photo) -> bytes:
    """One uncompressed strip behind its directory (TIFF 6.0, sections 2 to 6)."""
    height, width, channels = pixels.shape
    content = np.ascontiguousarray(pixels, "<u2").tobytes()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if photo.exif:
        exif = Image.Exif()
        exif.load(photo.exif)
        for tag in set(exif) & TIFF_TAGS_KEPT:
            tags[tag] = exif.get_ifd(tag) if tag in TiffImagePlugin.TiffTags.TAGS_V2_GROUPS else exif[tag]
    tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH] = width, height
    tags[TiffImagePlugin.BITSPERSAMPLE] = (16,) * channels
    tags[TiffImagePlugin.COMPRESSION] = 1
    tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 1 if channels == 1 else 2
    tags[TiffImagePlugin.STRIPOFFSETS] = 0  # Pillow adds the directory's own length
    tags[TiffImagePlugin.SAMPLESPERPIXEL] = channels
    tags[TiffImagePlugin.ROWSPERSTRIP], tags[TiffImagePlugin.STRIPBYTECOUNTS] = height, len(content)
    tags[TiffImagePlugin.PLANAR_CONFIGURATION] = 1
    if channels == 4:
        tags[TiffImagePlugin.EXTRASAMPLES] = 2
    if photo.icc:
        tags[TiffImagePlugin.ICCPROFILE] = photo.icc
    file = io.BytesIO()
    tags.save(file)
    return file.getvalue() + content


def _gray(photo: Photo, rgb: NDArray | None = None) -> NDArray:
    rgb = photo.rgb_hwc if rgb is None else rgb
    return rgb.mean(axis=2).round().astype(rgb.dtype)
