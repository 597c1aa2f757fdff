"""Errors that a user can act on. Each is one line: what, which file, expected, got, what to do.

NAFNetError                1   our bug, unless a subclass says otherwise
├── InputError             2   the user's file, folder or configuration is wrong
├── GateError            3   a quality gate said no
├── CapabilityError      4   this machine or cluster cannot do it
└── StoppedError            130 or 143: stopped on request, state saved
"""

from __future__ import annotations

from pathlib import Path


class NAFNetError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        """Compose the line `what: file (expected …, got …). fix`.

        Args:
            what: the fault in a few words, without a full stop.
            file: the file, folder, URL or key at fault.
            expected: what would have been right.
            got: what was found instead.
            fix: what the user can do, as a sentence or a command.
        """
        line = _one_line(what)
        if file is not None:
            line += f": {str(file)!r}"  # has no line breaks, and its spaces are part of the name
        facts = [
            f"{name} {_one_line(value)}"
            for name, value in (("expected", expected), ("got", got))
            if value is not None
        ]
        if facts:
            line += f" ({', '.join(facts)})"
        if fix:
            line += f". {_one_line(fix)}"
        super().__init__(line)
        # The same in pieces, for those who tell it in another form.
        self.what = _one_line(what)
        self.expected = None if expected is None else _one_line(expected)
        self.got = None if got is None else _one_line(got)
        self.fix = None if fix is None else _one_line(fix)

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles exceptions across processes; the constructor's own signature would not survive.
        return _rebuild, (type(self), str(self)), self.__dict__


class InputError(NAFNetError):
    """The user's file, folder or configuration is wrong."""

    exit_code = 2


class GateError(NAFNetError):
    """A quality gate said no."""

    exit_code = 3


class CapabilityError(NAFNetError):
    """This machine or cluster cannot do what was asked."""

    exit_code = 4


class StoppedError(NAFNetError):
    """Stopped on request with the state saved; `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    exit_code = 130

    def __init__(self, what: str, *, exit_code: int = 130, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = exit_code


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _rebuild(kind: type[NAFNetError], line: str) -> NAFNetError:
    error = kind.__new__(kind)
    Exception.__init__(error, line)
    return error
