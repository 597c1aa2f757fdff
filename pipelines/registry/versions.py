"""Registered versions: which there are, what each is, and which one a word on the command line means."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nafnet_core import InputError
from nafnet_core.weights import save_model
from pipelines.export.published import exports_in
from pipelines.files import sha256
from pipelines.models import REGISTERED_NAME, LoadedModel, alias_version, is_unmade
from pipelines.registry.connection import asking
from pipelines.registry.history import Move
from pipelines.registry.moves import settle, version_exists
from pipelines.tracking import fluent
from pipelines.tracking.client import quick_requests
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
CARD = "card.json"
DIGEST_TAG = "nafnet.weights_digest"
_FIXES = {
    CANDIDATE: "`nafnet registry register MODEL` makes one",
    CHAMPION: "`nafnet registry promote --on STORE` makes the candidate champion",
}
_FOLDER = "artifacts"  # of what we give MLflow, below its own files


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered version."""

    version: int
    aliases: tuple[str, ...]
    created: str
    """UTC."""
    model: str
    psnr_db: float | None
    gain_db: float | None
    """Over the blurred input."""
    data: str | None
    """Path of the store that it was scored on, as a hint to people."""
    data_digest: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """All that there is of one version."""

    version: Version
    card: dict[str, Any]
    folder: Path
    """Its files; a copy of them where the registry is a server."""
    files: tuple[tuple[str, int], ...]
    """Names below `folder`, and bytes."""
    exports: dict[str, dict[str, Any]]
    """Kept for other runtimes beside it, by name; see `pipelines.export.published`."""
    moves: tuple[Move, ...]
    """Of the history, those that name it, newest first."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.version.to_dict(),
            "card": self.card,
            "folder": str(self.folder),
            "files": dict(self.files),
            "exports": self.exports,
            "moves": [move.to_dict() for move in self.moves],
        }


def versions(workspace: Workspace) -> list[Version]:
    """All registered versions, newest first.

    Raises:
        CapabilityError: the registry does not answer.
    """
    with asking(workspace) as client:
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
            data=row.tags.get("nafnet.data"),
            data_digest=row.tags.get("nafnet.data_digest"),
        )
        for row in found
    ]
    return sorted(rows, key=lambda row: row.version, reverse=True)


def version_of(loaded: LoadedModel, workspace: Workspace) -> Version | None:
    """The newest version of these weights and their metadata; None where they are not registered.

    Raises:
        CapabilityError: the registry does not answer.
    """
    if is_unmade(workspace):
        return None
    with tempfile.TemporaryDirectory() as folder:
        digest = sha256(written_weights(loaded, Path(folder)))
    with quick_requests(), asking(workspace) as client:
        found = client.search_model_versions(f"name = '{REGISTERED_NAME}'")
        numbers = [int(row.version) for row in found if row.tags.get(DIGEST_TAG) == digest]
        return next((each for each in versions(workspace) if each.version in numbers), None)


def written_weights(loaded: LoadedModel, folder: Path) -> Path:
    """The weights file of a version.

    Written anew: an official .pth becomes safetensors with its configuration.
    """
    path = folder / "model.safetensors"
    save_model(loaded.model, path, metadata=loaded.metadata)
    return path


def champion(workspace: Workspace) -> int | None:
    """Version of the champion, if there is one."""
    with asking(workspace) as client:
        return alias_version(client, CHAMPION)


def show(name: str, workspace: Workspace) -> Shown:
    """Card, scores, files and moves of a version.

    Args:
        name: its number, or an alias.
        workspace: its MLflow store is the registry.

    Raises:
        InputError: no such version or alias.
        CapabilityError: the registry does not answer.
    """
    import mlflow

    with asking(workspace) as client:
        moves = settle(client, workspace)
        number = find_version(client, name)
        tags = client.get_model_version(REGISTERED_NAME, str(number)).tags
        with fluent(client):
            uri = f"models:/{REGISTERED_NAME}/{number}"
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    card = folder / _FOLDER / CARD
    return Shown(
        version=next(version for version in versions(workspace) if version.version == number),
        card=json.loads(card.read_text()) if card.is_file() else {},
        folder=folder,
        files=tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in files),
        exports=exports_in(tags),
        moves=tuple(move for move in moves if number in (move.before, move.to)),
    )


def find_version(client: MlflowClient, name: str) -> int:
    """Number of the version that a number or an alias means.

    Raises:
        InputError: there is no such version or alias.
    """
    fix = _FIXES.get(name, "`nafnet registry list` shows what is registered")
    found = int(name) if name.isdigit() else alias_version(client, name)
    if found is None or not version_exists(client, found):
        what = "there is no such version" if name.isdigit() else "there is no such alias"
        raise InputError(f"there is no {name} yet" if name in _FIXES else what, got=name, fix=fix)
    return found


def spec_of(name: str) -> str:
    """What `open_model` takes, of a word that may be a version's number or alias; else the word itself."""
    if Path(name).exists():
        return name
    if name.isdigit():
        return f"models:/{REGISTERED_NAME}/{name}"
    return f"models:/{REGISTERED_NAME}@{name}" if name in (CANDIDATE, CHAMPION) else name


def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
