"""Checkpoints of a run and their ledger.

    RUN/checkpoints/0000123456/{model,ema,optim}.safetensors, state.json     written aside, synced, renamed
    RUN/checkpoints/ledger.json                                              atomic; names them, with digests

A checkpoint counts once the ledger names it. A damaged newest one is passed over for the one before. Our own
ledger, since Ray Train rewrites its snapshot in place and refuses a run of which one listed checkpoint is
missing. Nothing in a checkpoint is pickled.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nafnet_core import InputError
from nafnet_core.model import NAFNet
from nafnet_core.weights import load_state, read_state, save_model
from pipelines.files import make_folder, sha256, write_json, written_aside

log = logging.getLogger(__name__)

LEDGER = "ledger.json"
STATE = "state.json"
_MODEL, _EMA, _OPTIM = "model.safetensors", "ema.safetensors", "optim.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One checkpoint, as the ledger lists it."""

    samples: int
    folder: str
    psnr_db: float | None
    """Validation PSNR of these weights; None where none was taken."""
    digests: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """State of a run at one moment, in host memory: training may go on while it is written."""

    samples: int
    """Samples seen."""
    model: NAFNet
    ema: NAFNet | None
    """Trained and averaged weights."""
    optimizer: dict[str, Tensor]
    """Its state by parameter name."""
    state: Mapping[str, Any]
    """JSON values that resuming needs."""
    metadata: Mapping[str, Any]
    """Goes into the weights' headers."""

    @classmethod
    def of(
        cls,
        *,
        samples: int,
        model: NAFNet,
        ema: NAFNet | None,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> Snapshot:
        """Copy what will change."""
        return cls(
            samples=samples,
            model=copy.deepcopy(model).cpu(),
            ema=None if ema is None else copy.deepcopy(ema).cpu(),
            optimizer=_optimizer_tensors(model, optimizer),
            state=state,
            metadata=metadata,
        )


class CheckpointLedger:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, *, keep: int = 3) -> None:
        self.folder = run_dir / "checkpoints"
        self._keep = keep

    def entries(self) -> list[Entry]:
        """All checkpoints that count, oldest first."""
        path = self.folder / LEDGER
        if not path.is_file():
            return []
        try:
            return [Entry(**entry) for entry in json.loads(path.read_text())["entries"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError("damaged checkpoint ledger", file=path, got=str(error)) from error

    def save(self, snapshot: Snapshot, psnr_db: float | None = None) -> Path:
        """Write a checkpoint, enter it into the ledger, drop those that are neither new nor best.

        Args:
            snapshot: what to write.
            psnr_db: validation PSNR of exactly these weights, if there is one.

        Raises:
            OSError: the disk is full or not writable; the checkpoints before stay valid.
        """
        make_folder(self.folder)
        folder = self.folder / f"{snapshot.samples:010d}"
        shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt that the ledger never named
        with written_aside(folder) as temporary, _os_errors():
            temporary.mkdir()
            save_model(snapshot.model, temporary / _MODEL, metadata=snapshot.metadata)
            if snapshot.ema is not None:
                save_model(snapshot.ema, temporary / _EMA, metadata=snapshot.metadata)
            save_file(snapshot.optimizer, str(temporary / _OPTIM))
            write_json(temporary / STATE, {**snapshot.state, "samples": snapshot.samples})
        digests = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        entry = Entry(samples=snapshot.samples, folder=folder.name, psnr_db=psnr_db, digests=digests)
        self._commit([*(e for e in self.entries() if e.samples != snapshot.samples), entry])
        return folder

    def score(self, samples: int, psnr_db: float) -> None:
        """Enter the validation PSNR of a checkpoint that was saved before it was known.

        Nothing happens where that checkpoint is gone meanwhile.
        """
        entries = self.entries()
        scored = [replace(e, psnr_db=psnr_db) if e.samples == samples else e for e in entries]
        if scored != entries:
            self._commit(scored)

    def newest(self) -> Entry | None:
        """The newest checkpoint; None where there is none."""
        return max(self.entries(), key=lambda entry: entry.samples, default=None)

    def best(self) -> Entry | None:
        """The checkpoint of the highest validation PSNR; the newest one where none was validated."""
        entries = self.entries()
        return max(
            entries, key=lambda e: (-math.inf if e.psnr_db is None else e.psnr_db, e.samples), default=None
        )

    def newest_whole(self) -> Entry | None:
        """The newest checkpoint whose files match their digests; damaged ones are passed over, and said.

        Raises:
            InputError: there are checkpoints, but every one is damaged.
        """
        entries = self.entries()
        for entry in reversed(entries):
            fault = self.fault(entry)
            if fault is None:
                return entry
            log.warning("checkpoint %s is damaged (%s): going back to the one before", entry.folder, fault)
        if entries:
            raise InputError("every checkpoint of this run is damaged", file=self.folder)
        return None

    def weights(self, entry: Entry) -> Path:
        """The weights to use of a checkpoint: the averaged ones where there are any."""
        name = _EMA if _EMA in entry.digests else _MODEL
        return self.folder / entry.folder / name

    def state(self, entry: Entry) -> dict[str, Any]:
        """The JSON values that a checkpoint was saved with."""
        return json.loads((self.folder / entry.folder / STATE).read_text())

    def restore(
        self, entry: Entry, *, model: NAFNet, ema: NAFNet | None, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Load a checkpoint into the given objects and return its state.

        Raises:
            InputError: it does not fit the network.
        """
        folder = self.folder / entry.folder
        for network, name in ((model, _MODEL), (ema, _EMA)):
            if network is not None:
                load_state(network, read_state(folder / name)[0], file=folder / name)
        try:
            _load_optimizer(model, optimizer, load_file(str(folder / _OPTIM)))
        except (SafetensorError, KeyError) as error:
            raise InputError("the optimiser state does not fit", file=folder / _OPTIM, got=error) from error
        return self.state(entry)

    def fault(self, entry: Entry) -> str | None:
        """What is wrong with a checkpoint's files, in a few words; None where they match their digests."""
        for name, digest in entry.digests.items():
            file = self.folder / entry.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if sha256(file) != digest:
                return f"{name} has another digest"
        return None

    def _commit(self, entries: list[Entry]) -> None:
        """Enter what is kept, then remove the rest: a crash between the two leaves a folder too many."""
        entries.sort(key=lambda entry: entry.samples)
        validated = [entry for entry in entries if entry.psnr_db is not None]
        best = max(validated, key=lambda entry: entry.psnr_db, default=None)
        kept = [entry for entry in entries if entry in entries[-self._keep :] or entry == best]
        content = [{name: getattr(entry, name) for name in Entry.__slots__} for entry in kept]
        write_json(self.folder / LEDGER, {"schema_version": 1, "entries": content})
        for entry in entries:
            if entry not in kept:
                shutil.rmtree(self.folder / entry.folder, ignore_errors=True)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Safetensors hides what the system says in the text of an error of its own."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _optimizer_tensors(model: NAFNet, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    host: dict[str, Any] = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    return {
        f"{names[parameter]}/{key}": value.detach().to(**host)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _load_optimizer(model: NAFNet, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parameter = parameters[name]
        if value.dim():
            # In the parameter's own strides: the fused step walks both through memory side by side.
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        optimizer.state[parameter][field] = value
