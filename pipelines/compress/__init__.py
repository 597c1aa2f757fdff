"""Smaller and faster models, each with what that loses.

nafnet compress prune mobile-v1 --ratio 0.2 --on STORE --out pruned.safetensors
nafnet train --config pruned.yaml --data STORE --val STORE          # and it learns what it lost
nafnet compress quantize mobile-v1 --calibration STORE --out int8.safetensors
nafnet compress report mobile-v1 pruned.safetensors mobile-v1.onnx --on STORE --out report
"""

from pipelines.compress.contenders import Contender, find_contenders
from pipelines.compress.prune import PruneConfig, PruneResult, run_prune
from pipelines.compress.quantize import QuantizeConfig, QuantizeResult, run_quantize
from pipelines.compress.report import check_out, measure, write
from pipelines.compress.table import DeployTable, Row, pareto_front

__all__ = [
    "Contender",
    "DeployTable",
    "PruneConfig",
    "PruneResult",
    "QuantizeConfig",
    "QuantizeResult",
    "Row",
    "check_out",
    "find_contenders",
    "measure",
    "pareto_front",
    "run_prune",
    "run_quantize",
    "write",
]
