"""What of our code is sent to a cluster, and that it suffices there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from cluster.code import stage_for_jobs, stage_for_workers, zipped_bytes

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = {"nafnet_core", "pipelines", "cluster"}
# What actors and tasks are made of, wherever a stage has some.
_ENTRIES = (
    "pipelines.train.worker",
    "pipelines.train.controller",
    "pipelines.train.interface",
    "pipelines.train.beside",
    "pipelines.feeder",
    "pipelines.probe",
    "pipelines.restore.cluster",
    "pipelines.prepare",
    "pipelines.scoring.work",
    "pipelines.synth.work",
    "pipelines.serve.guard",
    "pipelines.serve.replica",
    "pipelines.tune.actor",
    "pipelines.tune.tuner",
)


def test_workers_find_all_that_they_import(tmp_path: Path) -> None:
    """What is imported inside of functions as well, which would fail on a node only when it is reached."""
    stage_for_workers(tmp_path, serving=True)
    known, waiting = set(_ENTRIES), list(_ENTRIES)
    while waiting:
        importer = waiting.pop()
        for name in _imported(importer) - known:
            if not _is_for_drivers(importer, name):
                assert _file(tmp_path, name), (
                    f"{importer}, which workers run, imports {name}, which is not sent"
                )
                known.add(name)
                waiting.append(name)
    assert "pipelines.train.loop" in known
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", program, *sorted(known)],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_sent_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    staged = stage_for_workers(tmp_path / "first")
    again = stage_for_workers(tmp_path / "again")
    assert 100 * 1024 < sum(map(zipped_bytes, staged)) < 450 * 1024
    files = [
        {
            file.relative_to(folder.parent): file.read_bytes()
            for folder in folders
            for file in folder.rglob("*.py")
        }
        for folders in (staged, again)
    ]
    assert files[0] == files[1]
    assert not list((tmp_path / "first").rglob("__pycache__"))
    # Workers are handed a network; replicas of a service open theirs, which may be the bundled one.
    assert not list((tmp_path / "first").rglob("*.safetensors"))
    stage_for_workers(tmp_path / "serving", serving=True)
    assert list((tmp_path / "serving" / "pipelines" / "bundled").glob("*.safetensors"))


def test_a_job_has_the_command_line_and_the_recipes(tmp_path: Path) -> None:
    stage_for_jobs(tmp_path)
    bundled = tmp_path / "pipelines" / "bundled" / "mobile-v1.safetensors"
    assert zipped_bytes(tmp_path) < 2**20 + bundled.stat().st_size
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "train", "--config", "mobille"],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "search_mobile" in done.stderr, "the shipped recipes are found"


def _imported(module: str) -> set[str]:
    """Modules of ours that a module imports, anywhere in it."""
    file = _file(_ROOT, module)
    assert file is not None
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] in _PACKAGES and _file(_ROOT, name)}


def _file(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _is_for_drivers(importer: str, imported: str) -> bool:
    """A search's winner is registered by its driver."""
    return importer.startswith("pipelines.tune.") and imported.startswith("pipelines.registry")
