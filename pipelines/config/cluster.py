"""A cluster's YAML file, read as recipes are: with overrides, and unknown keys refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cluster
from cluster.config import ClusterConfig
from pipelines.config.recipe import load_as

# Lies inside the package, in a wheel as in a checkout.
EXAMPLE = Path(cluster.__file__).parent / "kuberay.yaml"


def load_cluster(path: Path | None = None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Configuration of a cluster on Kubernetes.

    Args:
        path: of the YAML file; None takes the shipped example.
        overrides: `key.path=value`.

    Raises:
        InputError: no such file, bad YAML, an unknown key, or a value that cannot be.
    """
    return load_as(ClusterConfig, path or EXAMPLE, overrides)
