"""The project's own rules: import direction, nothing done at import, recipes and versions in step."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nafnet_core

_ROOT = Path(__file__).resolve().parent.parent
_ALLOWED = {
    "nafnet_core": {"nafnet_core"},
    "cluster": {"cluster", "nafnet_core"},  # of the core only its errors, see below
    "pipelines": {"pipelines", "cluster", "nafnet_core"},
}
_PACKAGES = set(_ALLOWED)
_MODULES = sorted(path for package in _PACKAGES for path in (_ROOT / package).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def _imports_from(path: Path, package: str) -> set[str]:
    """Modules of a package that a file imports, in full."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes if node.module and node.module.split(".")[0] == package}


@pytest.mark.parametrize("path", _MODULES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(_ROOT).parts[0]
    imported = _imports(path)
    assert imported & _PACKAGES <= _ALLOWED[package]
    if package == "nafnet_core":
        assert not imported & {"ray", "mlflow"}
    if package == "cluster":
        assert _imports_from(path, "nafnet_core") <= {"nafnet_core.errors"}


@pytest.mark.parametrize("path", _MODULES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_files_stay_readable(path: Path) -> None:
    limit = 500 if path.name == "cli.py" else 400
    assert len(path.read_text().splitlines()) <= limit


def test_importing_everything_does_nothing(tmp_path: Path) -> None:
    """No folder, no Ray, no MLflow. `pyfunc` is left out: by MLflow's contract it announces its model."""
    modules = [
        ".".join(path.relative_to(_ROOT).with_suffix("").parts)
        for path in _MODULES
        if path.name not in ("__main__.py", "__init__.py", "pyfunc.py")
    ]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]\n"
        "import ray; assert not ray.is_initialized()\n"
        "assert 'mlflow' not in sys.modules, 'MLflow takes seconds to import: only where it is used'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(_ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch_no_ray_no_mlflow() -> None:
    code = (
        "import sys; sys.argv = ['nafnet', '--help']\n"
        "from pipelines.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_core_works_without_ray_and_mlflow() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None\n"
        "import nafnet_core\n"
        "for name in nafnet_core.__all__: getattr(nafnet_core, name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "restore_image" in nafnet_core.__all__


def test_changelog_has_the_version() -> None:
    version = re.search(r'^version = "(.+)"$', (_ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert f"## [{version[1]}]" in (_ROOT / "CHANGELOG.md").read_text()


def test_readme_names_every_command() -> None:
    from pipelines.cli import app

    readme = (_ROOT / "README.md").read_text()
    names = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    assert names and all(f"`nafnet {name}`" in readme for name in names)
