"""Folders for files that are needed meanwhile, which do not stay behind where a process is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nafnet_core import CapabilityError

_LOCK = "lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder below `TMPDIR`, and remove it at the end.

    Its owner holds a lock in it. A folder whose lock nobody holds was left by a process that was killed: it
    is removed by whoever comes next.

    Raises:
        CapabilityError: it cannot be made.
    """
    base = Path(tempfile.gettempdir()) / f"nafnet-{os.getuid()}"
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        with (base / _LOCK).open("w") as all_of_them:
            # Else a folder could be taken for left behind before its owner has the lock.
            fcntl.flock(all_of_them, fcntl.LOCK_EX)
            for folder in base.iterdir():
                _remove_if_left(folder)
            path = Path(tempfile.mkdtemp(dir=base))
            lock = (path / _LOCK).open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        fix = "Name another folder with TMPDIR"
        raise CapabilityError(
            "no place for temporary files", file=base, got=error.strerror, fix=fix
        ) from error
    with lock:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    if not folder.is_dir():
        return
    try:
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its owner is at work, or has just removed it
        pass
