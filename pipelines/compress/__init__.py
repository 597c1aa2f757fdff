"""Smaller and faster models, each with what that loses.

nafnet compress prune mobile-v1 --ratio 0.2 --on STORE --out pruned.safetensors
nafnet train --config pruned.yaml --data STORE --val STORE          # and it learns what it lost
"""

from pipelines.compress.prune import PruneConfig, PruneResult, run_prune

__all__ = ["PruneConfig", "PruneResult", "run_prune"]
