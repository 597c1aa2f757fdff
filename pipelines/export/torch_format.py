"""A `torch.export` program: the graph and its weights, without our code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nafnet_core.exportable import Exportable
from nafnet_core.weights import METADATA_KEY
from pipelines.export.formats import Precision, Runner, as_runner

_EXTRA = f"{METADATA_KEY}.json"


def build(form: Exportable, precision: Precision) -> torch.export.ExportedProgram:
    """A program with dynamic batch, height and width."""
    example, free = form.example()
    sizes = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    return torch.export.export(form, (example,), dynamic_shapes=(sizes,))


def save(built: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    # By a handle, since the name must end in .pt2 else, and ours is one aside.
    with path.open("wb") as file:
        torch.export.save(built, file, extra_files={_EXTRA: json.dumps(metadata, sort_keys=True)})


def open(path: Path, precision: Precision, *, num_threads: int) -> Runner:
    """`num_threads` is torch's own, for the whole process."""
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def run(images: Any) -> Any:
        return module(torch.from_numpy(images)).numpy()

    return as_runner(run)
