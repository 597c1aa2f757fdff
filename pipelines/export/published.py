"""Exports beside the registered version that they came from: artifacts of its MLflow run, and a tag.

    nafnet.export.onnxruntime-fp32-patch64 = {"artifacts": "exports/…", "digest": …, "loss_db": …, …}

The tag is set when the files are there, which have a folder of their own for each digest: whoever sees the
tag finds them whole. It is a version's and not a model's, so promotion and rollback take it along.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nafnet_core import CapabilityError, InputError, NAFNetError
from pipelines.export.formats import FORMATS
from pipelines.export.kept import NOTE, Kept, place_of, read_kept
from pipelines.files import make_folder, replaced_folder
from pipelines.tracking import mlflow_client
from pipelines.tracking.client import reason
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "nafnet.export."
_TOLD = ("artifacts", "digest", "network", "format", "precision", "difference", "loss_db")


def publish(kept: Kept, version: str, workspace: Workspace) -> None:
    """Put a kept export beside a registered version.

    Args:
        kept: in the workspace, where it stays.
        version: `models:/NAME/VERSION`.
        workspace: its MLflow store is the registry.

    Raises:
        CapabilityError: the registry does not answer, or the version has no run to keep files in.
    """
    name, number = _split(version)
    with _asking(workspace) as client:
        run_id = client.get_model_version(name, number).run_id
        if not run_id:
            raise CapabilityError(
                "this version has no MLflow run, beside whose files an export could lie; it is kept in the "
                "workspace alone", file=version,
            )  # fmt: skip
        place = f"exports/{kept.network[:16]}/{kept.folder.name}/{kept.digest[:16]}"
        client.log_artifacts(run_id, str(kept.folder), place)
        told = {
            "artifacts": place,
            "digest": kept.digest,
            "network": kept.network,
            "format": kept.format,
            "precision": kept.precision,
            "difference": kept.difference,
            "loss_db": kept.loss_db,
        }
        client.set_model_version_tag(name, number, f"{TAG}{kept.folder.name}", json.dumps(told))


def exports_in(tags: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a version's tags tell of its exports, by name; what is not ours is passed over."""
    found = {}
    for key, value in tags.items():
        if key.startswith(TAG) and "/" not in key:
            try:
                told = json.loads(value)
                found[key.removeprefix(TAG)] = {name: told[name] for name in _TOLD}
            except (ValueError, TypeError, KeyError):  # of a later version, or set by hand
                continue
    return found


def fetch(version: str, network: str, pattern: str, workspace: Workspace) -> None:
    """Bring into the workspace what lies beside a version and is not there yet.

    Args:
        version: `models:/NAME/VERSION`.
        network: digest of the network that was loaded, which exports must be of.
        pattern: which names, as of `kept.name_of`.
        workspace: its MLflow store is the registry.

    Raises:
        CapabilityError: the registry does not answer.
        InputError: what lies there is damaged, or the workspace cannot be written.
    """
    name, number = _split(version)
    with _asking(workspace) as client:
        found = client.get_model_version(name, number)
        for kind, told in exports_in(found.tags).items():
            place = place_of(network, kind, workspace)
            is_wanted = told["network"] == network and fnmatchcase(kind, pattern)
            can_run = told["format"] in FORMATS and FORMATS[told["format"]].can_run
            if is_wanted and can_run and not _is_whole(place):
                _fetch(client, str(found.run_id), told, place)


def _fetch(client: MlflowClient, run_id: str, told: Mapping[str, Any], place: Path) -> None:
    make_folder(place.parent)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetched-") as scratch:
        # Under its own names, which say what it is, before it takes the place that the name stands for.
        aside = Path(scratch) / place.parent.name / place.name
        aside.parent.mkdir()
        shutil.move(client.download_artifacts(run_id, told["artifacts"], scratch), aside)
        kept = read_kept(aside)
        if kept.digest != told["digest"]:
            raise InputError(
                "an export beside a version is another than its tag says", file=told["artifacts"]
            )
        with replaced_folder(place) as new:
            for file in (*kept.files, NOTE):
                shutil.copyfile(aside / file, new / file)


def _is_whole(place: Path) -> bool:
    try:
        read_kept(place)
    except InputError:
        return False
    return True


def _split(version: str) -> tuple[str, str]:
    name, _, number = version.removeprefix("models:/").rpartition("/")
    return name, number


@contextmanager
def _asking(workspace: Workspace) -> Iterator[MlflowClient]:
    client = mlflow_client(workspace)
    try:
        yield client
    except NAFNetError:
        raise
    except Exception as error:  # MLflow's, or those of whatever store keeps its artifacts
        uri = str(client.tracking_uri)
        raise CapabilityError(
            "the registry does not give or take an export", file=public(uri), got=reason(error, uri)
        ) from error
