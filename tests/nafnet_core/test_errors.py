from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

import nafnet_core
from nafnet_core import CapabilityError, GateError, InputError, NAFNetError, StoppedError

EXIT_CODES = {NAFNetError: 1, InputError: 2, GateError: 3, CapabilityError: 4, StoppedError: 130}


@pytest.mark.parametrize(("kind", "exit_code"), EXIT_CODES.items())
def test_exit_code(kind: type[NAFNetError], exit_code: int) -> None:
    assert kind("stop").exit_code == exit_code
    assert issubclass(kind, NAFNetError)
    assert getattr(nafnet_core, kind.__name__) is kind


def test_errors_are_told_apart() -> None:
    kinds = set(EXIT_CODES) - {NAFNetError}
    assert not any(issubclass(a, b) for a in kinds for b in kinds if a is not b)
    # Neither is one a ValueError or an OSError, which other code may catch and swallow.
    assert all(kind.__mro__[1:] == (NAFNetError, *NAFNetError.__mro__[1:]) for kind in kinds)
    assert NAFNetError.__mro__[1] is Exception


def test_the_whole_line() -> None:
    error = InputError(
        "crop too large", file=Path("/data/a.png"), expected="at most 512 px", got="600 px", fix="Use 512"
    )
    assert str(error) == "crop too large: '/data/a.png' (expected at most 512 px, got 600 px). Use 512"


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "what"),
        ({"file": "a"}, "what: 'a'"),
        ({"expected": 1}, "what (expected 1)"),
        ({"got": 0}, "what (got 0)"),
        ({"expected": False, "got": ""}, "what (expected False, got )"),
        ({"fix": "Do this"}, "what. Do this"),
        ({"file": "a", "fix": "Do this"}, "what: 'a'. Do this"),
    ],
)
def test_parts_left_out_leave_no_trace(parts: dict[str, object], line: str) -> None:
    assert str(InputError("what", **parts)) == line  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["what", "file", "expected", "got", "fix"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\x0b", "\u2028"])
def test_message_is_one_line_whatever_is_put_in(part: str, newline: str) -> None:
    # Library messages and file names carry line breaks; a log line or a JSON field must not.
    parts = {"what": "what", part: f"first{newline}second"}
    line = str(InputError(parts.pop("what"), **parts))  # type: ignore[arg-type]
    assert len(line.splitlines()) == 1
    assert "first" in line and "second" in line


def test_file_name_is_shown_as_it_is() -> None:
    # Two spaces are another file than one.
    assert str(InputError("damaged", file="my  photo.png")) == "damaged: 'my  photo.png'"


@pytest.mark.parametrize("kind", list(EXIT_CODES))
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_kind_text_and_exit_code(kind: type[NAFNetError], protocol: int) -> None:
    # Ray sends exceptions across processes.
    error = kind("stopped", fix="Go on")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert str(again) == str(error) == "stopped. Go on"
    assert again.args == error.args
    assert again.exit_code == error.exit_code


@pytest.mark.parametrize("exit_code", [130, 143])
def test_pickling_keeps_the_signal_that_stopped_us(exit_code: int) -> None:
    error = StoppedError("stopped", exit_code=exit_code)
    assert pickle.loads(pickle.dumps(error)).exit_code == exit_code
    assert copy.copy(error).exit_code == exit_code


def test_notes_survive_pickling_and_the_class_is_unharmed() -> None:
    error = StoppedError("stopped", exit_code=143)
    error.where = "rank 1"  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(error)).where == "rank 1"
    assert StoppedError("again").exit_code == 130


@pytest.mark.parametrize("kind", list(EXIT_CODES))
def test_errors_can_be_raised_and_caught_as_one(kind: type[NAFNetError]) -> None:
    with pytest.raises(NAFNetError, match="^what$") as caught:
        raise kind("what")
    assert caught.value.exit_code == EXIT_CODES[kind]
