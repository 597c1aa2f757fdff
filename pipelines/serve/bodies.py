"""The upload: which kind of body, and the image in it."""

from __future__ import annotations

import re

from pipelines.serve.refusals import Refusal

_PLAIN = ("application/octet-stream", "binary/octet-stream")
_MULTIPART = "multipart/form-data"
_MAX_BOUNDARY = 70  # RFC 2046, section 5.1.1
_EXPECTED = "an image as the body, or multipart/form-data with one file"


def too_large(max_bytes: int, got: int | None = None) -> Refusal:
    """The answer to a body beyond the limit."""
    return Refusal(
        413,
        "the upload is too large",
        expected=f"at most {max_bytes / 2**20:g} MiB",
        got=f"{'more' if got is None else f'{got / 2**20:.1f} MiB'}",
        fix="Shrink the photo, or save it as JPEG",
    )


def check_content_type(content_type: str) -> None:
    """Refuse what is no upload of an image before it is read.

    Raises:
        Refusal: 415.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind in ("", _MULTIPART, *_PLAIN) or kind.startswith("image/"):
        return
    raise Refusal(
        415,
        "not a content type of images",
        expected="image/*, application/octet-stream or multipart/form-data",
        got=kind,
        fix="With curl: -H 'Content-Type: image/jpeg' --data-binary @photo.jpg, or -F image=@photo.jpg",
    )


def image_in(body: bytearray, content_type: str) -> bytes:
    """The image of a body: all of it, or the one file of a form.

    Raises:
        Refusal: 400, an empty body, or a form that is damaged or has not exactly one file.
    """
    kind, _, parameters = content_type.partition(";")
    content = bytes(body)
    if kind.strip().lower() == _MULTIPART:
        content = _file_in(content, parameters)
    if not content:
        raise Refusal(400, "an empty upload", expected=_EXPECTED, got="0 bytes")
    return content


def _file_in(body: bytes, parameters: str) -> bytes:
    match = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', parameters, re.IGNORECASE)
    boundary = (match[1] or match[2]) if match else ""
    if not boundary or len(boundary) > _MAX_BOUNDARY or not boundary.isascii():
        raise Refusal(400, "a form without a boundary", expected="multipart/form-data; boundary=…")
    line = b"\r\n--" + boundary.encode()
    # Each part is preceded by such a line; the first may stand at the very beginning.
    pieces = (b"\r\n" + body).split(line)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise Refusal(400, "a damaged form", expected="parts between boundaries, and one at the end")
    files = []
    for piece in pieces[1:-1]:
        head, blank, content = piece.lstrip(b" \t").removeprefix(b"\r\n").partition(b"\r\n\r\n")
        if blank and b"filename" in head.lower():
            files.append(content)
    if len(files) != 1:
        raise Refusal(400, "a form with one file is needed", expected=_EXPECTED, got=f"{len(files)} files")
    return files[0]
