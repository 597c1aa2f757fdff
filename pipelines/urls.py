"""Places as text: paths and URLs, and what of a URL may be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

# Of a URL's query, what is shown and written down: whatever else there is may be a signature or a key.
_PUBLIC_OPTIONS = frozenset({"region", "scheme", "endpoint_override", "allow_bucket_creation"})
_IN_BRACKETS = re.compile(r"^\[[\da-fA-F:.]+(%[\w.~-]+)?\](?=:|$)")


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in os.fspath(place)


def absolute(place: str | os.PathLike[str]) -> str:
    """A path made absolute; a URL as it is, without a slash at its end."""
    text = os.fspath(place)
    if not is_url(text):
        return str(Path(text).absolute())
    base, question, query = text.partition("?")
    return f"{base.rstrip('/')}{question}{query}"


def public(place: str | os.PathLike[str]) -> str:
    """A place as it may be shown and written down: a URL without user, password and secret options."""
    text = os.fspath(place)
    if not is_url(text):
        return text
    base, _, query = text.partition("?")
    scheme, _, rest = base.partition("://")
    authority, slash, path = rest.partition("/")
    # Of an address in brackets, `[::1]:9000`, the port comes after them. A secret may hold a bracket, too.
    _, colon, port = _IN_BRACKETS.sub("", authority.rpartition("@")[2]).partition(":")
    if colon and not port.isdecimal():
        # A secret with a slash in it, which should have been %2F: no tool takes it, nor may it be shown.
        authority, slash, path = "…", "/", path.rpartition("@")[2]
    options = {
        name: value
        for name, value in parse_qsl(query, keep_blank_values=True)
        if name in _PUBLIC_OPTIONS and "@" not in value
    }
    user, at, host = authority.rpartition("@")
    # Azure's container and Google's `anonymous` stand there too; with Amazon it is one half of a key.
    user = "" if scheme.lower().rpartition("::")[2] == "s3" else user.partition(":")[0]
    shown = f"{scheme}://{user}{at if user else ''}{host}{slash}{path}"
    return f"{shown}?{urlencode(options, safe=':/')}" if options else shown


def holds_credentials(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL that says more than may be written down."""
    return is_url(place) and _options(public(place)) != _options(os.fspath(place))


def _options(url: str) -> tuple[str, list[tuple[str, str]]]:
    base, _, query = url.partition("?")
    return base, sorted(parse_qsl(query, keep_blank_values=True))


def local_path(place: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A `file://` URL as the path that it is; anything else as it is."""
    text = os.fspath(place)
    return Path(unquote(urlsplit(text).path)) if text.startswith("file://") else place
