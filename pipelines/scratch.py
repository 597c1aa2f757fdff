"""Folders for files that are needed meanwhile, which do not stay behind where a process is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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
        _check_ours(base)
        with _opened_lock(base) as all_of_them:
            # Else a folder could be taken for left behind before its owner has the lock.
            fcntl.flock(all_of_them, fcntl.LOCK_EX)
            for folder in base.iterdir():
                _remove_if_left(folder)
            path = Path(tempfile.mkdtemp(dir=base))
            lock = _opened_lock(path)
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


def _check_ours(folder: Path) -> None:
    """Raise `OSError` where somebody else has made a folder of this name, or may write into it."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise OSError(errno.EPERM, "not a folder of this user alone", str(folder))


def _opened_lock(folder: Path) -> IO[bytes]:
    """The folder's lock file; never what a link of that name points to."""
    return os.fdopen(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")


def _remove_if_left(folder: Path) -> None:
    if not folder.is_dir():
        return
    try:
        with _opened_lock(folder) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its owner is at work, or has just removed it
        pass
