"""Exports that are kept in the workspace, found again by the network, whatever the model is called.

    WORKSPACE/exports/NETWORK/onnxruntime-fp32-patch64/
        model.onnx
        kept.json        files with their SHA-256, and what the gate found

NETWORK is the SHA-256 of the tensors, not of a file: a run and its registered version are one network.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from nafnet_core import InputError
from nafnet_core.foreign import ForeignNetwork
from nafnet_core.model import NAFNet
from pipelines.export.driver import ExportConfig, ExportResult, precision_of, run
from pipelines.export.formats import FORMATS, Format, FormatName, Precision
from pipelines.export.parity import TOLERANCES
from pipelines.export.running import open_exported
from pipelines.files import make_folder, replaced_folder, sha256, write_json
from pipelines.models import LoadedModel
from pipelines.workspace import Workspace

NOTE = "kept.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One export of one network."""

    folder: Path
    network: str
    """SHA-256 of the network's tensors."""
    format: FormatName
    precision: Precision
    train_patch_px: int | None
    """Of its local statistics; None: global ones."""
    difference: float
    """From torch in fp32, as the gate found it; 1 is the range."""
    loss_db: float
    """PSNR that it loses against torch."""
    files: dict[str, str]
    """SHA-256 by name."""

    @property
    def form(self) -> Format:
        return FORMATS[self.format]

    @property
    def runtime(self) -> str:
        """As `--backend` calls it."""
        assert self.form.runtime is not None, "nothing else is kept"
        return self.form.runtime

    @property
    def path(self) -> Path:
        """The file to load first."""
        return self.folder / f"model{self.form.suffix}"

    @property
    def digest(self) -> str:
        """SHA-256 over all files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Under which times of these very files are remembered."""
        return f"{self.folder.name} {self.digest[:12]}"

    def note(self) -> dict[str, Any]:
        """Content of `kept.json`."""
        content = asdict(self)
        del content["folder"]
        return {"schema_version": SCHEMA_VERSION, **content}

    def open(self, loaded: LoadedModel, *, num_threads: int) -> LoadedModel:
        """The export in its runtime, called after the model that it was made of, which mends broken tiles.

        Raises:
            InputError: its runtime does not take it.
            CapabilityError: its runtime is not installed.
        """
        opened = open_exported(self.path, num_threads=num_threads)
        network = loaded.model
        assert isinstance(opened.model, ForeignNetwork) and isinstance(network, NAFNet)
        opened.model.in_torch = lambda: network
        # Of these weights: the export may have been made of another file with the same tensors.
        made = {**opened.metadata["export"], "weights_sha256": loaded.digest}
        return replace(
            opened,
            label=f"{loaded.label}, in {self.runtime}, {self.precision}",
            version=loaded.version,
            metadata={**opened.metadata, "export": made},
        )


def network_digest(loaded: LoadedModel) -> str:
    """SHA-256 over names, shapes and values of all tensors, which say the configuration too."""
    assert isinstance(loaded.model, NAFNet), "an exported model has no tensors to look at"
    tensors = {name: tensor.contiguous() for name, tensor in loaded.model.state_dict().items()}
    return hashlib.sha256(save(tensors)).hexdigest()


def name_of(runtime: str, precision: str, train_patch_px: int | None) -> str:
    """Name of an export's folder; with `*` for what may be any, a pattern of such names."""
    statistics = "global" if train_patch_px is None else f"patch{train_patch_px}"
    return f"{runtime}-{precision}-{statistics}"


def place_of(network: str, name: str, workspace: Workspace) -> Path:
    """Where an export is kept."""
    return workspace.exports / network / name


def check_kept(config: ExportConfig) -> None:
    """Raise `InputError` where a format is none that a command of ours runs."""
    if config.format.runtime is None:
        ran = ", ".join(each.name for each in FORMATS.values() if each.runtime)
        raise InputError("no command runs this format, so none would find it", expected=ran, got=config.to)


def keep(config: ExportConfig, loaded: LoadedModel, workspace: Workspace) -> ExportResult:
    """Export a model, and keep that: in the workspace, and beside the registered version if it is one.

    It takes the place of one of the same runtime, precision and local statistics.

    Args:
        config: what to write; its `out` says the suffix only.
        loaded: the model, in torch.
        workspace: where it is kept, and whose MLflow store is the registry.

    Raises:
        InputError, GateError, CapabilityError: as `pipelines.export.run` and `check_kept`; or the registry
            does not take it, which is then in the workspace all the same.
    """
    check_kept(config)
    form, precision = config.format, precision_of(config, loaded)
    network = network_digest(loaded)
    place = place_of(network, name_of(str(form.runtime), precision, loaded.train_patch_px), workspace)
    make_folder(place.parent)
    with replaced_folder(place) as aside:
        result = run(replace(config, out=aside / f"model{form.suffix}"), loaded)
        kept = Kept(
            folder=place,
            network=network,
            format=form.name,
            precision=precision,
            train_patch_px=loaded.train_patch_px,
            difference=result.parity.difference,
            loss_db=result.parity.loss_db,
            files={file.name: sha256(file) for file in result.files},
        )
        write_json(aside / NOTE, kept.note())
    if loaded.version is not None:
        from pipelines.export.published import publish  # which needs this module

        publish(kept, loaded.version, workspace)
    return replace(result, files=tuple(place / file.name for file in result.files))


def read_kept(folder: Path) -> Kept:
    """Read what is kept, and compare its files' digests.

    Raises:
        InputError: it is damaged, of another version of this package, or was outside of what the gate allows.
    """
    try:
        note = json.loads((folder / NOTE).read_bytes())
        if note.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("another version's")
        kept = Kept(folder=folder, **note)
        name = name_of(kept.runtime, kept.precision, kept.train_patch_px)
        if (kept.network, name) != (folder.parent.name, folder.name):
            raise ValueError("of another network, or of another kind")
        if set(kept.files) != {file.name for file in kept.form.files(kept.path)}:
            raise ValueError(f"files {', '.join(kept.files)}")
        if not TOLERANCES[kept.precision].holds(kept.difference, kept.loss_db):
            raise ValueError("it did not pass the gate of this version")
        changed = [file for file, digest in kept.files.items() if sha256(folder / file) != digest]
        if changed:
            raise ValueError(f"{changed[0]} has changed")
    except (OSError, TypeError, KeyError, ValueError, AttributeError) as error:
        got = f"no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else error
        raise InputError(
            "a kept export that cannot be used", file=folder, got=got,
            fix="Export the model anew with --keep, or remove this folder",
        ) from error  # fmt: skip
    return kept
