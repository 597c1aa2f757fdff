"""What a client is told when it gets no image: the problem, what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Mapping

from nafnet_core.errors import NAFNetError

_MAX_CHARS = 200


class Refusal(Exception):  # noqa: N818  the answer to a request, not a fault of ours
    """An answer of the 4xx or 5xx kind."""

    def __init__(
        self,
        status: int,
        problem: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(problem)
        self.status, self.headers = status, dict(headers or {})
        self.content = {
            "problem": problem,
            "expected": _told(expected),
            "got": _told(got),
            "fix": fix,
        }

    @classmethod
    def of(cls, status: int, error: NAFNetError) -> Refusal:
        """One of our errors, without the name of a file."""
        return cls(status, error.what, expected=error.expected, got=error.got, fix=error.fix)


def _told(value: object) -> str | None:
    """A value as one printable line: it may be the client's."""
    if value is None:
        return None
    line = "".join(char if char.isprintable() else "�" for char in " ".join(str(value).split()))
    return line if len(line) <= _MAX_CHARS else f"{line[:_MAX_CHARS]}…"
