"""What a client may ask for in the query of `/v1/restore`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipelines.serve.refusals import Refusal

Format = Literal["png", "jpeg", "webp", "tiff"]
_DEFAULT_QUALITY = 95
_MIN_SCALE = 0.1
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """One request's."""

    format: Format | None = None
    """Of the answer; None is the upload's own."""
    quality: int = _DEFAULT_QUALITY
    """Of JPEG and WebP, 1 to 100."""
    keep_colour: bool = False
    """Give the output the low frequencies of the input."""
    scale: float = 1.0
    """0.1 to 1: restore a smaller image and add what that gains to the large one, for large blur."""


# As OpenAPI tells them.
PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "format",
        "in": "query",
        "description": "Format of the answer; left out, the upload's own (BMP comes back as BMP).",
        "schema": {"type": "string", "enum": list(get_args(Format))},
    },
    {
        "name": "quality",
        "in": "query",
        "description": "Of JPEG and WebP.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": _DEFAULT_QUALITY},
    },
    {
        "name": "keep_colour",
        "in": "query",
        "description": "Give the output the wide-area colours of the input.",
        "schema": {"type": "boolean", "default": False},
    },
    {
        "name": "scale",
        "in": "query",
        "description": "Below 1 a smaller image is restored and its gain added to the large one: for blur "
        "larger than the model was trained on, and faster.",
        "schema": {"type": "number", "minimum": _MIN_SCALE, "maximum": 1, "default": 1},
    },
]
_NAMES = [parameter["name"] for parameter in PARAMETERS]


def parse(query: Sequence[tuple[str, str]]) -> Options:
    """Read a query.

    Raises:
        Refusal: 400, an unknown option, one that is given twice, or a value that cannot be.
    """
    given: dict[str, Any] = {}
    for name, value in query:
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, 1)
            fix = f"Did you mean {near[0]}?" if near else "See /docs"
            raise Refusal(400, "unknown option", expected=", ".join(_NAMES), got=name, fix=fix)
        if name in given:
            raise Refusal(400, "an option given twice", expected="once", got=name)
        given[name] = _READERS[name](value)
    return Options(**given)


def _format(value: str) -> str:
    known = get_args(Format)
    lower = {"jpg": "jpeg", "tif": "tiff"}.get(value.lower(), value.lower())
    if lower not in known:
        raise Refusal(400, "unknown format", expected=", ".join(known), got=value)
    return lower


def _quality(value: str) -> int:
    # `int` takes digits of every script, and underscores.
    if not (value.isascii() and value.isdigit() and len(value) <= 3 and 1 <= int(value) <= 100):
        raise Refusal(400, "no such quality", expected="1 to 100", got=value)
    return int(value)


def _keep_colour(value: str) -> bool:
    if value.lower() not in (*_YES, *_NO):
        raise Refusal(400, "keep_colour is yes or no", expected="true or false", got=value)
    return value.lower() in _YES


def _scale(value: str) -> float:
    try:
        scale = float(value) if value.isascii() else 0.0
    except ValueError:
        scale = 0.0
    if not _MIN_SCALE <= scale <= 1:
        raise Refusal(400, "no such scale", expected=f"{_MIN_SCALE} to 1", got=value)
    return scale


_READERS: dict[str, Any] = {
    "format": _format,
    "quality": _quality,
    "keep_colour": _keep_colour,
    "scale": _scale,
}
