"""A program for ExecuTorch, PyTorch's runtime for phones and small boards, for one size of image.

What XNNPACK knows is lowered to it: convolutions, products and sums, on ARM as on x86.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nafnet_core.exportable import Exportable
from pipelines.export.formats import Precision, Runner, as_runner, write_beside


def build(form: Exportable, precision: Precision) -> bytes:
    """The whole `.pte` file."""
    example, _ = form.example()
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.export(form, (example,))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        return lowered.to_executorch().buffer


def save(built: bytes, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the program, and beside it, for a phone has no use for it, `NAME.pte.json`."""
    path.write_bytes(built)
    write_beside(path, metadata)


def open(path: Path, precision: Precision, *, num_threads: int) -> Runner:
    """ExecuTorch has as many threads as the machine has cores."""
    with _quiet():
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None

    def run(images: Any) -> Any:
        (restored,) = method.execute([torch.from_numpy(images)])
        return restored.numpy().copy()  # its memory is the next call's

    return as_runner(run)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what ExecuTorch and torchao tell of themselves: deprecations, experiments, kernels for GPUs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
