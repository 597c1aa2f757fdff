"""An exported model, opened in its runtime, in the place of one in torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from nafnet_core import InputError, NAFNetConfig
from nafnet_core.foreign import ForeignNetwork
from pipelines.export.formats import SCHEMA_VERSION, format_of
from pipelines.files import sha256
from pipelines.models import EXPORTED_SUFFIXES, LoadedModel, open_model
from pipelines.workspace import Workspace


def open_runnable(
    spec: str | None,
    workspace: Workspace,
    *,
    train_patch_px: int | None = None,
    num_threads: int | None = None,
) -> LoadedModel:
    """Load what restores images: an exported file, or whatever `open_model` takes.

    Args:
        spec, workspace, train_patch_px: as of `open_model`.
        num_threads: of an exported file's runtime; None: as many as torch has.

    Raises:
        InputError: as `open_model` and `open_exported`; or another training patch for an exported file, whose
            local statistics are fixed.
    """
    if spec is None or Path(spec).suffix not in EXPORTED_SUFFIXES:
        return open_model(spec, workspace, train_patch_px=train_patch_px)
    if train_patch_px is not None:
        raise InputError(
            "local statistics of an exported model are fixed", file=spec,
            got=f"--train-patch {train_patch_px}",
            fix="Drop it, or export the weights anew",
        )  # fmt: skip
    return open_exported(Path(spec), num_threads=num_threads)


def open_exported(path: Path, *, num_threads: int | None = None) -> LoadedModel:
    """Load a file of `nafnet export` into its runtime.

    Args:
        path: `.onnx` or `.xml`.
        num_threads: of the runtime; None: as many as torch has.

    Returns:
        With a `ForeignNetwork` as its `model`; `metadata["export"]` says how it was made, and the figures of
        the gate.

    Raises:
        InputError: it is missing, damaged, not ours, or made for images in bytes.
        CapabilityError: its runtime is not installed.
    """
    form = format_of(path)
    metadata = read_metadata(path)
    made = metadata["export"]
    if made["takes_bytes"]:
        raise InputError(
            "this file takes images in bytes, for other programs", file=path,
            fix="Export one without --bytes",
        )  # fmt: skip
    threads = num_threads or torch.get_num_threads()
    runner = form.module.open(path, made["precision"], num_threads=threads)
    digest = hashlib.sha256("".join(sha256(file) for file in form.files(path)).encode()).hexdigest()
    return LoadedModel(
        model=ForeignNetwork(NAFNetConfig(**metadata["config"]), runner),
        label=f"{path.name} in {form.runtime}, {made['precision']}",
        weights=path,
        digest=digest,
        metadata=metadata,
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """What an exported file says of itself: as of its weights, `config`, and `export`, how it was made.

    Raises:
        InputError: the file is missing, damaged, incomplete, another program's, or of another version.
        CapabilityError: its runtime is not installed.
    """
    form = format_of(path)
    missing = [file for file in form.files(path) if not file.is_file()]
    if missing:
        raise InputError("no such model" if missing[0] == path else "a part is missing", file=missing[0])
    form.check(form.to_run, f"{path.name}, a model for {form.runtime},")
    try:
        metadata = form.module.read_metadata(path)
        made = metadata["export"]
        if made["schema_version"] != SCHEMA_VERSION or made["runtime"] != form.runtime:
            raise ValueError(f"version {made['schema_version']}, for {made['runtime']}")
        if made["precision"] not in form.precisions or not isinstance(made["takes_bytes"], bool):
            raise ValueError(f"precision {made['precision']}")
        NAFNetConfig(**metadata["config"])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(
            "not exported by this version of `nafnet export`", file=path, got=error,
            expected=f"its metadata, version {SCHEMA_VERSION}", fix="Export the weights anew",
        ) from error  # fmt: skip
    return metadata
