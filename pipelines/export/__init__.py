"""A model for other runtimes, written only where it computes what torch computes.

nafnet export mobile-v1 --to onnx --out mobile-v1.onnx
nafnet export models:/nafnet-deblur@champion --to openvino --precision bf16 --on STORE
nafnet restore photo.jpg --model mobile-v1.onnx
nafnet export mobile-v1 --to openvino --keep        # for `restore`, where it is faster

`driver` and `parity` make an export and hold it against torch; `running` opens one; `kept`, `published`,
`timing` and `choosing` are what stands behind `--keep` and `--backend`.
"""

from pipelines.export.choosing import BACKENDS, choose
from pipelines.export.driver import ExportConfig, ExportResult, precision_of, run
from pipelines.export.formats import FORMATS, Format, form_of
from pipelines.export.kept import check_kept, keep
from pipelines.export.parity import Parity
from pipelines.export.running import open_exported, open_runnable

__all__ = [
    "BACKENDS",
    "FORMATS",
    "ExportConfig",
    "ExportResult",
    "Format",
    "Parity",
    "check_kept",
    "choose",
    "form_of",
    "keep",
    "open_exported",
    "open_runnable",
    "precision_of",
    "run",
]
