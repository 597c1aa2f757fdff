"""Weights that a run begins with: `model.init`, or `--init MODEL`.

    nafnet train --config mixed_l1_perceptual --init models:/nafnet-deblur@champion --data STORE

The driver reads the model once, puts what fits into a network drawn anew, and writes the whole into the run's
folder, which every worker sees: no node needs the file or the registry. Its SHA-256 is pinned in the run's
configuration, which goes into each checkpoint and to MLflow.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nafnet_core import InputError
from nafnet_core.model import NAFNet, randomize_residual_scales
from nafnet_core.weights import load_state, read_state, save_model
from pipelines.checkpoint import CheckpointLedger
from pipelines.config import RunConfig
from pipelines.console import TOLD
from pipelines.files import sha256, written_aside
from pipelines.models import find_weights
from pipelines.train.files import CONFIG, INIT
from pipelines.workspace import Workspace

log = logging.getLogger(__name__)

_SHOWN_NAMES = 2
_CONVOLUTION_DIMS = 4


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What of a model went into a network. Names are those of tensors."""

    label: str
    """What the model is called, as in tables."""
    digest: str
    """SHA-256 of its weights file."""
    loaded: int
    total: int
    """Tensors of the network."""
    missing: tuple[str, ...] = ()
    """Of the network, not in the file."""
    misshapen: tuple[str, ...] = ()
    """In both, of another shape: `NAME (shape in the file) for (shape of the network)`."""
    unexpected: tuple[str, ...] = ()
    """In the file, not of the network."""

    @property
    def is_whole(self) -> bool:
        """Whether file and network are the same tensors."""
        return self.loaded == self.total and not self.unexpected

    def line(self) -> str:
        """One line for the person."""
        begin = f"initial weights: {self.loaded} of {self.total} tensors from {self.label}"
        faults = (
            ("not in it", self.missing),
            ("of another shape", self.misshapen),
            ("unknown to the network", self.unexpected),
        )
        told = [f"{len(names)} {fault} ({_first(names)})" for fault, names in faults if names]
        return f"{begin}; {', '.join(told)}" if told else begin

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def with_initial_weights(config: RunConfig, workspace: Workspace, run_dir: Path) -> RunConfig:
    """Put the weights that a new run begins with into its folder, and pin their digest in its configuration.

    A run that has a checkpoint goes on from that: then the model is not looked for again.

    Raises:
        InputError: there is no such model, it is damaged, nothing of it fits, or its digest is another than
            `model.init_sha256`.
    """
    if config.model.init is None:
        return config
    if CheckpointLedger(run_dir).entries():
        digest = json.loads((run_dir / CONFIG).read_text())["model"].get("init_sha256")
        return _pinned(config, digest)
    initial = write_initial(config, workspace, run_dir)
    # A part is easily taken for the whole; the rest begins as in any new run.
    log.log(logging.INFO if initial.is_whole else logging.WARNING, "%s", initial.line(), extra=TOLD)
    return _pinned(config, initial.digest)


def write_initial(config: RunConfig, workspace: Workspace, run_dir: Path) -> InitialWeights:
    """Write the network that a run begins with: drawn by the run's seed, the model's weights where they fit.

    Args:
        config: with `model.init`.
        workspace: where runs and the registry are.
        run_dir: the file goes there.

    Raises:
        InputError: there is no such model, it is damaged, nothing of it fits, or its digest is another than
            `model.init_sha256`.
    """
    from pipelines.train.trainer import build_model  # which reads what is written here

    assert config.model.init is not None
    label, weights = find_weights(config.model.init, workspace)
    digest = sha256(weights) if weights.is_file() else ""
    state, _ = read_state(weights)
    pinned = config.model.init_sha256
    if pinned not in (None, digest):
        raise InputError(
            "other initial weights than the recipe's", file=weights, expected=pinned, got=digest,
            fix="Give the same model, or drop model.init_sha256",
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config.model)
    randomize_residual_scales(model, seed=config.seed, scale=config.optim.residual_scale)
    own = model.state_dict()
    fitting = {
        name: value
        for name, value in state.items()
        if name in own
        and value.shape == own[name].shape
        and value.is_floating_point()
        and value.layout == torch.strided
    }
    misshapen = tuple(
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and name not in fitting
    )
    # The last bias has three values in any network: that is no weights that fit.
    if not any(value.dim() == _CONVOLUTION_DIMS for value in fitting.values()):
        got = _first(misshapen) or _first(list(state)) or "an empty file"
        raise InputError(
            "nothing of this model fits the network", file=weights, got=got,
            fix="Give the recipe the model's own numbers; `nafnet inspect MODEL` tells them",
        )  # fmt: skip
    broken = [name for name, value in fitting.items() if not bool(value.isfinite().all())]
    if broken:
        raise InputError("weights that are not finite", file=weights, got=_first(broken))
    model.load_state_dict({**own, **fitting})
    with written_aside(run_dir / INIT) as temporary:
        save_model(model, temporary, metadata={"init": label, "init_sha256": digest})
    return InitialWeights(
        label=label,
        digest=digest,
        loaded=len(fitting),
        total=len(own),
        missing=tuple(name for name in own if name not in state),
        misshapen=misshapen,
        unexpected=tuple(name for name in state if name not in own),
    )


def load_initial(model: NAFNet, run_dir: Path) -> None:
    """In a worker: begin with the weights that the driver left; a run that has a checkpoint needs none.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not CheckpointLedger(run_dir).entries():
        load_state(model, read_state(run_dir / INIT)[0], file=run_dir / INIT)


def _pinned(config: RunConfig, digest: str | None) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"init_sha256": digest})})


def _first(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
