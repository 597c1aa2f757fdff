"""Two models side by side on the same pairs: both scored, the difference, where they differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.evaluate.comparison_page import HISTOGRAM, comparison_document
from pipelines.evaluate.difference import Comparison, difference_of
from pipelines.evaluate.document import Strip
from pipelines.evaluate.drawing import draw_strip, histogram, most_different
from pipelines.evaluate.driver import Judge, Progress, run, scorer_of
from pipelines.evaluate.folder import PICTURES, check_out, report_folder, write_content
from pipelines.evaluate.report import report_path
from pipelines.models import LoadedModel
from pipelines.png import decode_png, encode_png
from pipelines.scoring.pairs import Pairs
from pipelines.scoring.work import restore_some
from pipelines.scratch import scratch_folder
from pipelines.workspace import Workspace

COMPARISON = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """A comparison and where it lies."""

    comparison: Comparison
    path: Path
    """Of comparison.json; the pages lie beside it."""


def compare(
    first: LoadedModel,
    second: LoadedModel,
    pairs: Pairs,
    workspace: Workspace,
    *,
    on_progress: Progress = lambda done, total: None,
    on_drawing: Progress = lambda done, total: None,
    judge: Judge | None = None,
    num_workers: int | None = None,
    out: Path | None = None,
) -> CompareResult:
    """Score two models, B (`second`) against A (`first`); each has a report of its own as well.

    Args:
        first, second: the models.
        pairs, workspace, judge, num_workers: as for `run`.
        on_progress: images done of both, and all of them.
        on_drawing: images drawn, and all that are: of each report after its images, of the comparison last.
        out: folder for a copy of the comparison.

    Raises:
        InputError: as `run`; one has local statistics on and the other off.
        CapabilityError: as `run`.
    """
    if out is not None:
        check_out(out)
    reports = []
    for number, loaded in enumerate((first, second)):
        report = run(
            loaded,
            pairs,
            workspace,
            on_progress=lambda done, total, before=number: on_progress(before * total + done, 2 * total),
            on_drawing=on_drawing,
            judge=judge,
            num_workers=num_workers,
        ).report
        reports.append(report)
    comparison = difference_of(*reports)
    data_digest = comparison.first.data_digest
    own = [report_path(workspace, loaded, data_digest).parent.name for loaded in (first, second)]
    path = workspace.reports / f"{own[0]}-against-{own[1]}" / COMPARISON
    with report_folder(path.parent, out) as folder:
        strips = _draw(folder, comparison, (first, second), pairs, num_workers, on_drawing)
        _write(folder, comparison, strips)
    return CompareResult(comparison=comparison, path=path)


def _draw(
    folder: Path,
    comparison: Comparison,
    models: tuple[LoadedModel, LoadedModel],
    pairs: Pairs,
    num_workers: int | None,
    on_drawing: Progress,
) -> list[Strip]:
    """Strips of the images that differ most. What A makes of them waits on the disk for B's."""
    images = comparison.images
    shown = most_different([image.psnr_gain_db for image in images], [image.key for image in images])
    scorer_a, scorer_b = map(scorer_of, models)
    strips: dict[int, Strip] = {}
    on_drawing(0, len(shown))
    with scratch_folder() as scratch:
        for index, restored in restore_some(scorer_a, pairs, sorted(shown), num_workers=num_workers):
            (scratch / str(index)).write_bytes(encode_png(restored))
        for index, restored in restore_some(scorer_b, pairs, sorted(shown), num_workers=num_workers):
            image, pair = images[index], pairs[index]
            panels = {
                f"A  {image.psnr_a_db:.2f} dB": decode_png((scratch / str(index)).read_bytes()),
                f"B  {image.psnr_b_db:.2f} dB": restored,
                "sharp (truth)": pair.gt,
            }
            file = f"{PICTURES}/{shown.index(index) + 1:02}.jpg"
            drawn = draw_strip(folder / file, panels, lq=pair.lq, gt=pair.gt)
            strips[index] = Strip(file, f"{image.key}: B {image.psnr_gain_db:+.2f} dB over A", drawn)
            on_drawing(len(strips), len(shown))
    return [strips[index] for index in shown]


def _write(folder: Path, comparison: Comparison, strips: Sequence[Strip]) -> None:
    gains = [image.psnr_gain_db for image in comparison.images]
    drawn = histogram(gains, label="PSNR of B over A, dB")
    (folder / HISTOGRAM).write_bytes(drawn)
    document = comparison_document(comparison, gains_png=drawn, strips=strips)
    rows = [image.model_dump() for image in comparison.images]
    write_content(folder, COMPARISON.partition(".")[0], comparison, document, rows)
