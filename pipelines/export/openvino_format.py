"""OpenVINO, for Intel's processors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nafnet_core import InputError
from nafnet_core.exportable import Exportable
from nafnet_core.weights import METADATA_KEY
from pipelines.export import onnx_format
from pipelines.export.formats import Precision, Runner, as_runner

_COMPUTES_IN = {"fp32": "f32", "bf16": "bf16", "fp16": "f32", "int8": "f32"}


@dataclass(frozen=True, slots=True)
class _Built:
    model: Any
    precision: Precision


def build(form: Exportable, precision: Precision) -> _Built:
    """An `openvino.Model`, by way of ONNX."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_format.save(onnx_format.build(form, "fp32"), path, {})
        # Not `convert_model`, which reports each use to its makers.
        return _Built(openvino.Core().read_model(path), precision)


def save(built: _Built, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write `NAME.xml` and, with the weights, `NAME.bin`; those in fp16 are half as large."""
    import openvino

    built.model.set_rt_info(json.dumps(metadata, sort_keys=True), METADATA_KEY)
    openvino.save_model(built.model, path, compress_to_fp16=built.precision == "fp16")


def read_metadata(path: Path) -> Any:
    model = _read(path)
    return (
        json.loads(model.get_rt_info(METADATA_KEY).astype(str)) if model.has_rt_info(METADATA_KEY) else None
    )


def open(path: Path, precision: Precision, *, num_threads: int) -> Runner:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": _COMPUTES_IN[precision], "INFERENCE_NUM_THREADS": num_threads}
    compiled = openvino.Core().compile_model(_read(path), "CPU", settings)
    return as_runner(lambda images: compiled(images)[0])


def _read(path: Path) -> Any:
    import openvino

    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise InputError("damaged OpenVINO file", file=path, got=str(error)[:120]) from error
