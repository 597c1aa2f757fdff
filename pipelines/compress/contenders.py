"""What a deployment report compares: networks, each in one precision, ready to be opened anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from nafnet_core import PRESETS, InputError, NAFNet, NAFNetConfig
from nafnet_core.foreign import ForeignNetwork
from nafnet_core.strips import convolutions_in_bf16
from nafnet_core.tiling import Network
from nafnet_core.weights import load_model
from pipelines.export.formats import format_of
from pipelines.export.running import open_runnable
from pipelines.models import BUNDLED_NAME, LoadedModel, is_exported
from pipelines.restorer import computes_in_bf16
from pipelines.workspace import Workspace

TorchPrecision = Literal["fp32", "bf16"]
TORCH_PRECISIONS: tuple[TorchPrecision, ...] = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One network in one precision. It pickles, so that a fresh process can open it too."""

    name: str
    """What the user called it."""
    backend: str
    """`torch`, or the runtime that it was exported for."""
    precision: str
    config: NAFNetConfig
    files: tuple[Path, ...]
    """What has to be shipped."""
    train_patch_px: int | None
    """Sets the window of local statistics; None turns them off. In exported files they are fixed."""
    opener: Callable[[int], Network]
    """Number of threads → the network; of torch the threads are the process's own."""
    modules: tuple[str, ...] = ()
    """What the runtime imports, beside torch."""

    @property
    def label(self) -> str:
        """Name, back end and precision."""
        return f"{self.name}, {self.backend} {self.precision}"

    @property
    def preset(self) -> str | None:
        """Name of the shape before any pruning; None where it has none."""
        whole = _unpruned(self.config)
        return next((name for name, config in PRESETS.items() if config == whole), None)

    @property
    def num_parameters(self) -> int:
        """Of the network, whatever form its file keeps them in."""
        with torch.device("meta"):
            return NAFNet(self.config).num_parameters

    @property
    def file_mib(self) -> float:
        """Of all of its files."""
        return sum(file.stat().st_size for file in self.files) / 2**20

    @property
    def macs_share(self) -> float:
        """Share of the multiply-accumulates that pruning left: against expansions of 2, the paper's; 1 of a
        whole network."""
        return self.config.num_macs(256, 256) / _unpruned(self.config).num_macs(256, 256)


def find_contenders(
    specs: Sequence[str],
    workspace: Workspace,
    *,
    precisions: Sequence[TorchPrecision] = (),
    train_patch_px: int | None = None,
) -> list[Contender]:
    """What the given models come to, in their order.

    Args:
        specs: as `open_runnable` takes them.
        workspace: where runs and the registry are.
        precisions: of weights, in each of which they make a contender; none: fp32, and bf16 where the
            processor computes in it. An exported file has its own.
        train_patch_px: as of `open_model`, for weights.

    Raises:
        InputError: no such model, one that does not restore RGB, one named twice, or an unknown precision.
        CapabilityError: the runtime of an exported file is not installed.
    """
    for precision in precisions:
        if precision not in TORCH_PRECISIONS:
            raise InputError("unknown --precision", expected=", ".join(TORCH_PRECISIONS), got=precision)
    if twice := next((spec for spec in specs if specs.count(spec) > 1), None):
        raise InputError("a model is named twice", got=twice)
    if not precisions:
        precisions = TORCH_PRECISIONS if computes_in_bf16(torch.device("cpu")) else TORCH_PRECISIONS[:1]
    opened = {}
    for spec in specs:
        patch = None if is_exported(spec) else train_patch_px
        opened[spec] = open_runnable(spec, workspace, train_patch_px=patch)
        opened[spec].check_rgb()
    names = [_name(spec, loaded) for spec, loaded in opened.items()]
    return [
        contender
        for name, (spec, loaded) in zip(names, opened.items(), strict=True)
        for contender in _of_model(name if names.count(name) == 1 else spec, loaded, precisions)
    ]


def _of_model(name: str, loaded: LoadedModel, precisions: Sequence[str]) -> list[Contender]:
    weights, config = loaded.weights.absolute(), loaded.model.config
    if loaded.backend == "torch":
        whole = Contender(
            name=name,
            backend=loaded.backend,
            precision="fp32",
            config=config,
            files=(weights,),
            train_patch_px=loaded.train_patch_px,
            opener=partial(_open_weights, weights),
        )
        if config.int8_layers:  # which torch rounds to, and computes in fp32
            return [replace(whole, precision="int8 in fp32")]
        half = replace(whole, precision="bf16", opener=partial(_open_weights, weights, in_bf16=True))
        return [{"fp32": whole, "bf16": half}[precision] for precision in precisions]
    assert loaded.fixed_precision is not None
    form = format_of(weights)
    return [
        Contender(
            name=name,
            backend=loaded.backend,
            precision=loaded.fixed_precision,
            config=config,
            files=form.files(weights),
            train_patch_px=loaded.train_patch_px,
            opener=partial(_open_exported, weights, loaded.fixed_precision, config),
            modules=form.to_run,
        )
    ]


def _open_weights(weights: Path, num_threads: int, *, in_bf16: bool = False) -> NAFNet:
    # Converted once, as `restore` does for a whole folder of photos.
    model, _ = load_model(weights)
    return convolutions_in_bf16(model) if in_bf16 else model


def _open_exported(file: Path, precision: str, config: NAFNetConfig, num_threads: int) -> ForeignNetwork:
    # Not `open_exported`, which reads the metadata first, through a session of its own: that would show in
    # the peak of memory.
    runner = format_of(file).module.open(file, precision, num_threads=num_threads)  # type: ignore[arg-type]
    return ForeignNetwork(config, runner)


def _name(spec: str, loaded: LoadedModel) -> str:
    """What the user called it, short: a file by its name alone."""
    if spec == BUNDLED_NAME:
        return spec
    return loaded.weights.name if Path(spec).is_file() else loaded.label


def _unpruned(config: NAFNetConfig) -> NAFNetConfig:
    # Gates that all lost one half come as an expansion of 1: a state dict says its widths, and no more.
    return replace(config, dw_channels=None, ffn_channels=None, dw_expand=2, ffn_expand=2, int8_layers=None)
