"""Registering: a model's files into MLflow, as a new version that is the candidate."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.evaluate import Pairs, Report
from pipelines.evaluate.report import PICTURE, REPORT
from pipelines.files import sha256, write_json
from pipelines.models import REGISTERED_NAME, LoadedModel, open_model
from pipelines.registry.card import as_markdown, environment, make_card, summary
from pipelines.registry.connection import asking, retried
from pipelines.registry.moves import make_registered_model
from pipelines.registry.reports import Progress, picture_of, report_of
from pipelines.registry.versions import CANDIDATE, CARD, DIGEST_TAG, Version, versions, written_weights
from pipelines.tracking import TRACKING, fluent, make_experiment
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REGISTRATIONS = f"{REGISTERED_NAME}-registrations"
_PACKAGE = Path(__file__).resolve().parent.parent
_PYFUNC = _PACKAGE / "pyfunc.py"
_CORE = _PACKAGE.parent / "nafnet_core"
_DESCRIPTION = "NAFNet models that deblur photos. Aliases: candidate and champion."


def register(
    spec: str,
    workspace: Workspace,
    *,
    on: Path | str | None = None,
    train_patch_px: int | None = None,
    on_progress: Progress = lambda done, total: None,
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
    with asking(workspace) as client:
        loaded = open_model(spec, workspace, train_patch_px=train_patch_px)
        report = None if on is None else report_of(loaded, Pairs(on), workspace, on_progress)
        with tempfile.TemporaryDirectory() as folder:
            files, card = _write_files(loaded, report, workspace, Path(folder))
            run_id = _run_of(client, spec, workspace)
            uri, model_id = _log_model(client, files, run_id)
        make_registered_model(client, REGISTERED_NAME, _DESCRIPTION)
        tags = {
            "nafnet.model": loaded.label,
            DIGEST_TAG: card["weights_digest"],
            **({} if report is None else _report_tags(report)),
        }
        with fluent(client):  # which the look-up of the version's source goes by
            made = retried(
                lambda: client.create_model_version(
                    REGISTERED_NAME,
                    source=uri,
                    run_id=run_id,
                    tags=tags,
                    description=summary(card),
                    model_id=model_id,
                )
            )
        retried(lambda: client.set_registered_model_alias(REGISTERED_NAME, CANDIDATE, made.version))
    return next(version for version in versions(workspace) if version.version == int(made.version))


def _write_files(
    loaded: LoadedModel, report: Report | None, workspace: Workspace, folder: Path
) -> tuple[dict[str, Path], dict]:
    """What lies in the version, and its card; nothing of it is pickled."""
    weights = written_weights(loaded, folder)
    # So the report, which is of these very tensors, is of this file.
    report = report and report.model_copy(update={"weights_digest": sha256(weights)})
    card = make_card(loaded, sha256(weights), report)
    files = {"weights": weights, "card": folder / CARD, "config": folder / "config.json"}
    write_json(files["card"], card)
    write_json(files["config"], {"network": card["config"], "training": card["training"]})
    files["model_card"] = folder / "MODEL_CARD.md"
    files["model_card"].write_text(as_markdown(card))
    if report is not None:
        files["report"] = folder / REPORT
        write_json(files["report"], report.model_dump())
        picture = picture_of(loaded, report, workspace)
        if picture is not None:
            files["picture"] = folder / PICTURE
            shutil.copyfile(picture, files["picture"])
    return files, card


def _log_model(client: MlflowClient, files: dict[str, Path], run_id: str) -> tuple[str, str]:
    """Write the version's files into MLflow; returns their URI and MLflow's name for them."""
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    image = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, 3))])
    with warnings.catch_warnings(record=True), fluent(client), mlflow.start_run(run_id=run_id):
        # It asks for type hints and an example, from which it would guess the signature that it is given.
        # Recorded, to be dropped, since for some it puts filters of its own before ours.
        warnings.simplefilter("ignore")
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(_PYFUNC),
            artifacts={name: str(path) for name, path in files.items()},
            code_paths=[str(_CORE)],
            signature=ModelSignature(inputs=image, outputs=image),
            pip_requirements=environment(),
        )
    return info.model_uri, info.model_id


def _run_of(client: MlflowClient, spec: str, workspace: Workspace) -> str:
    """The training run that the model came from, else a new run for this registration."""
    for folder in (Path(spec), workspace.run_dir(spec)):
        state = folder / TRACKING
        if state.is_file():
            return json.loads(state.read_text())["run_id"]
    experiment = make_experiment(client, _REGISTRATIONS, workspace)
    return client.create_run(experiment, run_name=Path(spec).name).info.run_id


def _report_tags(report: Report) -> dict[str, str]:
    return {
        "nafnet.psnr_db": f"{report.psnr_restored_db:.4f}",
        "nafnet.gain_db": f"{report.gain_db:.4f}",
        "nafnet.data_digest": report.data_digest,
        "nafnet.data": report.data,
    }
