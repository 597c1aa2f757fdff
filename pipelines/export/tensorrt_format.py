"""A TensorRT engine, for NVIDIA's GPUs. Has not been run: no GPU here.

The engine is strongly typed: each layer computes in the type that the ONNX graph says, so the norms and the
means stay in fp32 where the rest is in fp16, as the gate has seen them in ONNX Runtime.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nafnet_core import CapabilityError
from nafnet_core.exportable import Exportable
from pipelines.export import onnx_format
from pipelines.export.formats import Precision, Runner, write_beside

# Smallest, most frequent and largest batch, height and width that one engine takes.
PROFILE = ((1, 64, 64), (1, 720, 1280), (4, 1440, 2560))


def is_possible() -> bool:
    """Whether an engine can be built here: the package, and a GPU, for which alone it is built."""
    return find_spec("tensorrt") is not None and torch.cuda.is_available()


def command(onnx_file: Path, *, takes_bytes: bool) -> str:
    """What builds the same engine of `NAME.engine.onnx` elsewhere, with NVIDIA's own program."""
    shapes = zip(("min", "opt", "max"), _shapes(takes_bytes), strict=True)
    told = " ".join(
        f"--{name}Shapes={onnx_format.INPUT}:{'x'.join(map(str, shape))}" for name, shape in shapes
    )
    graph, engine = (shlex.quote(str(path)) for path in (onnx_file, onnx_file.with_suffix("")))
    return f"trtexec --onnx={graph} --saveEngine={engine} --stronglyTyped {told}"


def build(form: Exportable, precision: Precision) -> bytes:
    """The serialised engine.

    Raises:
        CapabilityError: TensorRT refuses the graph.
    """
    import tensorrt

    model = onnx_format.build(form, precision)
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    strongly_typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        faults = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise CapabilityError("TensorRT does not take this graph", got=faults)
    profile = builder.create_optimization_profile()
    profile.set_shape(onnx_format.INPUT, *_shapes(form.takes_bytes))
    settings = builder.create_builder_config()
    settings.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, settings)
    if engine is None:
        raise CapabilityError("TensorRT built no engine", fix="Its own messages above say why")
    return bytes(engine)


def save(built: bytes, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the engine, and beside it, for it has no place inside, `NAME.engine.json`."""
    path.write_bytes(built)
    write_beside(path, metadata)


def open(path: Path, precision: Precision, *, num_threads: int) -> Runner:
    import tensorrt

    engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING)).deserialize_cuda_engine(
        path.read_bytes()
    )
    context = engine.create_execution_context()

    def run(images: Any) -> Any:
        source = torch.from_numpy(images).cuda()
        result = torch.empty_like(source)
        context.set_input_shape(onnx_format.INPUT, tuple(source.shape))
        context.set_tensor_address(onnx_format.INPUT, source.data_ptr())
        context.set_tensor_address(onnx_format.OUTPUT, result.data_ptr())
        stream = torch.cuda.current_stream()
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return result.cpu().numpy()

    return run


def _shapes(takes_bytes: bool) -> list[tuple[int, ...]]:
    return [
        (batch, height, width, 3) if takes_bytes else (batch, 3, height, width)
        for batch, height, width in PROFILE
    ]
