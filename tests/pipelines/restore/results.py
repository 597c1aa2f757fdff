"""A model to restore with, and what was made of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nafnet_core import save_model
from pipelines.models import LoadedModel, open_model
from pipelines.restore import RECORD, RestoreResult
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, lively_network


def loaded_network(folder: Path, seed: int) -> LoadedModel:
    path = folder / f"model-{seed}.safetensors"
    save_model(lively_network(SMALL, seed=seed), path, metadata={"train_patch_px": 64})
    return open_model(str(path), Workspace.find(folder))


def statuses(result: RestoreResult) -> dict[str, str]:
    return {Path(file.input).name: file.status for file in result.files}


def record_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORD).read_text().splitlines()]


def files_of(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
