"""The journal's lines, as the driver and `nafnet inspect` read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_MOST_BYTES = 2**20  # of a journal that waited for a server for days


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the journal."""

    time_s: float
    samples: int
    metrics: Mapping[str, float]
    event: str | None
    end: int
    """Byte of the journal where the line ends."""


def read_rows(journal: Path, offset: int = 0) -> list[Row]:
    """Every whole row of a journal from a byte on; none where there is no journal yet."""
    rows: list[Row] = []
    while more := rows_from(journal, rows[-1].end if rows else offset):
        rows += more
    return rows


def rows_from(journal: Path, offset: int) -> list[Row]:
    """Whole lines from a byte on, a megabyte or so of them; none where there are no more."""
    if not journal.exists():
        return []
    with journal.open("rb") as file:
        file.seek(offset)
        lines = file.readlines(_MOST_BYTES)
    rows = []
    for line in lines:
        if not line.endswith(b"\n"):  # its writer was killed, or is not done yet
            break
        offset += len(line)
        row = json.loads(line)
        rows.append(
            Row(
                time_s=row["time"],
                samples=row["samples"],
                metrics=row["metrics"],
                event=row.get("event"),
                end=offset,
            )
        )
    return rows


def within(journal: Path, offset: int) -> int:
    """`offset` if a line of the journal ends there, else 0: a journal that lost its end, or another one."""
    if offset == 0 or not journal.exists():
        return 0
    with journal.open("rb") as file:
        file.seek(offset - 1)
        return offset if file.read(1) == b"\n" else 0
