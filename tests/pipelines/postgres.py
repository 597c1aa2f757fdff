"""A private PostgreSQL of a test's own: a new cluster in a folder, on a free port, gone at the end.

    apt-get install -y postgresql

The programs are found on PATH or where Debian puts them; a test that finds none is skipped. PostgreSQL does
not run as root: there it runs as the user `postgres`, whom the package makes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipelines.mlflow_servers import free_port

_USER = "postgres"
_DEBIAN = "/usr/lib/postgresql"


@contextmanager
def postgres() -> Iterator[str]:
    """Start one; yields the URI of its data base, as SQLAlchemy and MLflow take it."""
    programs = _programs()
    if programs is None:
        pytest.skip("no initdb and pg_ctl: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="no driver: pip install psycopg2-binary")
    user = _user()
    # Not pytest's own folder: that is closed to other users, and a socket's path has to be short.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    port, data = free_port(), folder / "data"
    control = [programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        if user is not None:
            shutil.chown(folder, user)
        _run([programs / "initdb", "-D", data, "-U", _USER, "-A", "trust", "-E", "UTF8", "--no-sync"], user)
        _run([*control, "-o", options, "start"], user)
        try:
            yield f"postgresql+psycopg2://{_USER}@127.0.0.1:{port}/postgres"
        finally:
            _run([*control, "-m", "immediate", "stop"], user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    """Folder with `initdb` and `pg_ctl`, the newest first."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).parent] if on_path else []
    folders += sorted(Path(_DEBIAN).glob("*/bin"), key=lambda f: float(f.parent.name), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "pg_ctl").exists()), None)


def _user() -> str | None:
    """Whom it runs as; None for the one who runs the tests."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(_USER).pw_name
    except KeyError:
        pytest.skip("root may not run PostgreSQL, and there is no user postgres")


def _run(command: list[str | Path], user: str | None) -> None:
    # Output to a file, not a pipe: the server would inherit the pipe and hold it open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            [str(part) for part in command], user=user, cwd="/", stdout=output, stderr=output, timeout=60
        )
        output.seek(0)
        assert done.returncode == 0, output.read().decode()
