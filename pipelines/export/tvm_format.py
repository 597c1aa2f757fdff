"""A library of machine code, by Apache TVM's compiler (Relax), for one size of image and one processor.

Untuned: its loops are TVM's own, fused, and slower than what the runtimes bring along. It is for processors
that these do not know.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nafnet_core import InputError
from nafnet_core.exportable import Exportable
from pipelines.export.formats import Precision, Runner, write_beside


@dataclass(frozen=True, slots=True)
class _Built:
    here: Any
    there: Any
    """For the target; None where that is this machine."""


def build(form: Exportable, precision: Precision, *, target: str | None = None) -> _Built:
    """The network compiled for this machine, and for `target`, TVM's description of one in JSON.

    Raises:
        InputError: TVM knows no such target.
    """
    import tvm
    from tvm.relax.frontend.torch import from_exported_program

    there = None if target is None else _target(target)
    example, _ = form.example()
    operators = {"amax.default": _largest, "index_select.default": _taken}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code, on itself
        program = torch.export.export(form, (example,))
        module = from_exported_program(program, keep_params_as_input=False, custom_convert_map=operators)
    cpu = tvm.target.codegen.llvm_get_system_cpu()
    here = _compiled(module, tvm.target.Target({"kind": "llvm", "mcpu": cpu}))
    return _Built(here, None if there is None else _compiled(module, there))


def save(built: _Built, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the library, or for another target its objects, unlinked, in a `.tar`; and `NAME.json`."""
    from tvm.support.tar import tar

    if metadata and built.there is not None:
        built.there.export_library(str(path), fcompile=tar)
    else:
        built.here.export_library(str(path))
    write_beside(path, metadata)


def open(path: Path, precision: Precision, *, num_threads: int) -> Runner:
    """As `save` wrote it for this machine; TVM has as many threads as `TVM_NUM_THREADS` says."""
    import tvm

    machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    return lambda images: machine["main"](tvm.runtime.tensor(images))[0].numpy()


def _target(described: str) -> Any:
    import tvm

    try:
        return tvm.target.Target(json.loads(described))
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            "TVM knows no such target", got=described,
            expected='JSON like {"kind": "llvm", "mtriple": "aarch64-linux-android"}',
        ) from error  # fmt: skip


def _compiled(module: Any, target: Any) -> Any:
    import tvm

    with target:
        fused = tvm.relax.get_pipeline("zero")(module)
    return tvm.compile(fused, target)


def _largest(node: torch.fx.Node, importer: Any) -> Any:
    """`amax`, which TVM 0.27 does not translate."""
    from tvm.relax import op

    x, axes, keeps_axes = node.args
    return importer.block_builder.emit(op.max(importer.env[x], list(axes), keeps_axes))  # type: ignore[arg-type]


def _taken(node: torch.fx.Node, importer: Any) -> Any:
    """`index_select`, which TVM translates to one that reads beyond the map for a wrong index."""
    from tvm.relax import op

    x, axis, index = node.args
    return importer.block_builder.emit(op.take(importer.env[x], importer.env[index], axis, mode="clip"))
