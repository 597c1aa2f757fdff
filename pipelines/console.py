"""What a person sees: progress on a terminal, plain lines elsewhere, tables, one-line errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

ProgressCallback = Callable[[int, int], None]

_PLAIN_EVERY_S = 10.0
_BAR_COLUMNS = 24
_WIDE_COLUMNS = 100  # below, a bar of a third, and no unit
# `log.info(line, extra=TOLD)`: a remark that a person sees as well, as they see every warning.
TOLD = {"told": True}
# Progress and remarks go to stderr, so that stdout holds results only.
_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line to the person, on stderr."""
    _stderr.print(line, markup=False)


@contextmanager
def progress(label: str, unit: str = "") -> Iterator[Callable[..., None]]:
    """Yield `update(done, total, note="")`: a bar on a terminal, a line every ten seconds elsewhere.

    `note` is what is told beside, or several ways to tell it, the longest first: a terminal shows the first
    that fits into its line. A `total` of 0 is not known yet.
    """
    if _stderr.is_terminal:
        with _bar(label, unit) as update:
            yield update
        return
    last = time.monotonic() - _PLAIN_EVERY_S
    first: tuple[int, float] | None = None
    is_ended = False

    def update(done: int, total: int, note: str | Sequence[str] = "") -> None:
        nonlocal first, last, is_ended
        now = time.monotonic()
        if not total:
            return
        first = first or (done, now)  # a run that goes on does not start at 0
        if (done >= total and not is_ended) or now - last >= _PLAIN_EVERY_S:
            last, is_ended = now, done >= total  # what is told beside may go on after the end
            left = (now - first[1]) / (done - first[0]) * (total - done) if done > first[0] else 0.0
            told = note if isinstance(note, str) else note[0]
            words = (f"{label}: {done}/{total}", unit, told, f"{_clock(left)} left" if left >= 1 else "")
            say(" ".join(word for word in words if word))

    yield update


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Callable[..., None]]:
    # Whatever does not fit is cut off at the note: a line that wraps is drawn anew below itself.
    bar = BarColumn(bar_width=_BAR_COLUMNS)
    note_column = Column(no_wrap=True, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        bar,
        TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", table_column=note_column),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=len("0:00:00"))),
    )
    with Progress(*columns, console=_stderr, transient=False, refresh_per_second=4) as shown:
        task = shown.add_task(label, total=None, note="", count="")

        def update(done: int, total: int, note: str | Sequence[str] = "") -> None:
            count = f"{done}/{total}" if total else ""
            has_room = _stderr.width >= _WIDE_COLUMNS
            bar.bar_width = _BAR_COLUMNS if has_room else _BAR_COLUMNS // 3
            count += f" {unit}" if has_room and unit and total else ""
            taken = len(label) + bar.bar_width + len(count) + len("00:00:00") + len(columns)
            told = _fitting((note,) if isinstance(note, str) else note, _stderr.width - taken)
            note_column.max_width = max(1, _stderr.width - taken)
            shown.update(task, completed=done, total=total or None, count=count, note=told)

        yield update


def _fitting(notes: Sequence[str], room: int) -> str:
    """The first note of at most `room` characters; the last where none is so short."""
    return next((note for note in notes if len(note) <= room), notes[-1])


def _clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, values_left: bool = False
) -> None:
    """Print a table on stdout; without a header where no column has a name. Numbers stand to the right."""
    show(grid(title, columns, rows, values_left=values_left))


def grid(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    values_left: bool = False,
    caption: str | None = None,
) -> Table:
    """A table, to be shown or drawn live."""
    drawn = Table(
        title=title, title_justify="left", title_style="bold", caption=caption, show_header=any(columns)
    )
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 or values_left else "right")
    for row in rows:
        drawn.add_row(*("–" if cell is None else str(cell) for cell in row))
    return drawn


def show(drawn: Table) -> None:
    """Print a table on stdout."""
    Console(highlight=False).print(drawn)


@contextmanager
def live() -> Iterator[Callable[[Table], None] | None]:
    """Yield what draws a table anew in its place on stderr; None where that is no terminal."""
    if not _stderr.is_terminal:
        yield None
        return
    with Live(console=_stderr, refresh_per_second=4, transient=True) as shown:
        yield shown.update


def log_to(path: Path) -> None:
    """Send everything that is logged in this process, Ray's and MLflow's included, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


class _Remarks(logging.Handler):
    """Lines on stderr, through the console that draws the progress line: they go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or getattr(record, "told", False):
            say(f"nafnet: {record.getMessage()}")


def warn_on_stderr() -> None:
    """Show warnings of our own packages, and what is `TOLD`, as lines on stderr."""
    handler = _Remarks()
    for package in ("pipelines", "cluster", "nafnet_core"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
