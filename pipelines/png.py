"""PNG that is made to be read in part, and fast: any program reads it, we read ours by window.

Every row is filtered `Up` (PNG specification, 9.2: the difference to the row above), so that undoing it is
one vector addition a row, over the wanted columns only; rows below the wanted ones are never inflated. With
ISA-L for the deflate stream a 512² crop takes 2 ms to write and under 2 ms to read, where OpenCV takes 16 and
5 ms at the same size in bytes (measured on one core of an AMD EPYC).
"""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IHDR = struct.Struct(">I4sIIBBBBBI")  # length, type, width, height, depth, colour, 3 methods, CRC
_CHUNK_HEAD = struct.Struct(">I4s")
_RGB_8 = (8, 2, 0, 0, 0)  # bit depth, truecolour, deflate, adaptive filtering, not interlaced
_IDAT_AT = len(_SIGNATURE) + _IHDR.size
_UP = 2
_LEVEL = 1
_MAX_SIDE_PX = 2**16

Image = NDArray[np.uint8]


def encode_png(rgb_hwc_u8: Image) -> bytes:
    """Lossless PNG of an (H, W, 3) uint8 RGB array."""
    height, width, channels = rgb_hwc_u8.shape
    assert channels == 3 and rgb_hwc_u8.dtype == np.uint8, (rgb_hwc_u8.shape, rgb_hwc_u8.dtype)
    rows = rgb_hwc_u8.reshape(height, width * 3)
    filtered = np.empty((height, width * 3 + 1), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, *_RGB_8)
    content = isal_zlib.compress(filtered, _LEVEL)
    return b"".join((_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", content), _chunk(b"IEND", b"")))


def decode_png(buffer: bytes | memoryview) -> Image:
    """Decode to (H, W, 3) uint8 RGB: a PNG of ours fast, any other image that OpenCV reads as it does.

    Raises:
        ValueError: the bytes are no image, or damaged.
    """
    size = _size_of_ours(buffer)
    if size is not None:
        image = _decode_ours(buffer, size, slice(0, size[0]), slice(0, size[1]))
        if image is not None:
            return image
    return _decode_any(buffer)


def decode_png_window(buffer: bytes | memoryview, rows: slice, columns: slice) -> Image:
    """Decode one window to (H, W, 3) uint8 RGB.

    Args:
        buffer: a PNG of ours, or any other image that OpenCV reads.
        rows, columns: start and stop, inside the image.

    Raises:
        ValueError: the bytes are no image, or damaged.
    """
    size = _size_of_ours(buffer)
    if size is not None:
        image = _decode_ours(buffer, size, rows, columns)
        if image is not None:
            return image
    return _decode_any(buffer)[rows, columns]


def _size_of_ours(buffer: bytes | memoryview) -> tuple[int, int] | None:
    """Height and width where the header is one that `encode_png` writes, IDAT next to it."""
    if len(buffer) < _IDAT_AT + _CHUNK_HEAD.size or bytes(buffer[: len(_SIGNATURE)]) != _SIGNATURE:
        return None
    _, _, width, height, *kind, _ = _IHDR.unpack_from(buffer, len(_SIGNATURE))
    is_next = bytes(buffer[_IDAT_AT + 4 : _IDAT_AT + 8]) == b"IDAT"
    if tuple(kind) != _RGB_8 or not is_next or not 0 < max(width, height) < _MAX_SIDE_PX:
        return None
    return height, width


def _decode_ours(
    buffer: bytes | memoryview, size: tuple[int, int], rows: slice, columns: slice
) -> Image | None:
    """The window, or None where the file is another program's: several IDATs, other filters."""
    row_bytes = size[1] * 3 + 1
    length, _ = _CHUNK_HEAD.unpack_from(buffer, _IDAT_AT)
    start = _IDAT_AT + _CHUNK_HEAD.size
    content = memoryview(buffer)[start : start + length]
    if bytes(buffer[start + length + 8 : start + length + 12]) != b"IEND":
        return None
    # Checked before anything is made of it: a flipped bit would give other pixels, and no error.
    (crc,) = struct.unpack_from(">I", buffer, start + length)
    if zlib.crc32(content, zlib.crc32(b"IDAT")) != crc:
        raise ValueError("its checksum does not fit: a damaged PNG")
    wanted = rows.stop * row_bytes
    inflated = isal_zlib.decompressobj().decompress(content, wanted)
    if len(inflated) != wanted:
        raise ValueError(f"{len(inflated)} bytes of pixels instead of {wanted}")
    filtered = np.frombuffer(inflated, np.uint8).reshape(rows.stop, row_bytes)
    if (filtered[:, 0] != _UP).any():
        return None
    part = filtered[:, 1 + 3 * columns.start : 1 + 3 * columns.stop]
    image = np.empty((rows.stop - rows.start, part.shape[1]), np.uint8)
    # Above the window only the sum is wanted, and that in one call.
    np.add.reduce(part[: rows.start + 1], axis=0, dtype=np.uint8, out=image[0])
    for row in range(1, len(image)):
        np.add(image[row - 1], part[rows.start + row], out=image[row])
    return image.reshape(len(image), -1, 3)


def _decode_any(buffer: bytes | memoryview) -> Image:
    try:
        bgr = cv2.imdecode(np.frombuffer(buffer, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # nothing in it, or absurd dimensions
        bgr = None
    if bgr is None:
        raise ValueError("not an image")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return b"".join(
        (
            _CHUNK_HEAD.pack(len(content), kind),
            content,
            struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))),
        )
    )
