"""A model for other runtimes, written only where it computes what torch computes.

nafnet export mobile-v1 --to onnx --out mobile-v1.onnx
nafnet export models:/nafnet-deblur@champion --to openvino --precision bf16 --on STORE
nafnet restore photo.jpg --model mobile-v1.onnx
"""

from pipelines.export.driver import ExportConfig, ExportResult, run
from pipelines.export.formats import FORMATS, Format, form_of
from pipelines.export.parity import Parity
from pipelines.export.running import open_exported, open_runnable

__all__ = [
    "FORMATS",
    "ExportConfig",
    "ExportResult",
    "Format",
    "Parity",
    "form_of",
    "open_exported",
    "open_runnable",
    "run",
]
