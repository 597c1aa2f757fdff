"""What a person sees: progress on a terminal, plain lines elsewhere, tables, one-line errors."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ProgressCallback = Callable[[int, int], None]

_PLAIN_EVERY_S = 10.0
# Progress and remarks go to stderr, so that stdout holds results only.
_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line to the person, on stderr."""
    _stderr.print(line, markup=False)


@contextmanager
def progress(label: str, unit: str = "") -> Iterator[Callable[..., None]]:
    """Yield `update(done, total, note="")`: a bar on a terminal, a line every ten seconds elsewhere."""
    if _stderr.is_terminal:
        with _bar(label, unit) as update:
            yield update
        return
    last = time.monotonic() - _PLAIN_EVERY_S
    first: tuple[int, float] | None = None

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (done, now)  # a run that goes on does not start at 0
        if done >= total or now - last >= _PLAIN_EVERY_S:
            last = now
            left = (now - first[1]) / (done - first[0]) * (total - done) if done > first[0] else 0.0
            words = (f"{label}: {done}/{total}", unit, note, f"{_clock(left)} left" if left >= 1 else "")
            say(" ".join(word for word in words if word))

    yield update


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_stderr, transient=False) as bar:
        task = bar.add_task(label, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


def _clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        drawn.add_row(*("–" if cell is None else str(cell) for cell in row))
    Console(highlight=False).print(drawn)


def log_to(path: Path) -> None:
    """Send everything that is logged in this process, Ray's and MLflow's included, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def warn_on_stderr() -> None:
    """Show warnings of our own packages as lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("nafnet: %(message)s"))
    handler.setLevel(logging.WARNING)
    for package in ("pipelines", "cluster", "nafnet_core"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
