"""What a run is told to have been made with: this machine, these versions, this commit."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

_TIMEOUT_S = 5.0


def machine_tags() -> dict[str, str]:
    """The machine that a command runs on, and what it runs, as tags of an MLflow run."""
    import psutil

    tags = {
        "nafnet.host": socket.gethostname(),
        "nafnet.processor": processor(),
        "nafnet.cores": str(psutil.cpu_count()),
        "nafnet.ram_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "nafnet.gpus": ", ".join(gpus()) or "none",
        "nafnet.python": platform.python_version(),
        **{f"nafnet.{package}": version(package) for package in ("torch", "ray", "mlflow")},
        "mlflow.user": _user(),
        "mlflow.source.name": "nafnet train",
        "mlflow.source.type": "LOCAL",
    }
    return tags | git_tags()


def processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def gpus() -> list[str]:
    """Names of this machine's NVIDIA GPUs, by `nvidia-smi`: CUDA would take memory of each to say them."""
    output = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return [] if output is None else output.splitlines()


def git_tags() -> dict[str, str]:
    """Commit of the checkout that this code runs from, and whether files changed; none outside of one."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    # A virtual environment may lie inside of somebody's own repository.
    if _output(*git, "ls-files", "--error-unmatch", here.name) is None:
        return {}
    commit = _output(*git, "rev-parse", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return {}
    return {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(bool(changed)).lower()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _output(*command: str) -> str | None:
    """What a program prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
