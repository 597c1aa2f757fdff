"""The table of a deployment report: its rows, what they are held against, and as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipelines.counting import counted
from pipelines.evaluate.document import Block, Chart, Document, Heading, Paragraph, Table, markdown
from pipelines.evaluate.pages import short_name

LEAST_GAIN_DB = 1.0
"""What the reference must gain over the blurred input for losses to mean something."""
PICTURE = "report.png"
TITLE = "Deployment"
_HOW = (
    "Times are medians over rounds in which every model has its turn, in one process, on the CPU, from 8-bit "
    "pixels to 8-bit pixels and the whole image at once; × is how many times faster than the reference, the "
    "median over the rounds. Peak memory is what a fresh process grows by, from just before the file is "
    "opened to the end of a second image of 1280×720, libraries apart."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model in one precision."""

    model: str
    preset: str | None
    """Shape before any pruning; None where that has no name."""
    macs_share: float
    """Of the multiply-accumulates, what pruning left: against expansions of 2; 1 of a whole network."""
    backend: str
    precision: str
    parameters: int
    file_mib: float
    gmacs: float
    """Multiply-accumulates for 1280×720, in 10⁹."""
    psnr_db: float | None
    """Mean over the pairs; None where it was not scored. So the next two."""
    loss_db: float | None
    """What it loses against the reference; below 0 it gains."""
    ssim: float | None
    """None of images smaller than its window, too."""
    latency_256_ms: float
    """Median of an image of 256×256."""
    speedup_256: float
    """How many times faster than the reference."""
    latency_720p_ms: float
    """The same of 1280×720."""
    speedup_720p: float
    peak_memory_mib: float

    @property
    def label(self) -> str:
        """Name, back end and precision."""
        return f"{self.model}, {self.backend} {self.precision}"


@dataclass(frozen=True, kw_only=True)
class DeployTable:
    """Rows that are held against the first of them, the reference."""

    rows: tuple[Row, ...]
    threads: int
    runs: int
    """Rounds behind each median."""
    data: str | None = None
    """What they were scored on; None: not at all."""
    num_images: int = 0
    psnr_blurred_db: float | None = None
    ssim_blurred: float | None = None

    @property
    def reference(self) -> Row:
        return self.rows[0]

    @property
    def gain_db(self) -> float | None:
        """What the reference gains over the blurred input."""
        if self.psnr_blurred_db is None or self.reference.psnr_db is None:
            return None
        return self.reference.psnr_db - self.psnr_blurred_db

    def scores_told(self) -> str:
        """What the scores are of, and what the input scores."""
        if self.psnr_blurred_db is None:
            return "Not scored."
        ssim = "" if self.ssim_blurred is None else f", SSIM {self.ssim_blurred:.4f}"
        return (
            f"Scores are means over {counted(self.num_images, 'image')} of {short_name(self.data or '')}. "
            f"Blurred input: {self.psnr_blurred_db:.2f} dB{ssim}."
        )

    def times_told(self) -> str:
        """What was measured how often, on how many threads."""
        rounds, threads = counted(self.runs, "round"), counted(self.threads, "thread")
        return f"Reference: {self.reference.label}. Times: {rounds} on {threads}."

    def warning(self) -> str | None:
        """Why losses say little here; None where they mean something, or there are none."""
        if self.gain_db is None or self.gain_db >= LEAST_GAIN_DB:
            return None
        return (
            f"Losses in dB say little here: the reference gains {self.gain_db:+.2f} dB over the blurred "
            f"input, and {LEAST_GAIN_DB:g} dB is the least to measure them by."
        )

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "gain_db": self.gain_db, "warning": self.warning()}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other beats: as fast and better, or faster and as good.

    Args:
        points: (latency, PSNR) of each, in any unit; what has a value that is no number is on no front.

    Returns:
        The fastest first. Equal points are on the front together.
    """
    known = [index for index, (cost, gain) in enumerate(points) if cost == cost and gain == gain]
    order = sorted(known, key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        # Of those before it, which are as fast or faster, the last on the front is the best.
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def front_of(rows: Sequence[Row]) -> list[int]:
    """Places of the rows that are on the front of PSNR and latency at 1280×720; the fastest first.

    What the table cannot tell apart, a thousandth of a dB, is no reason to be slower.
    """
    return pareto_front(
        [(row.latency_720p_ms, math.nan if row.psnr_db is None else round(row.psnr_db, 3)) for row in rows]
    )


def front_told(rows: Sequence[Row]) -> str | None:
    """Their numbers, from 1 on; None where nothing was scored."""
    numbers = sorted(place + 1 for place in front_of(rows))
    if not numbers:
        return None
    return f"On the Pareto front of PSNR and time at 1280×720: {', '.join(map(str, numbers))}."


def as_csv(tables: Iterable[DeployTable]) -> str:
    """All rows in full, below a line of names; `reference` is what a row's losses and ratios are against."""
    content = io.StringIO()
    names = ["reference", *(field.name for field in fields(Row)), "psnr_blurred_db", "ssim_blurred"]
    writer = csv.DictWriter(content, names, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        same = {
            "reference": table.reference.label,
            "psnr_blurred_db": table.psnr_blurred_db,
            "ssim_blurred": table.ssim_blurred,
        }
        writer.writerows({**same, **asdict(row)} for row in table.rows)
    return content.getvalue()


def as_markdown(tables: Sequence[DeployTable], *, machine: str, picture: bool) -> str:
    """The report for people.

    Args:
        tables: numbered through, so that the picture can name its points.
        machine: what the times are of.
        picture: whether there is one beside the page.
    """
    blocks: list[Block] = []
    first = 1
    for table in tables:
        if len(tables) > 1:
            blocks.append(Heading(table.reference.model))
        told = (table.scores_told(), table.warning(), f"{table.times_told()} {machine}.")
        blocks += [Paragraph(line) for line in told if line]
        blocks.append(_document_table(table, first))
        first += len(table.rows)
    if told := front_told([row for table in tables for row in table.rows]):
        blocks.append(Paragraph(told))
    if picture:
        blocks.append(Chart(PICTURE, "PSNR against latency, with the Pareto front", b""))
    blocks.append(Paragraph(_HOW, is_note=True))
    return markdown(Document(TITLE, blocks))


def _document_table(table: DeployTable, first: int) -> Table:
    columns = [
        "", "model", "preset", "MACs left", "back end", "precision", "parameters", "MiB", "GMACs", "PSNR, dB",
        "loss, dB", "SSIM", "256×256, ms", "×", "1280×720, ms", "×", "peak, MiB",
    ]  # fmt: skip
    rows = [
        [
            str(number), row.model, row.preset or "–", f"{row.macs_share:.2f}", row.backend, row.precision,
            f"{row.parameters:,}", f"{row.file_mib:.2f}", f"{row.gmacs:.2f}", *score_cells(row),
            *time_cells(row), f"{row.peak_memory_mib:.0f}",
        ]
        for number, row in enumerate(table.rows, first)
    ]  # fmt: skip
    return Table(f"{counted(len(rows), 'row')}, GMACs at 1280×720", columns, rows)


def score_cells(row: Row) -> list[str]:
    """PSNR, loss and SSIM; a dash for what is not known."""
    values = ((row.psnr_db, 2), (row.loss_db, 3), (row.ssim, 4))
    # Rounded first: a loss of -0.0001 is none, and no "-0.000".
    return ["–" if value is None else f"{round(value, n) + 0.0:.{n}f}" for value, n in values]


def time_cells(row: Row) -> list[str]:
    """Latency and how many times faster than the reference, of the small image and of the frame."""
    return [
        f"{row.latency_256_ms:.1f}",
        f"{row.speedup_256:.2f}",
        f"{row.latency_720p_ms:.0f}",
        f"{row.speedup_720p:.2f}",
    ]
