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
from pipelines.models import LoadedModel, is_exported, open_model
from pipelines.workspace import Workspace


def open_runnable(
    spec: str | None,
    workspace: Workspace,
    *,
    backend: str | None = None,
    precision: str = "auto",
    train_patch_px: int | None = None,
    num_threads: int | None = None,
    fetched_to: Path | None = None,
) -> LoadedModel:
    """Load what restores images: an exported file, or whatever `open_model` takes, in a back end.

    Args:
        spec, workspace, train_patch_px, fetched_to: as of `open_model`.
        backend: as of `choosing.choose`; None: torch, or an exported file's own.
        precision: of an export; `auto`: any.
        num_threads: of an export's runtime; None: as many as torch has.

    Raises:
        InputError: as `open_model`, `open_exported` and `choose`; or another back end, precision or training
            patch than an exported file has.
        CapabilityError: as `choose`.
    """
    if spec is None or not is_exported(spec):
        from pipelines.export.choosing import choose  # which needs this module

        loaded = open_model(spec, workspace, train_patch_px=train_patch_px, fetched_to=fetched_to)
        return choose(
            loaded, workspace, backend=backend or "torch", precision=precision, num_threads=num_threads
        )
    if train_patch_px is not None:
        raise InputError(
            "local statistics of an exported model are fixed", file=spec,
            got=f"--train-patch {train_patch_px}",
            fix="Drop it, or export the weights anew",
        )  # fmt: skip
    runtime = format_of(Path(spec)).runtime
    if backend not in (None, "auto", runtime):
        raise InputError(
            "an exported file has a back end of its own", file=spec, expected=f"--backend {runtime}",
            got=backend, fix="Drop it, or name the weights",
        )  # fmt: skip
    opened = open_exported(Path(spec), num_threads=num_threads)
    if precision not in ("auto", opened.fixed_precision):
        raise InputError(
            "the precision of an exported model is fixed", file=spec, expected=opened.fixed_precision,
            got=precision,
        )  # fmt: skip
    return opened


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
