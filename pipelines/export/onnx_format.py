"""ONNX, for ONNX Runtime, TensorRT, OpenVINO and phones."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nafnet_core import InputError
from nafnet_core.exportable import MEANS, Exportable
from nafnet_core.weights import METADATA_KEY
from pipelines.export.formats import Precision, Runner, as_runner

OPSET = 20
INPUT, OUTPUT = "lq", "restored"
_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of a node: the modules that it comes from


def build(form: Exportable, precision: Precision) -> Any:
    """An `onnx.ModelProto` with dynamic batch, height and width."""
    example, free = form.example()
    sizes = dict(zip(free, ("batch", "height", "width"), strict=True))
    with _quietly():
        program = torch.onnx.export(
            form,
            (example,),
            dynamo=True,
            dynamic_shapes=(sizes,),
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for position, name in sizes.items():  # a formula that comes to the same
        model.graph.output[0].type.tensor_type.shape.dim[position].dim_param = name
    if precision == "fp16":
        model = _in_half(model)
    for node in model.graph.node:  # where in the source each comes from: a third of a small network's file
        del node.metadata_props[:]
    del model.graph.value_info[:]
    return model


def save(built: Any, path: Path, metadata: Mapping[str, Any]) -> None:
    import onnx

    del built.metadata_props[:]
    onnx.helper.set_model_props(built, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    path.write_bytes(built.SerializeToString())


def read_metadata(path: Path) -> Any:
    properties = _session(path, num_threads=1, optimized=False).get_modelmeta().custom_metadata_map
    return json.loads(properties[METADATA_KEY]) if METADATA_KEY in properties else None


def open(path: Path, precision: Precision, *, num_threads: int) -> Runner:
    session = _session(path, num_threads=num_threads)
    return as_runner(lambda images: session.run(None, {INPUT: images})[0])


def _session(path: Path, *, num_threads: int, optimized: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Threads that spin while they wait hold up every other process, as OpenMP's do.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes for every fault, all of one base: Exception
        raise InputError("damaged ONNX file", file=path, got=str(error)[:120]) from error


def _in_half(model: Any) -> Any:
    """The same in fp16 but for norms and means, whose sums leave its range; fp32 in and out."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    means = [
        node.name
        for node in model.graph.node
        if any(each.key == _SCOPES and f".{MEANS}'" in each.value for each in node.metadata_props)
    ]
    assert means, "every block has means"
    with _quietly():
        converted = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=["LayerNormalization"], node_block_list=means
        )
    _take_out_detours(converted.graph)
    return converted


def _take_out_detours(graph: Any) -> None:
    """Join what stays in fp32: the converter has each result go through fp16 to the next of these nodes."""
    from onnx import TensorProto

    made_by = {name: node for node in graph.node for name in node.output}

    def is_cast(node: Any, to: int) -> bool:
        is_any = node is not None and node.op_type == "Cast"
        return is_any and any(each.name == "to" and each.i == to for each in node.attribute)

    for node in graph.node:
        for index, name in enumerate(node.input):
            back = made_by.get(name)
            if is_cast(back, TensorProto.FLOAT):
                there = made_by.get(back.input[0])
                if is_cast(there, TensorProto.FLOAT16):
                    node.input[index] = there.input[0]
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for _ in range(2):  # the way back first, and then the way there
        unused = [node for node in graph.node if node.op_type == "Cast" and node.output[0] not in used]
        for node in unused:
            graph.node.remove(node)
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    del graph.value_info[:]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without remarks on torchvision's operators, on deprecations inside, and on small constants in fp16."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
