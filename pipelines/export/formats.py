"""What each format can, and the module that knows how."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nafnet_core import CapabilityError, InputError
from nafnet_core.exportable import Exportable
from pipelines.models import EXPORTED_SUFFIXES

SCHEMA_VERSION = 1
"""Of the metadata in exported files."""
FormatName = Literal["onnx", "openvino", "tensorrt", "torch", "executorch", "tvm"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Runner = Callable[[NDArray[Any]], NDArray[Any]]
"""(N, 3, H, W) fp32 in 0…1, or (N, H, W, 3) uint8 where the graph takes bytes → the same."""


class Writer(Protocol):
    """What a format's module has."""

    def build(self, form: Exportable, precision: Precision, **options: Any) -> Any:
        """Make the format's own object of the network.

        Args:
            form: the network.
            precision: what it is to compute in.
            options: what this format alone is asked; of TVM's, see there.
        """
        ...

    def save(self, built: Any, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write it, with `metadata` (JSON values) inside; without any, to be run here."""
        ...

    def open(self, path: Path, precision: Precision, *, num_threads: int) -> Runner:
        """Load it into its runtime."""
        ...


class Reader(Writer, Protocol):
    """What the module of a format with a runtime has as well."""

    def read_metadata(self, path: Path) -> Any:
        """What `save` was given; None for a file of another program's.

        Raises:
            InputError: the file is damaged.
            ValueError: its metadata are no JSON.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One way to write a network."""

    name: FormatName
    suffix: str
    precisions: tuple[Precision, ...]
    """The first is the default."""
    runtime: str | None
    """What runs it, as `--backend` calls it; None: `restore` does not take it. A program of torch's is
    unpickled, and so nothing to take from strangers."""
    to_write: tuple[str, ...] = ()
    """Modules needed to write it, beside torch."""
    to_run: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    """Suffixes of the files that belong to it."""
    min_side_px: int = 1
    """Smallest side of an image that it takes."""
    size_px: tuple[int, int] | None = None
    """Height and width of the one size that it is for, unless another is asked for; None: it takes any."""
    extra: str = "export"
    """What to install with this package for it."""
    channels_last: bool = True
    """As `Exportable` takes it, and the next."""
    round_outputs: bool = True

    @property
    def module(self) -> Reader:
        """Its module, imported on first use; a `Writer` only, where there is no runtime."""
        return import_module(f"pipelines.export.{self.name}_format")  # type: ignore[return-value]

    def files(self, path: Path) -> tuple[Path, ...]:
        """All files of an export: the one to name first."""
        return path, *(path.with_suffix(suffix) for suffix in self.beside)

    def check(self, modules: tuple[str, ...], what: str) -> None:
        """Raise `CapabilityError` where one of the modules is not installed."""
        missing = [name for name in dict.fromkeys(modules) if find_spec(name) is None]
        if missing:
            raise CapabilityError(
                f"{what} needs {' and '.join(missing)}", fix=f"pip install 'nafnet-ray[{self.extra}]'"
            )

    @property
    def can_run(self) -> bool:
        """Whether what runs it is installed."""
        return self.runtime is not None and all(find_spec(name) is not None for name in self.to_run)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(
            name="onnx",
            suffix=".onnx",
            precisions=("fp32", "fp16", "int8"),
            runtime="onnxruntime",
            to_write=("onnx", "onnxscript", "onnxruntime"),
            to_run=("onnxruntime",),
        ),
        Format(
            name="openvino",
            suffix=".xml",
            precisions=("fp32", "bf16", "fp16", "int8"),
            runtime="openvino",
            to_write=("onnx", "onnxscript", "openvino"),
            to_run=("openvino",),
            beside=(".bin",),
            channels_last=False,
            round_outputs=False,
        ),
        Format(
            name="tensorrt",
            suffix=".engine",
            precisions=("fp16", "fp32"),
            runtime=None,
            to_write=("onnx", "onnxscript", "onnxruntime"),
            beside=(".engine.json",),
            min_side_px=64,
        ),
        # Of a side of 1 at the lowest resolution torch.export makes another graph: 32 px with four levels.
        Format(name="torch", suffix=".pt2", precisions=("fp32",), runtime=None, min_side_px=32),
        Format(
            name="executorch",
            suffix=".pte",
            precisions=("fp32",),
            runtime=None,
            to_write=("executorch",),
            beside=(".pte.json",),
            size_px=(256, 256),
            extra="executorch",
        ),
        Format(
            name="tvm",
            suffix=".so",
            precisions=("fp32",),
            runtime=None,
            to_write=("tvm",),
            beside=(".so.json",),
            size_px=(256, 256),
            extra="tvm",
        ),
    )
}


def form_of(name: str, *, target: str | None = None) -> Format:
    """The format of this name; for another machine, `target`, TVM's is an archive of objects to link there.

    Raises:
        InputError: there is none.
    """
    if name not in FORMATS:
        raise InputError("unknown format", expected=", ".join(FORMATS), got=name)
    form = FORMATS[name]
    return form if target is None else replace(form, suffix=".tar", beside=(".tar.json",))


def format_of(path: Path) -> Format:
    """The format of a file that a runtime takes, by its suffix.

    Raises:
        InputError: none is known for it.
    """
    for each in FORMATS.values():
        if each.suffix == path.suffix and each.runtime is not None:
            return each
    raise InputError("not an exported model", file=path, expected=" or ".join(EXPORTED_SUFFIXES))


def write_beside(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write `NAME.SUFFIX.json` for a file that has no place for it inside; nothing where there are none."""
    if metadata:
        path.with_name(f"{path.name}.json").write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n")


def as_runner(call: Callable[[NDArray[Any]], Any]) -> Runner:
    """`call` on contiguous arrays, with an array as its result."""
    return lambda images: np.asarray(call(np.ascontiguousarray(images)))
