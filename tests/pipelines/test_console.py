"""What a person sees: lines that fit their terminal, and remarks."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from pipelines import console
from pipelines.cli.training import _notes

_STEP = {"train/samples_per_s": 1234.5, "train/psnr_db": 31.27, "train/lr": 3e-5, "train/data_wait": 0.003}
_VALIDATED = {"val/psnr_db": 30.11, "val/gain_db": 4.5}


def _screen(width: int, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    fake = Console(file=screen, force_terminal=True, width=width, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "_stderr", fake)
    return screen


def _lines(screen: io.StringIO) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]", plain) if line.strip()]


@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_the_progress_line_fits_its_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _screen(width, monkeypatch)
    with console.progress("train", "samples") as update:
        update(0, 0, "starting the workers")
        update(12_345_678, 25_600_000, _notes(_STEP, _VALIDATED))
    last = _lines(screen)[-1]
    assert max(map(len, _lines(screen))) <= width
    assert "12345678/25600000" in last and last.endswith("-:--:--")  # the time left is never cut off
    assert ("1234.5/s" in last) == (width >= 80)
    assert ("data-wait 0.3% validation 30.11 dB (+4.50)" in last) == (width == 200)


def test_elsewhere_than_on_a_terminal_all_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_stderr", Console(stderr=True, force_terminal=False, soft_wrap=True))
    with console.progress("train", "samples") as update:
        update(0, 0, "starting the workers")
        update(5, 10, _notes(_STEP, {}))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "train: 5/10 samples 1234.5/s patches 31.27 dB lr 3e-05 data-wait 0.3%"


def test_what_goes_on_after_the_end_is_not_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_stderr", Console(stderr=True, force_terminal=False, soft_wrap=True))
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with console.progress("evaluate", "images") as update:
        update(6, 6)
        for number in range(25):
            now += 1.0
            update(6, 6, f"drawing {number}/25")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["evaluate: 6/6 images"] + [f"evaluate: 6/6 images drawing {n}/25" for n in (9, 19)]


def test_warnings_and_what_is_told_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _screen(80, monkeypatch)
    console.warn_on_stderr()
    log = logging.getLogger("pipelines.somewhere")
    log.info("silent")
    log.info("an [aside] of %d", 3, extra=console.TOLD)
    log.warning("a warning")
    assert _lines(screen) == ["nafnet: an [aside] of 3", "nafnet: a warning"]
    logging.getLogger("pipelines").handlers.clear()


def test_a_table_of_nameless_columns_has_no_header(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("Run", ["", ""], [["samples", 4]], values_left=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 4 and "samples" in lines[2]
