"""Smaller and faster models, each with what that loses.

nafnet compress prune mobile-v1 --ratio 0.2 --on STORE --out pruned.safetensors
nafnet train --config pruned.yaml --data STORE --val STORE          # and it learns what it lost
nafnet compress quantize mobile-v1 --calibration STORE --out int8.safetensors
"""

from pipelines.compress.prune import PruneConfig, PruneResult, run_prune
from pipelines.compress.quantize import QuantizeConfig, QuantizeResult, run_quantize

__all__ = [
    "PruneConfig",
    "PruneResult",
    "QuantizeConfig",
    "QuantizeResult",
    "run_prune",
    "run_quantize",
]
