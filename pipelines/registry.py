"""The model registry: versions, the aliases `candidate` and `champion`, and the gate between them.

    nafnet registry register runs/mine --on stores/test
    nafnet registry promote --on stores/test
    nafnet registry list

The `champion` alias is the only point of commitment. Each move is an MLflow run of its own in the experiment
`nafnet-deblur-history`, opened before the alias moves and closed after.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nafnet_core.weights import save_model
from pipelines import evaluate
from pipelines.evaluate import Pairs, Report
from pipelines.files import write_json
from pipelines.gate import Check, GateSettings, PromotionRefusedError, failed, judge, latency_ratio
from pipelines.models import CHAMPION, REGISTERED_NAME, LoadedModel, alias_version, open_model
from pipelines.tracking import TRACKING, fluent, make_experiment, mlflow_client
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_HISTORY = f"{REGISTERED_NAME}-history"
_REGISTRATIONS = f"{REGISTERED_NAME}-registrations"
_PYFUNC = Path(__file__).with_name("pyfunc.py")
_CORE = Path(__file__).resolve().parent.parent / "nafnet_core"
_REQUIREMENTS = ["mlflow", "torch", "numpy", "opencv-python-headless", "safetensors"]


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered version."""

    version: int
    aliases: tuple[str, ...]
    created: str
    model: str
    psnr_db: float | None
    gain_db: float | None
    data_digest: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A move of the champion alias."""

    version: int
    before: int | None
    """The champion until now; the same as `version` where there was nothing to do."""
    checks: tuple[Check, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "checks": [check.to_dict() for check in self.checks]}


def register(
    spec: str,
    workspace: Workspace,
    *,
    on: Path | str | None = None,
    train_patch_px: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Version:
    """Store a model as a new version and point `candidate` at it.

    Args:
        spec: what `open_model` takes.
        workspace: its MLflow store is the registry.
        on: a store to score it on; the report goes into the version.
        train_patch_px: as for `open_model`; goes into the version.
        on_progress: images scored.

    Raises:
        InputError: no such model or store.
        CapabilityError: the registry does not answer.
    """
    workspace.make()
    client = mlflow_client(workspace)
    loaded = open_model(spec, workspace, train_patch_px=train_patch_px)
    pairs = None if on is None else Pairs(on)
    report = None if pairs is None else _report(loaded, pairs, workspace, on_progress)
    uri, run_id = _log_version(client, loaded, report, spec, workspace)
    _make_registered_model(client)
    tags = {
        "nafnet.model": loaded.label,
        "nafnet.weights_digest": loaded.digest,
        **({} if report is None else _report_tags(report)),
    }
    with fluent(client):  # which the look-up of the version's source goes by
        made = client.create_model_version(REGISTERED_NAME, source=uri, run_id=run_id, tags=tags)
    client.set_registered_model_alias(REGISTERED_NAME, "candidate", made.version)
    return next(version for version in versions(workspace) if version.version == int(made.version))


def promote(
    workspace: Workspace,
    *,
    version: int | None = None,
    on: Path | str,
    settings: GateSettings,
    reason: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Promotion:
    """Make a version the champion if it passes the gate.

    Args:
        workspace: its MLflow store is the registry.
        version: which; None takes the `candidate`.
        on: store that both models are scored on, where a report is not there already.
        settings: the gate.
        reason: for the history.
        on_progress: images scored.

    Raises:
        PromotionRefusedError: by the gate; the failed checks are named.
        InputError: no such version or store.
    """
    client = mlflow_client(workspace)
    spec = f"models:/{REGISTERED_NAME}" + ("@candidate" if version is None else f"/{version}")
    candidate = open_model(spec, workspace)
    number = version or alias_version(client, "candidate")
    before = alias_version(client, "champion")
    assert number is not None, "open_model has found it"
    if number == before:
        return Promotion(version=number, before=before, checks=())
    pairs = Pairs(on)
    report = _report(candidate, pairs, workspace, on_progress)
    champion = None if before is None else open_model(CHAMPION, workspace)
    champion_report = None if champion is None else _report(champion, pairs, workspace, on_progress)
    ratio = (
        None if champion is None else latency_ratio(candidate, champion, pairs, settings.max_latency_ratio)
    )
    checks = judge(report, champion_report, settings, latency_ratio=ratio)
    is_refused = bool(failed(checks))
    record = {
        "action": "refuse" if is_refused else "promote",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "user": _user(),
        "from": before,
        "to": number,
        "reason": reason,
        "gate": {**asdict(settings), "checks": [check.to_dict() for check in checks]},
        "candidate": report.model_dump(exclude={"images"}),
        "champion": champion_report and champion_report.model_dump(exclude={"images"}),
    }
    run_id = _open_record(client, workspace, record)
    if is_refused:
        client.set_terminated(run_id, status="FAILED")
        raise PromotionRefusedError(number, before, checks)
    client.set_registered_model_alias(REGISTERED_NAME, "champion", str(number))
    client.set_terminated(run_id, status="FINISHED")
    return Promotion(version=number, before=before, checks=tuple(checks))


def versions(workspace: Workspace) -> list[Version]:
    """All registered versions, newest first."""
    client = mlflow_client(workspace)
    aliases: dict[str, list[str]] = {}
    for registered in client.search_registered_models(f"name = '{REGISTERED_NAME}'"):
        for alias, version in registered.aliases.items():
            aliases.setdefault(str(version), []).append(alias)
    found = client.search_model_versions(f"name = '{REGISTERED_NAME}'")
    rows = [
        Version(
            version=int(row.version),
            aliases=tuple(sorted(aliases.get(str(row.version), []))),
            created=_iso(row.creation_timestamp),
            model=row.tags.get("nafnet.model", ""),
            psnr_db=_number(row.tags.get("nafnet.psnr_db")),
            gain_db=_number(row.tags.get("nafnet.gain_db")),
            data_digest=row.tags.get("nafnet.data_digest"),
        )
        for row in found
    ]
    return sorted(rows, key=lambda row: row.version, reverse=True)


def champion(workspace: Workspace) -> int | None:
    """Version of the champion, if there is one."""
    return alias_version(mlflow_client(workspace), "champion")


def _report(
    loaded: LoadedModel, pairs: Pairs, workspace: Workspace, on_progress: Callable[[int, int], None]
) -> Report:
    known = None if pairs.digest is None else evaluate.find_report(workspace, loaded, pairs.digest)
    return known or evaluate.run(loaded, pairs, workspace, on_progress=on_progress).report


def _log_version(
    client: MlflowClient, loaded: LoadedModel, report: Report | None, spec: str, workspace: Workspace
) -> tuple[str, str]:
    """Write the version's files into MLflow; returns their URI and the run that they belong to."""
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    image = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, 3))])
    with tempfile.TemporaryDirectory() as folder:
        weights, card = Path(folder) / "model.safetensors", Path(folder) / "card.json"
        # Written anew: an official .pth becomes safetensors with its configuration.
        save_model(loaded.model, weights, metadata=loaded.metadata)
        write_json(card, _card(loaded, report))
        run_id = _run_of(client, spec, workspace)
        with warnings.catch_warnings(record=True), fluent(client), mlflow.start_run(run_id=run_id):
            # Recorded, to be dropped: MLflow asks for type hints and an example, from which it would guess
            # the signature that it is given here.
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(_PYFUNC),
                artifacts={"weights": str(weights), "card": str(card)},
                code_paths=[str(_CORE)],
                signature=ModelSignature(inputs=image, outputs=image),
                pip_requirements=_REQUIREMENTS,
            )
            if report is not None:
                mlflow.log_dict(report.model_dump(), "report.json")
    return info.model_uri, run_id


def _run_of(client: MlflowClient, spec: str, workspace: Workspace) -> str:
    """The training run that the model came from, else a new run for this registration."""
    for folder in (Path(spec), workspace.run_dir(spec)):
        state = folder / TRACKING
        if state.is_file():
            return json.loads(state.read_text())["run_id"]
    experiment = make_experiment(client, _REGISTRATIONS, workspace)
    return client.create_run(experiment, run_name=Path(spec).name).info.run_id


def _card(loaded: LoadedModel, report: Report | None) -> dict[str, Any]:
    return {
        "model": loaded.label,
        "weights_digest": loaded.digest,
        "num_parameters": loaded.model.num_parameters,
        "macs_256_px": loaded.model.num_macs(256, 256),
        "config": loaded.model.config.to_dict(),
        "training": loaded.metadata,
        "report": None if report is None else report.model_dump(exclude={"images"}),
    }


def _report_tags(report: Report) -> dict[str, str]:
    return {
        "nafnet.psnr_db": f"{report.psnr_restored_db:.4f}",
        "nafnet.gain_db": f"{report.gain_db:.4f}",
        "nafnet.data_digest": report.data_digest,
        "nafnet.data": report.data,
    }


def _make_registered_model(client: MlflowClient) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(REGISTERED_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _open_record(client: MlflowClient, workspace: Workspace, record: dict[str, Any]) -> str:
    experiment = make_experiment(client, _HISTORY, workspace)
    tags = {f"nafnet.{key}": str(record[key]) for key in ("action", "time", "user", "from", "to", "reason")}
    name = f"{record['action']} {record['from']} → {record['to']}"
    run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    client.log_dict(run_id, record, "record.json")
    return run_id


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
