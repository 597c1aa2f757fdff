"""An upload to an image, and an image to an answer: on threads beside the network."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nafnet_core.colour import colour_shift, with_colours_of
from nafnet_core.errors import InputError
from nafnet_core.reduced import merged, reduced
from pipelines.counting import counted
from pipelines.encoding import encode_photo, what_is_lost
from pipelines.images import Photo, read_photo
from pipelines.serve.options import Options
from pipelines.serve.refusals import Refusal

# Pillow would open many more, some of them with the help of other programs.
_FORMATS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "TIFF": "tiff", "WEBP": "webp", "BMP": "bmp"}
_OPENED = [kind for kind in _FORMATS if kind != "MPO"]  # what JPEG's reader finds out by itself
_EXPECTED = "PNG, JPEG, TIFF, WebP or BMP"
_MEDIA_TYPES = {kind: f"image/{kind}" for kind in _FORMATS.values()}
_MAX_SIDE_PX = {"webp": 16383, "jpeg": 65535}


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """A decoded upload."""

    photo: Photo
    format: str
    """Its own: a value of `_FORMATS`."""
    image: NDArray[Any]
    """(H, W, 3) RGB, uint8 or uint16, full range: what the network is given, reduced if that was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """An encoded answer."""

    content: bytes
    media_type: str
    colour_shift: tuple[float, float, float]
    """As in `Restoration`, before colours are kept."""
    notes: tuple[str, ...]
    """What the format could not hold."""


def check_header(content: bytes, max_megapixels: float) -> str:
    """Kind of an upload, from its header; nothing is decoded.

    Raises:
        Refusal: 415, no image of a kind that is read; 422, too many pixels, or a damaged header.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_OPENED) as image:
                kind, (width, height) = _FORMATS[image.format or ""], image.size
    except UnidentifiedImageError:
        raise Refusal(
            415,
            "not an image, or of a kind that is not read",
            expected=_EXPECTED,
            got=_looks_like(content),
            fix="Export it as JPEG or PNG",
        ) from None
    except Image.DecompressionBombError:
        raise Refusal(
            422, "an image of absurd dimensions", expected=f"at most {max_megapixels:g} megapixels"
        ) from None
    except Exception as error:  # damaged files make Pillow raise TypeError, struct.error and what not
        raise Refusal(422, "a damaged or truncated image", fix="Copy or export it again") from error
    if width * height > max_megapixels * 1e6:
        raise Refusal(
            422,
            "too many pixels",
            expected=f"at most {max_megapixels:g} megapixels",
            got=f"{width}×{height}",
            fix="Shrink it, or cut it into parts",
        )
    return kind


def decode(content: bytes, kind: str, options: Options, max_megapixels: float) -> Upload:
    """Decode what `check_header` has let pass.

    Raises:
        Refusal: 422, truncated, animated, of 32-bit values, or too large for the answer's format.
    """
    try:
        photo = read_photo(content, name="the upload", max_megapixels=max_megapixels)
    except InputError as error:
        raise Refusal.of(422, error) from error
    wanted = options.format or kind
    limit, longest = _MAX_SIDE_PX.get(wanted), max(photo.rgb_hwc.shape[:2])
    if limit is not None and longest > limit:
        raise Refusal(
            422,
            f"too long for {wanted}",
            expected=f"at most {limit} px a side",
            got=longest,
            fix="?format=png",
        )
    rgb = photo.rgb_hwc
    return Upload(photo=photo, format=kind, image=rgb if options.scale == 1 else reduced(rgb, options.scale))


def encode(upload: Upload, restored: NDArray[Any], options: Options) -> Download:
    """Finish an image that the network returned, in the shape of `upload.image`, as the client wants it."""
    lq = upload.photo.rgb_hwc
    rgb = restored if upload.image is lq else merged(lq, upload.image, restored)
    shift = colour_shift(lq, rgb)
    if options.keep_colour:
        rgb = with_colours_of(lq, rgb)
    kind = options.format or upload.format
    photo = replace(upload.photo, rgb_hwc=rgb)
    return Download(
        content=encode_photo(photo, f".{kind}", quality=options.quality),
        media_type=_MEDIA_TYPES[kind],
        colour_shift=shift,
        notes=tuple(what_is_lost(photo, f".{kind}")),
    )


def _looks_like(content: bytes) -> str:
    """A guess, for the message only."""
    starts = {
        b"GIF8": "GIF", b"%PDF": "PDF", b"<svg": "SVG", b"<?xm": "XML", b"<htm": "HTML", b"<!DO": "HTML",
        b"8BPS": "PSD", b"\x00\x00\x01\x00": "an icon",
    }  # fmt: skip
    brands = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF"}
    kind = starts.get(content[:4]) or (brands.get(content[8:12]) if content[4:8] == b"ftyp" else None)
    return kind or f"{counted(len(content), 'byte')} of something else"
