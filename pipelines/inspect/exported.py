"""An exported model: how it was made, and what the gate found."""

from __future__ import annotations

from pathlib import Path

from pipelines.export.formats import format_of
from pipelines.export.running import read_metadata
from pipelines.files import sha256
from pipelines.inspect.result import InspectConfig, InspectResult, Show


def inspect_exported(config: InspectConfig, show: Show) -> InspectResult:
    """Read what a file of `nafnet export` says of itself.

    Raises:
        InputError: it is damaged, or not one.
        CapabilityError: its runtime is not installed.
    """
    path = Path(config.what)
    metadata = read_metadata(path)
    made = metadata["export"]
    files = format_of(path).files(path)
    return InspectResult(
        kind="model",
        name=path.name,
        facts={
            "file": str(path),
            "bytes": sum(file.stat().st_size for file in files),
            "sha256": {file.name: sha256(file) for file in files},
            **metadata["config"],
            "train_patch_px": metadata.get("train_patch_px"),
            **{key: value for key, value in made.items() if key != "parity"},
            **made["parity"],
        },
    )
