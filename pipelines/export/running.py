"""An exported model, opened in its runtime, in the place of one in torch."""

from __future__ import annotations

from pathlib import Path

import torch

from nafnet_core import InputError, NAFNetConfig
from nafnet_core.foreign import ForeignNetwork
from pipelines.export.formats import format_of
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
    if not path.is_file():
        raise InputError("no such model", file=path)
    form = format_of(path)
    form.check(form.to_run, f"{path.name}, a model for {form.runtime},")
    metadata = form.writer.read_metadata(path)
    made = metadata.get("export")
    if made is None:
        raise InputError(
            "not exported by `nafnet export`", file=path, expected="its metadata inside",
            fix="Export the weights anew",
        )  # fmt: skip
    if made["takes_bytes"]:
        raise InputError(
            "this file takes images in bytes, for other programs", file=path,
            fix="Export one without --bytes",
        )  # fmt: skip
    threads = num_threads or torch.get_num_threads()
    runner = form.writer.open(path, made["precision"], num_threads=threads)
    return LoadedModel(
        model=ForeignNetwork(NAFNetConfig(**metadata["config"]), runner),
        label=f"{path.name} in {form.runtime}, {made['precision']}",
        weights=path,
        digest=sha256(path),
        metadata=metadata,
    )
