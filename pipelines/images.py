"""Image files in: what cameras, phones and data sets really contain, turned into RGB arrays.

Pillow reads the header first (kind, declared size, EXIF, ICC) and complains of truncation; OpenCV takes
16-bit files, which Pillow cuts to 8 bit, and our own PNGs, which it reads faster.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nafnet_core import InputError
from pipelines.counting import counted

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp"})
# Pictures all the same, which a user expects to be told of when they are left out.
FOREIGN_SUFFIXES = frozenset(
    {".heic", ".heif", ".avif", ".gif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"}
)
# A little below the limit at which Pillow takes an image for a decompression bomb.
MAX_MEGAPIXELS = 178.9
_ORIENTATION_TAG = 0x0112
_TURNED_ON_ITS_SIDE = (5, 6, 7, 8)
_PNG_BIT_DEPTH_AT = 24
_TIFF_BITS_PER_SAMPLE = 258
# A TIFF's EXIF tags lie among those that say how its pixels are stored, which are another file's business:
# description, maker, model, orientation, resolution (3), software, date, artist, host, copyright, EXIF, GPS.
TIFF_TAGS_KEPT = frozenset({270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853})


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """A decoded image: upright, RGB, with what the file carried beside its colours."""

    rgb_hwc: NDArray[np.uint8] | NDArray[np.uint16]
    alpha_hw: NDArray[np.uint8] | NDArray[np.uint16] | None
    is_gray: bool
    exif: bytes | None
    """EXIF block with the orientation set upright, since the pixels are."""
    icc: bytes | None
    is_on_side: bool = False
    """The file holds it lying on its side: EXIF turns it by a quarter, which swaps width and height."""

    def rgb_hwc_u8(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8: 16 bit rounded to 8."""
        rgb = self.rgb_hwc
        return rgb if rgb.dtype == np.uint8 else np.rint(rgb / 257.0).astype(np.uint8)


def list_images(folder: Path) -> list[Path]:
    """Image files under `folder`, as `image_names` finds them, sorted by path.

    Raises:
        InputError: no such folder.
    """
    return sorted(folder / name for name in image_names(folder))


def image_names(folder: Path, suffixes: Set[str] = IMAGE_SUFFIXES) -> Iterator[str]:
    """Image files under `folder`, recursive, by their paths from there, in no order.

    Hidden ones, and hidden folders, are left out; links are listed, to nowhere as well. Nothing of what was
    found is kept.

    Raises:
        InputError: no such folder, which is told at once.
    """
    if not folder.is_dir():
        raise InputError("no such folder" if not folder.exists() else "not a folder", file=folder)
    names = _local_names(folder, suffixes) if isinstance(folder, Path) else folder.names_below()
    return (name for name in names if _is_of(suffixes, name))


def _is_of(suffixes: Set[str], name: str) -> bool:
    suffix = name[name.rfind(".") :].lower()
    return suffix in suffixes and not name.startswith(".") and "/." not in name


def _local_names(root: Path, suffixes: Set[str]) -> Iterator[str]:
    """Not by `rglob`, which keeps a path of each, and takes four times as long."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(root / folder)
        except PermissionError:
            log.warning("no permission to look into %s", root / folder)
            continue
        with entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith("."):
                        folders.append(f"{name}/")
                elif _is_of(suffixes, name) and (entry.is_file(follow_symlinks=False) or _is_link(entry)):
                    yield name


def _is_link(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link to a file, or to nothing, of which whoever reads it tells."""
    return entry.is_symlink() and not os.path.isdir(entry)


def read_photo(source: Path | bytes, *, name: str = "", max_megapixels: float = MAX_MEGAPIXELS) -> Photo:
    """Decode one image.

    Args:
        source: its file, or the content of one.
        name: what errors call a content.
        max_megapixels: larger ones are refused, by what the header declares.

    Returns:
        uint8 or uint16 RGB, upright by EXIF; gray and palette become RGB, alpha is kept aside.

    Raises:
        InputError: missing, no image, truncated, animated, of 32-bit values, or too large.
    """
    file = source if isinstance(source, Path) else name  # a path would make `s3:/` of a URL
    if isinstance(source, Path) and not source.is_file():
        raise InputError("no such image", file=source)
    content = source if isinstance(source, Path) else io.BytesIO(source)
    if max_megapixels > MAX_MEGAPIXELS:  # asked for; Pillow's own limit lies at twice this figure
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, round(max_megapixels * 1e6 / 2) + 1)
    with _pillow_errors(file, source), Image.open(content) as image:
        _check_size(image, file, max_megapixels)
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise InputError("an animated or multi-page image", file=file, expected="one picture")
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION_TAG, 1)
        exif[_ORIENTATION_TAG] = 1
        is_deep = _is_16_bit(image, source)
        pixels, alpha, is_gray = _read_deep(source) if is_deep else _read_8_bit(image)
        is_on_side = orientation in _TURNED_ON_ITS_SIDE
        if image.format == "TIFF":
            orientation = 1 if is_deep else orientation  # OpenCV turns TIFFs upright, whatever it is told
            for tag in set(exif) - TIFF_TAGS_KEPT:
                del exif[tag]
        return Photo(
            rgb_hwc=_upright(pixels, orientation),
            alpha_hw=None if alpha is None else _upright(alpha, orientation),
            is_gray=is_gray,
            exif=exif.tobytes() if len(exif) > 1 else None,
            # The profile of inks says nothing of the RGB made from them, and confuses viewers.
            icc=None if image.mode in ("CMYK", "LAB") else image.info.get("icc_profile"),
            is_on_side=is_on_side,
        )


def declared_pixels(content: bytes) -> int:
    """Width times height, as the header says; 0 where there is none to be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                return image.width * image.height
    except Exception:  # as many kinds as there are damages; decoding will tell
        return 0


def read_rgb_u8(path: Path) -> NDArray[np.uint8]:
    """Decode to (H, W, 3) uint8 RGB; 16 bit is rounded to 8, alpha is dropped. Raises as `read_photo`."""
    return read_photo(path).rgb_hwc_u8()


@contextmanager
def _pillow_errors(path: Path | str, source: Path | bytes) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and of images over 89 MP
            yield
    except UnidentifiedImageError as error:
        suffix = Path(str(path).partition("?")[0]).suffix
        if suffix.lower() in FOREIGN_SUFFIXES:
            raise InputError(
                f"{suffix} files are not read", file=path, fix="Export it as JPEG, PNG or TIFF"
            ) from error
        num_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
        raise InputError(
            "not an image, or damaged from the start" if num_bytes else "not an image, but an empty file",
            file=path,
            got=counted(num_bytes, "byte"),
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError("an image of absurd dimensions", file=path, got=reason(error)) from error
    except (InputError, MemoryError):
        raise
    except Exception as error:  # damaged files make Pillow raise TypeError, struct.error and what not
        raise InputError(
            "a damaged or truncated image", file=path, got=reason(error), fix="Copy or export it again"
        ) from error


def _check_size(image: Image.Image, path: Path | str, max_megapixels: float) -> None:
    """Before anything is decoded: a few hundred bytes may declare gigabytes."""
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise InputError(
            "an image of absurd dimensions",
            file=path,
            expected=f"at most {max_megapixels:g} megapixels",
            got=f"{width}×{height}",
            fix="Shrink it; `prepare` takes larger ones with --max-megapixels",
        )


def _is_16_bit(image: Image.Image, source: Path | bytes) -> bool:
    if image.format == "PNG":
        return _content(source, _PNG_BIT_DEPTH_AT + 1)[_PNG_BIT_DEPTH_AT] == 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (8,))  # type: ignore[attr-defined]
        return max(bits if isinstance(bits, tuple) else (bits,)) == 16
    return False


def _content(source: Path | bytes, count: int = -1) -> NDArray[np.uint8]:
    """The first `count` bytes, or all."""
    if isinstance(source, Path):
        return np.fromfile(source, np.uint8, count)
    return np.frombuffer(source, np.uint8, count)


def _read_8_bit(image: Image.Image) -> tuple[NDArray, NDArray | None, bool]:
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"values of 32 bit, mode {image.mode}: export it with 8 or 16 bit")
    image.load()  # raises where the file ends early
    alpha, is_gray = None, image.mode in ("1", "L", "LA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    # `convert` copies where there is nothing to convert, which of 48 megapixels is 190 MiB. A TIFF that
    # Pillow has turned upright would be read anew for its array (Pillow 13).
    is_ready = image.mode == "RGB" and image.format != "TIFF"
    return np.asarray(image if is_ready else image.convert("RGB")), alpha, is_gray


def _read_deep(source: Path | bytes) -> tuple[NDArray, NDArray | None, bool]:
    pixels = cv2.imdecode(_content(source), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("OpenCV cannot read it")
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2), None, True
    alpha = np.ascontiguousarray(pixels[..., 3]) if pixels.shape[2] == 4 else None
    return np.ascontiguousarray(pixels[..., 2::-1]), alpha, False


def _upright(pixels: NDArray, orientation: int) -> NDArray:
    """Undo the EXIF orientation (TIFF 6.0 tag 274: 1 upright … 8 turned left)."""
    if orientation in _TURNED_ON_ITS_SIDE:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def reason(error: Exception) -> str:
    """What another library says of a file, as half a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
