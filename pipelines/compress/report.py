"""Models side by side: size, scores, time and memory, as one table and one picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nafnet_core import InputError
from pipelines.compress.chart import draw_chart
from pipelines.compress.contenders import Contender
from pipelines.compress.measuring import SIZES_PX, latencies, peak_memory_mib, speedups
from pipelines.compress.table import PICTURE, DeployTable, Row, as_csv, as_markdown
from pipelines.evaluate.pages import short_name
from pipelines.evaluate.summary import means
from pipelines.files import make_folder, written_aside
from pipelines.scoring.pairs import Pairs
from pipelines.scoring.work import Scorer, score_all
from pipelines.tracking.machine import processor

MARKDOWN, CSV = "report.md", "report.csv"
_FRAME_PX = SIZES_PX[-1]

OnStep = Callable[[int, int, str], None]
Means = dict[str, float | None]


def check_out(out: Path) -> None:
    """Refuse a folder before anything is measured for it.

    Raises:
        InputError: it cannot be written, or has a report of something else.
    """
    make_folder(out)
    if (out / MARKDOWN).exists() and not (out / CSV).exists():
        raise InputError(
            "this report is of something else, and would be replaced", file=out / MARKDOWN,
            fix="Give another --out",
        )  # fmt: skip


def measure(
    contenders: Sequence[Contender],
    pairs: Pairs | None,
    *,
    runs: int,
    on_step: OnStep = lambda done, total, what: None,
) -> DeployTable:
    """Score, weigh and time models. The first is the reference.

    Scores are those of `nafnet evaluate`. All models are open at once while they are timed.

    Args:
        contenders: one or more.
        pairs: to score on; None leaves that out.
        runs: rounds of timing.
        on_step: called with steps done, their number, and what is done just now.

    Raises:
        InputError: an unreadable pair or model.
        CapabilityError: too little memory for a frame.
    """
    num_scored = len(contenders) * (0 if pairs is None else len(pairs))
    num_timed = len(SIZES_PX) * len(contenders) * (runs + 1)
    total, done = num_scored + len(contenders) + num_timed, 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        on_step(done, total, what)

    on_step(0, total, "")
    scores = [_scored(each, pairs, lambda: step("scores")) for each in contenders]
    memory = []
    for each in contenders:
        memory.append(peak_memory_mib(each))
        step("memory")
    times = [latencies(contenders, size, runs=runs, on_run=lambda: step("times")) for size in SIZES_PX]
    rows = tuple(
        _row(each, scores[index], scores[0], memory[index], [at_size[index] for at_size in times], ratio)
        for index, (each, *ratio) in enumerate(zip(contenders, *map(speedups, times), strict=True))
    )
    return DeployTable(
        rows=rows,
        threads=torch.get_num_threads(),
        runs=runs,
        data=None if pairs is None else pairs.label,
        num_images=0 if pairs is None else len(pairs),
        psnr_blurred_db=scores[0].get("psnr_blurred_db"),
        ssim_blurred=scores[0].get("ssim_blurred"),
    )


def write(out: Path, tables: Sequence[DeployTable]) -> list[Path]:
    """Write `report.png`, `report.csv` and `report.md`, each whole or not at all.

    Without scores there is no picture, and an earlier one goes.

    Args:
        out: folder.
        tables: those with scores are all of the same pairs: they share the picture.

    Returns:
        The files, the page first.
    """
    check_out(out)
    rows = [row for table in tables for row in table.rows]
    numbered = [(place, row) for place, row in enumerate(rows, 1) if row.psnr_db is not None]
    files = [out / MARKDOWN, out / CSV]
    contents = {
        CSV: as_csv(tables).encode(),
        MARKDOWN: as_markdown(tables, machine=_machine(), picture=bool(numbered)).encode(),
    }
    if numbered:
        scored = next(table for table in tables if table.psnr_blurred_db is not None)
        title = f"{short_name(scored.data or '')}: blurred input {scored.psnr_blurred_db:.2f} dB"
        contents = {PICTURE: draw_chart(numbered, title=title), **contents}
        files.append(out / PICTURE)
    else:
        (out / PICTURE).unlink(missing_ok=True)
    for name, content in contents.items():
        with written_aside(out / name) as temporary:
            temporary.write_bytes(content)
    return files


def _scored(contender: Contender, pairs: Pairs | None, on_image: Callable[[], None]) -> Means:
    """Means over the pairs, by the protocol of `nafnet evaluate`; empty without pairs."""
    if pairs is None:
        return {}
    scorer = Scorer(model=contender.opener(1), train_patch_px=contender.train_patch_px)
    scores = []
    for scored in score_all(scorer, pairs):
        scores.append(scored.score)
        on_image()
    return means(scores)


def _row(
    contender: Contender,
    scores: Means,
    reference: Means,
    memory_mib: float,
    seconds: Sequence[Sequence[float]],
    ratios: Sequence[float],
) -> Row:
    psnr_db, reference_db = scores.get("psnr_restored_db"), reference.get("psnr_restored_db")
    small_ms, frame_ms = (1e3 * statistics.median(each) for each in seconds)
    return Row(
        model=contender.name,
        preset=contender.preset,
        macs_share=contender.macs_share,
        backend=contender.backend,
        precision=contender.precision,
        parameters=contender.num_parameters,
        file_mib=contender.file_mib,
        gmacs=contender.config.num_macs(*_FRAME_PX) / 1e9,
        psnr_db=psnr_db,
        loss_db=None if psnr_db is None or reference_db is None else reference_db - psnr_db,
        ssim=scores.get("ssim_restored"),
        latency_256_ms=small_ms,
        speedup_256=ratios[0],
        latency_720p_ms=frame_ms,
        speedup_720p=ratios[1],
        peak_memory_mib=memory_mib,
    )


def _machine() -> str:
    """Processor and torch, without which times mean nothing."""
    return f"{processor()}; torch {torch.__version__}"
