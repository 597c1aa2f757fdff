"""A client of the service's, and pictures to send."""

from __future__ import annotations

import http.client
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def told(self) -> dict[str, Any]:
        return json.loads(self.content)

    @property
    def image(self) -> NDArray[Any]:
        return np.asarray(Image.open(io.BytesIO(self.content)))


def ask(
    address: str,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    *,
    method: str | None = None,
    **headers: str,
) -> Answer:
    """One request on a connection of its own; an iterable is sent in chunks, without a length."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=TIMEOUT_S)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, given)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has answered before all was sent
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(status=response.status, headers=names, content=response.read())
    finally:
        connection.close()
    _assert_told(address, method or ("GET" if body is None else "POST"), path.partition("?")[0], answer)
    return answer


@cache
def _interface(address: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/openapi.json")
        return json.load(connection.getresponse())["paths"]
    finally:
        connection.close()


def _assert_told(address: str, method: str, path: str, answer: Answer) -> None:
    """Whatever a test asks, the interface must tell that answer, and each header of our own."""
    operation = _interface(address).get(path, {}).get(method.lower())
    if operation is None:
        return
    assert str(answer.status) in operation["responses"], f"{method} {path}: {answer.status} is not told"
    told = operation["responses"][str(answer.status)].get("headers", {})
    ours = [name for name in answer.headers if name.startswith(("x-", "server-timing", "retry", "www-"))]
    untold = set(ours) - {name.lower() for name in told} - {"x-content-type-options", "x-request-id"}
    assert not untold, f"{method} {path}: {untold} of {answer.status} are not told"


def restore(address: str, body: bytes | Iterable[bytes], query: str = "", **headers: str) -> Answer:
    headers.setdefault("Content_Type", "image/png")
    return ask(address, f"/v1/restore{query}", body, **headers)


def assert_clear(answer: Answer) -> None:
    """It is our JSON, and says nothing of the inside."""
    assert set(answer.told) == {"problem", "expected", "got", "fix"}, answer.content
    assert answer.told["problem"] and answer.headers["content-type"] == "application/json"
    assert not any(secret in answer.content.decode() for secret in ("/tmp", "Traceback", "BytesIO", ".py"))


def encoded(image: NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def form(*files: bytes, boundary: str = "a-boundary") -> tuple[bytes, str]:
    """A form with these files, and its content type."""
    parts = [
        b"--%s\r\nContent-Disposition: form-data; name=\"image\"; filename=\"../../etc/passwd\"\r\n"
        b"Content-Type: image/png\r\n\r\n%s\r\n" % (boundary.encode(), file)
        for file in files
    ]  # fmt: skip
    return b"".join(parts) + b"--%s--\r\n" % boundary.encode(), f"multipart/form-data; boundary={boundary}"
