"""What `/openapi.json` says of the answers: each status that a path can give, its body and its headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.serve.guard import GUARDED

_TEXT_OR_NULL = {"type": ["string", "null"]}
_REFUSED = {
    "type": "object",
    "required": ["problem", "expected", "got", "fix"],
    "properties": {
        "problem": {"type": "string"},
        "expected": _TEXT_OR_NULL,
        "got": _TEXT_OR_NULL,
        "fix": _TEXT_OR_NULL,
    },
}
_TOLD = {
    400: "An option that is unknown or cannot be; an empty upload, a damaged form",
    401: "No token, or a wrong one",
    403: "Without a token: another host name than this machine's; a POST from another site's page",
    408: "The upload took too long",
    413: "The upload is too large",
    415: "Not a content type of images, or no image of a kind that is read",
    422: "A damaged, truncated or animated image, or too many pixels",
    429: "The queue is full; Retry-After says when to come back",
    500: "A fault of the service's own",
    503: "Not enough memory for this image; as plain text of Ray Serve's: no replica is there",
    504: "Not done in time",
}
_RESTORE = (400, 408, 413, 415, 422, 429, 503, 504)
_RETRY = {"Retry-After": ("integer", "Seconds to wait before the next try.")}
_SENT_WITH = {
    401: {"WWW-Authenticate": ("string", "Bearer, and the realm.")},
    429: _RETRY,
    504: _RETRY,
}
_ANSWER: dict[str, tuple[str, str]] = {
    "X-NAFNet-Model": ("string", "What the model is called."),
    "X-NAFNet-Version": ("string", "Its version in the registry; empty where it is a file or a run."),
    "X-NAFNet-Digest": ("string", "SHA-256 of its weights."),
    "X-NAFNet-Network-Seconds": ("number", "In the network and around it."),
    "X-NAFNet-Queue-Seconds": ("number", "In the queue."),
    "X-NAFNet-Tiles": ("integer", "Tiles that the image was cut into."),
    "X-NAFNet-Tiles-Redone": ("integer", "Tiles that the network broke, run again without local statistics."),
    "X-NAFNet-Tiles-Kept": ("integer", "Tiles that it broke again, left as they were."),
    "X-NAFNet-Colour-Shift": (
        "string",
        "Mean of the network's output less mean of the input: red, green, blue, in levels of 8 bit.",
    ),
    "X-NAFNet-Notes": (
        "string",
        "What the format could not hold, in words, as 'alpha is left out'; absent where it held all.",
    ),
    "Server-Timing": ("string", "Queue, network and total, in milliseconds."),
}
_MODEL = {
    "type": "object",
    "properties": {
        "label": {"type": "string"},
        "version": _TEXT_OR_NULL,
        "digest": {"type": "string"},
        "backend": {"type": "string", "description": "torch, or the runtime of an export."},
    },
}
_STATE = {
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["ready", "not ready"]},
        "model": _MODEL,
        "open": {"type": "integer"},
        "refused": {
            "type": ["object", "null"],
            "properties": {"version": {"type": "string"}, "reason": {"type": "string"}},
        },
        "registry": {"type": "string"},
    },
}
IMAGE = {"schema": {"type": "string", "format": "binary"}}

Responses = dict[int | str, dict[str, Any]]


def restore_responses() -> Responses:
    """Of `/v1/restore`."""
    restored = {
        "description": "The restored image",
        "headers": _headers(_ANSWER),
        "content": {"image/*": IMAGE},
    }
    return {200: restored, **_refusals("/v1/restore", _RESTORE)}


def metrics_responses() -> Responses:
    """Of `/metrics`."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {200: {"description": "Prometheus's text format", "content": text}, **_refusals("/metrics")}


def model_responses() -> Responses:
    """Of `/v1/model`."""
    parts = {"model": _MODEL, "pinned": {"type": "object"}, "limits": {"type": "object"}}
    told = _json("Model, what its pixels depend on, and the limits", {"type": "object", "properties": parts})
    return {200: told, **_refusals("/v1/model")}


def health_responses() -> Responses:
    """Of `/healthz`."""
    state = {"type": "object", "properties": {"status": {"type": "string"}}}
    return {200: _json("It lives", state), **_refusals("/healthz")}


def ready_responses() -> Responses:
    """Of `/readyz`, whose 503 has the same body."""
    not_ready = _json("Requests are not answered", _STATE)
    return {200: _json("Requests are answered", _STATE), 503: not_ready, **_refusals("/readyz")}


def _refusals(path: str, own: Sequence[int] = ()) -> Responses:
    """A path's own, and what any may be answered with: by the guard before it, or after a fault."""
    statuses = {*own, 403, 500} | ({401} if path.startswith(GUARDED) else set())
    found: Responses = {}
    for status in sorted(statuses):
        found[status] = _json(_TOLD[status], _REFUSED)
        if status in _SENT_WITH:
            found[status]["headers"] = _headers(_SENT_WITH[status])
    return found


def _json(told: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": told, "content": {"application/json": {"schema": schema}}}


def _headers(told: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": kind}} for name, (kind, text) in told.items()}
