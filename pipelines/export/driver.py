"""The network's graph is built, written aside, run against torch, and kept if it holds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from nafnet_core import CapabilityError, InputError
from nafnet_core.exportable import Exportable
from nafnet_core.kernels import disc_kernel
from pipelines.calibration import Calibration
from pipelines.export import tensorrt_format
from pipelines.export.formats import FORMATS, SCHEMA_VERSION, Format, Precision, form_of
from pipelines.export.parity import SCORED_PX, Image, Parity, compare
from pipelines.files import make_folder, take_places
from pipelines.models import LoadedModel

_NUM_PAIRS = 4
_PATCH_PX = 384


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write. Raises `InputError` where that cannot be."""

    to: str
    out: Path
    precision: Precision | None = None
    """None takes the format's first."""
    takes_bytes: bool = False
    """Images are (N, H, W, 3) uint8 in and out."""
    on: str | None = None
    """Store of pairs to compare on; None takes photos that scikit-image ships, blurred."""
    size_px: tuple[int, int] | None = None
    """Height and width that a format for one size is made for; None takes the format's."""
    target: str | None = None
    """What TVM is to compile for, in JSON; None: this machine. Of another one, objects to link there."""
    num_trials: int = 0
    """Candidates that TVM measures for each loop of the network; 0: none, and plain loops."""

    def __post_init__(self) -> None:
        if self.out.suffix != self.format.suffix:
            raise InputError(
                "the suffix is the format's", file=self.out, expected=f"NAME{self.format.suffix}"
            )
        _, *beside = self.format.files(self.out)
        strange = [file for file in beside if file.exists() and not self.out.exists()]
        if strange:
            raise InputError("this file is something else's, and would be replaced", file=strange[0])
        if self.precision not in (None, *self.format.precisions):
            expected = ", ".join(self.format.precisions)
            raise InputError(f"no such precision of {self.to}", expected=expected, got=self.precision)

        for option, is_asked in {
            "--target": self.target is not None,
            "--trials": self.num_trials > 0,
        }.items():
            if is_asked and self.to != "tvm":
                raise InputError(f"{option} is of another format", got=self.to, expected="tvm")
        if self.size_px is not None and self.format.size_px is None:
            able = ", ".join(name for name, each in FORMATS.items() if each.size_px is not None)
            raise InputError("--size is of formats for one size", got=self.to, expected=able)
        if self.size_px is not None and min(self.size_px) < SCORED_PX:
            raise InputError("--size", expected=f"sides of {SCORED_PX} px and more", got=self.size_px)

    @property
    def format(self) -> Format:
        return form_of(self.to, target=self.target)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written."""

    files: tuple[Path, ...]
    """The one to load first."""
    precision: Precision
    parity: Parity

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "bytes": self.num_bytes, "parity": self.parity.to_dict()}


def run(
    config: ExportConfig,
    loaded: LoadedModel,
    *,
    on_trial: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """Export a model.

    Args:
        config: what to write.
        loaded: the model.
        on_trial: told how many of TVM's candidates are measured, of how many.

    Raises:
        GateError: what the file computes is not what torch computes; no file is written.
        CapabilityError: a package that the format needs is not installed.
        InputError: no such store, or pairs too small.
    """
    form = config.format
    loaded.check_rgb()
    precision = precision_of(config, loaded)
    if config.to == "tensorrt" and not tensorrt_format.is_possible():
        _raise_without_gpu(config, loaded)
    form.check((*form.to_write, *form.to_run), f"export to {config.to}")
    patch, out = loaded.train_patch_px, config.out.absolute()
    size_px = config.size_px or form.size_px
    pairs, data = _pairs(config.on)
    asked = {"target": config.target, "num_trials": config.num_trials, "on_trial": on_trial}
    make_folder(out.parent)
    built = form.module.build(
        Exportable(
            loaded.model,
            train_patch_px=patch,
            takes_bytes=config.takes_bytes,
            size_px=size_px,
            channels_last=form.channels_last,
            round_outputs=form.round_outputs,
        ),
        precision,
        **(asked if config.to == "tvm" else {}),
    )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        aside = Path(folder) / out.name
        form.module.save(built, aside, {})
        parity = compare(
            loaded.model,
            form.module.open(aside, precision, num_threads=torch.get_num_threads()),
            pairs,
            train_patch_px=patch,
            takes_bytes=config.takes_bytes,
            data=data,
            min_side_px=form.min_side_px,
            size_px=size_px,
        )
        parity.check(precision, takes_bytes=config.takes_bytes, file=config.out)
        made = {
            "schema_version": SCHEMA_VERSION,
            "format": config.to,
            "runtime": form.runtime,
            "precision": precision,
            "takes_bytes": config.takes_bytes,
            "size_px": size_px,
            "target": config.target,
            "num_trials": config.num_trials,
            "weights_sha256": loaded.digest,
            "parity": parity.lasting(),
            "versions": {name: _version(name) for name in ("torch", *form.to_write)},
        }
        metadata = {**loaded.metadata, "config": loaded.model.config.to_dict()}
        form.module.save(built, aside, {**metadata, "export": made})
        take_places(form.files(aside), form.files(out))
    return ExportResult(files=form.files(config.out), precision=precision, parity=parity)


def precision_of(config: ExportConfig, loaded: LoadedModel) -> Precision:
    """What the file computes in. Raises `InputError` where it, or the weights, alone are in int8."""
    is_int8 = bool(loaded.model.config.int8_layers)
    if is_int8 and "int8" not in config.format.precisions:
        able = ", ".join(name for name, each in FORMATS.items() if "int8" in each.precisions)
        raise InputError("this format takes no model in int8", got=config.to, expected=able)
    precision = config.precision or ("int8" if is_int8 else config.format.precisions[0])
    if is_int8 != (precision == "int8"):
        raise InputError(
            "a model in int8 is exported as that" if is_int8 else "the weights are not in int8",
            file=loaded.weights, got=f"--precision {precision}",
            fix="Drop --precision" if is_int8 else "nafnet compress quantize MODEL --calibration STORE",
        )  # fmt: skip
    return precision


def _version(package: str) -> str:
    # ExecuTorch is a bare namespace, and says it one level below.
    said = getattr(import_module(package), "__version__", None)
    return said or import_module(f"{package}.version").__version__


def _raise_without_gpu(config: ExportConfig, loaded: LoadedModel) -> NoReturn:
    """Write what an engine is made of, and say how."""
    precision = config.precision or config.format.precisions[0]
    onnx = replace(config, to="onnx", out=config.out.with_suffix(".engine.onnx"), precision=precision)
    (file,) = run(onnx, loaded).files
    raise CapabilityError(
        "an engine is built with the package tensorrt, on the GPU that is to run it; its graph is written",
        file=file, fix=f"There: {tensorrt_format.command(file, takes_bytes=config.takes_bytes)}",
    )  # fmt: skip


def _pairs(on: str | None) -> tuple[list[tuple[Image, Image]], str]:
    """Pairs to compare on, and what they are."""
    if on is not None:
        calibration = Calibration.on(on, num_patches=_NUM_PAIRS, patch_px=_PATCH_PX)
        return list(calibration.images()), f"store {calibration.store.manifest.name}"
    try:
        from skimage import data
    except ImportError as error:
        raise CapabilityError(
            "pairs to compare on are wanting", expected="a store, or scikit-image's photos",
            fix="Name a store with --on, or pip install 'nafnet-ray[demo]'",
        ) from error  # fmt: skip
    import cv2

    photos = (data.astronaut(), data.chelsea(), data.coffee())
    kernel = disc_kernel(5.0)
    return [
        (np.asarray(cv2.filter2D(photo, -1, kernel)), photo) for photo in photos
    ], "astronaut, chelsea and coffee under a disc of 5 px"
