"""Our code, as it is sent to a cluster's nodes: sources, and of these what their work needs.

Nodes have the packages that we need installed, not ours: what runs there is what was started here. Ray keeps
what it is sent by content, so that a second run sends nothing.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("nafnet_core", "pipelines", "cluster")
# What only the driver runs. Workers import none of it; tests/cluster/test_code.py holds that.
_DRIVER_ONLY = (
    "cluster/config.py",
    "cluster/jobs.py",
    "cluster/kuberay.py",
    "cluster/launch_file.py",
    "cluster/launcher.py",
    "nafnet_core/bootstrap.py",
    "pipelines/cli",
    "pipelines/config/cluster.py",
    "pipelines/demo.py",
    "pipelines/evaluate",
    "pipelines/gate.py",
    "pipelines/inspect",
    "pipelines/pyfunc.py",
    "pipelines/registry",
)
# What only the replicas of a service run or read: elsewhere a network is handed to the workers.
_FOR_SERVING = ("pipelines/bundled", "pipelines/serve")
_SENT_SUFFIXES = (".py", ".safetensors")


def packages() -> list[Path]:
    """The folders of our packages on this machine, installed or in a checkout."""
    return [_ROOT / package for package in _PACKAGES]


def stage_for_workers(folder: Path, *, serving: bool = False) -> list[Path]:
    """Copy what workers need into `folder`, those of a service too if asked; returns the packages there."""
    return _stage(folder, leave_out=_DRIVER_ONLY + (() if serving else _FOR_SERVING))


def stage_for_jobs(folder: Path) -> list[Path]:
    """Copy all of our code and the shipped recipes into `folder`, for a driver on the cluster."""
    staged = _stage(folder)
    recipes = next(place for place in (_ROOT / "pipelines" / "recipes", _ROOT / "configs") if place.is_dir())
    shutil.copytree(recipes, folder / "pipelines" / "recipes", dirs_exist_ok=True)
    return staged


def zipped_bytes(folder: Path) -> int:
    """What a folder takes when Ray has packed it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder.parent))
    return packed.tell()


def _stage(folder: Path, leave_out: tuple[str, ...] = ()) -> list[Path]:
    unwanted = {_ROOT / name for name in leave_out}

    def ignored(parent: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if Path(parent, name) in unwanted
            or not (Path(parent, name).is_dir() or name.endswith(_SENT_SUFFIXES))
            # Bytecode would double the size, and change it from one run to the next.
            or name == "__pycache__"
        ]

    for package in packages():
        shutil.copytree(package, folder / package.name, ignore=ignored)
    return [folder / package for package in _PACKAGES]
