"""The report of a model on a store: the one with its version, one in the workspace, or a new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines import evaluate
from pipelines.evaluate import Pairs, Report
from pipelines.evaluate.report import PICTURE, REPORT
from pipelines.models import LoadedModel
from pipelines.workspace import Workspace

Progress = Callable[[int, int], None]


def report_of(loaded: LoadedModel, pairs: Pairs, workspace: Workspace, on_progress: Progress) -> Report:
    """Scores of exactly these weights on exactly this data by today's protocol; made where there are none.

    A version's own report spares another machine, whose workspace has none, the evaluation.
    """
    found = known_report(loaded, pairs, workspace)
    return found or evaluate.run(loaded, pairs, workspace, on_progress=on_progress).report


def known_report(loaded: LoadedModel, pairs: Pairs, workspace: Workspace) -> Report | None:
    """As `report_of`, but None where there is none; folders are not known before they are read."""
    if pairs.digest is None:
        return None
    own = loaded.weights.with_name(REPORT)
    found = evaluate.read_report(own, loaded, pairs.digest) if own.is_file() else None
    return found or evaluate.find_report(workspace, loaded, pairs.digest)


def picture_of(loaded: LoadedModel, report: Report, workspace: Workspace) -> Path | None:
    """The picture that `evaluate` drew beside this report, if it still lies there."""
    path = evaluate.report_path(workspace, loaded, report.data_digest).with_name(PICTURE)
    return path if path.is_file() else None
