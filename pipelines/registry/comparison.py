"""Two models side by side on one store: scores, time, and image by image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nafnet_core import InputError
from pipelines.evaluate import Pairs, Report, comparable
from pipelines.evaluate.report import REPORT, SCHEMA_VERSION
from pipelines.gate import image_gains, latency_ratio
from pipelines.models import open_model
from pipelines.registry.reports import Progress, report_of
from pipelines.registry.versions import spec_of
from pipelines.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """B against A on the same data by the same protocol."""

    first: Report
    second: Report
    gains_db: dict[str, float]
    """Image → PSNR of B over that of A, the worst first."""
    latency_ratio: float | None
    """B's time over A's, the two taking turns on this machine; None where only reports were compared."""

    @property
    def gain_db(self) -> float:
        return self.second.psnr_restored_db - self.first.psnr_restored_db

    def count(self, *, better_by_db: float = 0.0, worse_by_db: float | None = None) -> int:
        """Images that are better by more than this, or, where that is given, worse by more than that."""
        if worse_by_db is not None:
            return sum(gain < -worse_by_db for gain in self.gains_db.values())
        return sum(gain > better_by_db for gain in self.gains_db.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": self.first.model_dump(),
            "second": self.second.model_dump(),
            "gain_db": self.gain_db,
            "gains_db": self.gains_db,
            "latency_ratio": self.latency_ratio,
        }


def compare(
    first: str,
    second: str,
    workspace: Workspace,
    *,
    on: Path | str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Comparison:
    """Compare two models, B against A.

    Args:
        first, second: what `open_model` takes, or the number or alias of a version.
        workspace: its MLflow store is the registry.
        on: store or folder of pairs to score them on, where a report is not there already; None compares the
            reports that lie with the two versions, as they are.
        on_progress: images scored.

    Raises:
        InputError: no such model or store; the two reports are of different data or protocols, and which
            difference that is.
        CapabilityError: the registry does not answer.
    """
    models = [open_model(spec_of(name), workspace) for name in (first, second)]
    if on is None:
        reports = [
            _own_report(model.weights, name) for model, name in zip(models, (first, second), strict=True)
        ]
        comparable(*reports)
        ratio = None
    else:
        pairs = Pairs(on)
        reports = [report_of(model, pairs, workspace, on_progress) for model in models]
        comparable(*reports)
        ratio = latency_ratio(models[1], models[0], pairs, limit=1.0)
    gains = image_gains(reports[1], reports[0])
    return Comparison(
        first=reports[0],
        second=reports[1],
        gains_db=dict(sorted(gains.items(), key=lambda item: item[1])),
        latency_ratio=ratio,
    )


def _own_report(weights: Path, name: str) -> Report:
    path = weights.with_name(REPORT)
    if not path.is_file():
        raise InputError("no report lies with this model", got=name, fix="Name a store to score both on")
    content = json.loads(path.read_text())
    if content.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            "the report of this model is of another version",
            got=f"{name}, version {content.get('schema_version')}",
            expected=f"version {SCHEMA_VERSION}",
            fix="Name a store to score both on",
        )
    return Report.model_validate(content)
