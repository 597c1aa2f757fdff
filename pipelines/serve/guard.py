"""What stands before every route: who may ask, and what browsers may do with the answers.

`Guard` wraps a replica's application. `proxy_guards` is what Ray Serve's proxies put before theirs: they
would otherwise take in a body of any size, faster than a replica could refuse it (Ray 2.60,
`proxy_asgi_receive`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pipelines.serve.bodies import too_large
from pipelines.serve.refusals import Refusal
from pipelines.serve.settings import ServeSettings, is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "pipelines.serve.guard.proxy_guards"
_LIMITS_VARIABLE = "NAFNET_SERVE_LIMITS"
GUARDED = ("/v1/", "/metrics")
"""Begins of the paths that want the token."""
_COUNTED = "/v1/restore"
_RETRY_S = "2"
_SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """An ASGI application around another: token, this machine's names only without one, headers."""

    def __init__(
        self, app: App, settings: ServeSettings, *, on_refused: Callable[[int], None] = lambda status: None
    ) -> None:
        """`on_refused` is told the status of each refusal to restore, which no route counts."""
        self._app, self._digest, self._on_refused = app, settings.token_digest, on_refused

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                extra = [(key.encode(), value.encode()) for key, value in _SECURITY.items()]
                message = {**message, "headers": given + [item for item in extra if item[0] not in names]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_safely)
        else:
            if scope["path"] == _COUNTED:
                self._on_refused(refusal.status)
            await answer(refusal, send_safely)

    def _refusal(self, scope: Message) -> Refusal | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._digest is None and not _is_this_machine(headers.get(b"host", b"")):
            # A page elsewhere may have its name point here, and would then be of our origin.
            return Refusal(
                403,
                "without a token the service answers to this machine's names only",
                expected="127.0.0.1, [::1] or localhost as the host",
                fix="Start it with --token-file to have it answer to other names",
            )
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site") == b"cross-site":
            return Refusal(403, "a request from another site's page", expected="one from the page at /")
        if self._digest is None or not scope["path"].startswith(GUARDED):
            return None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(token.strip()).hexdigest()
        if scheme.lower() == b"bearer" and hmac.compare_digest(given, self._digest):
            return None
        return Refusal(
            401,
            "a wrong token" if token else "no token",
            expected="Authorization: Bearer TOKEN",
            fix="Ask whoever runs the service for it",
            headers={"WWW-Authenticate": 'Bearer realm="nafnet"'},
        )


class BodyGuard:
    """An ASGI application around a proxy: bodies within their limits, each one and all together."""

    def __init__(self, app: App, max_bytes: int, max_bytes_held: int) -> None:
        self._app, self._max_bytes, self._max_held = app, max_bytes, max_bytes_held
        self._held = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size, refusal, has_begun = 0, None, False
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                await answer(too_large(self._max_bytes, int(value)), send)
                return

        async def receive_some() -> Message:
            nonlocal size, refusal
            message = await receive()
            length = len(message.get("body", b""))
            if length == 0 or refusal is not None:
                return message if refusal is None else {"type": "http.disconnect"}
            if size + length > self._max_bytes:
                refusal = too_large(self._max_bytes)
            elif self._held + length > self._max_held:
                refusal = Refusal(
                    429,
                    "the service is busy",
                    got="other uploads that fill its memory",
                    fix=f"Come back in {_RETRY_S} s",
                    headers={"Retry-After": _RETRY_S},
                )
            else:
                size += length
                self._held += length
                return message
            return {"type": "http.disconnect"}

        async def send_unless_refused(message: Message) -> None:
            nonlocal has_begun
            if refusal is None or has_begun:
                has_begun = True
                await send(message)

        try:
            await self._app(scope, receive_some, send_unless_refused)
        finally:
            self._held -= size
        if refusal is not None and not has_begun:
            await answer(refusal, send)


def proxy_guards() -> list[Any]:
    """Called by name in Ray Serve's proxies."""
    from starlette.middleware import Middleware

    max_bytes, max_held = map(int, os.environ[_LIMITS_VARIABLE].split(","))
    return [Middleware(BodyGuard, max_bytes=max_bytes, max_bytes_held=max_held)]


def proxy_environment(settings: ServeSettings) -> dict[str, str]:
    """What has proxies call `proxy_guards`."""
    limits = f"{settings.max_bytes},{settings.max_bytes_held}"
    return {CALLBACK_VARIABLE: CALLBACK, _LIMITS_VARIABLE: limits}


async def answer(refusal: Refusal, send: Send) -> None:
    """Send a refusal as JSON."""
    content = json.dumps(refusal.content, ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "cache-control": "no-store",
        **refusal.headers,
    }
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})


def _is_this_machine(host: bytes) -> bool:
    name = host.decode("latin-1")
    name = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
    return is_loopback(name)
