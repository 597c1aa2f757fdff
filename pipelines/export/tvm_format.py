"""A library of machine code, by Apache TVM's compiler (Relax), for one size of image and one processor.

Its loops are plain ones, in order and in one thread, unless candidates are measured: see `tvm_tuning`.
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
from pipelines.export.tvm_tuning import Step, tuned


@dataclass(frozen=True, slots=True)
class _Built:
    here: Any
    there: Any
    """For the target; None where that is this machine."""


def build(
    form: Exportable,
    precision: Precision,
    *,
    target: str | None = None,
    num_trials: int = 0,
    on_trial: Step = lambda done, total: None,
) -> _Built:
    """The network compiled for this machine, and for another.

    Args:
        form: the network.
        precision: fp32.
        target: TVM's description of another processor, in JSON.
        num_trials: how many candidates to measure for each loop, here; both get the best ones.
        on_trial: told of each.

    Raises:
        InputError: TVM knows no such target.
    """
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    there = None if target is None else _target(target)
    example, _ = form.example()
    operators = {"amax.default": _largest, "index_select.default": _taken}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code, on itself
        program = torch.export.export(form, (example,))
        module = from_exported_program(program, keep_params_as_input=False, custom_convert_map=operators)
    cpu, num_cores = tvm.target.codegen.llvm_get_system_cpu(), torch.get_num_threads()
    here = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": num_cores})
    with here:
        loops = relax.get_pipeline("zero")(_with_norms_over_channels(module))
    best = tuned(loops, here, num_trials=num_trials, on_trial=on_trial) if num_trials else None
    return _Built(_compiled(loops, here, best), None if there is None else _compiled(loops, there, best))


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


def _with_norms_over_channels(module: Any) -> Any:
    """Norms over the axis of channels where it lies, instead of copies of the map with it last, and back."""
    from tvm import relax
    from tvm.relax.dpl import is_op, rewrite_call, wildcard

    x, scale, shift = wildcard(), wildcard(), wildcard()
    norm = is_op("relax.nn.layer_norm")(is_op("relax.permute_dims")(x), scale, shift)

    def over_channels(_: Any, found: Any) -> Any:
        epsilon = found[norm].attrs.epsilon
        return relax.op.nn.layer_norm(found[x], found[scale], found[shift], axes=[1], epsilon=epsilon)

    module["main"] = rewrite_call(is_op("relax.permute_dims")(norm), over_channels, module["main"])
    return module


def _compiled(loops: Any, target: Any, best: Any) -> Any:
    import tvm

    if best is not None:
        with target, best:
            loops = tvm.relax.transform.MetaScheduleApplyDatabase()(loops)
    return tvm.compile(loops, target)


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
