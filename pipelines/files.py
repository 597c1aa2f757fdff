"""Files that are whole or absent: write aside, sync, rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nafnet_core import InputError

NODE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)
"""What a node lacks: no fault of the file that is read or written, nor of the storage where it lies."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and takes its name, else it is removed.

    Works for a file or a folder. A folder's files are each synced before the rename.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            if file.is_file():
                _sync(file)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which on success takes its name and the place of what was there.

    Whole or not at all: what was there stays until then. Two processes at once: one of the two folders stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                _sync(file)
        while True:
            try:
                os.rename(temporary, path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            with suppress(FileNotFoundError):
                os.rename(path, old)
            shutil.rmtree(old, ignore_errors=True)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_places(aside: Sequence[Path], places: Sequence[Path]) -> None:
    """Files that are one thing take their names. The first stands for all: until all are there, it is not."""
    for file in aside:
        _sync(file)
    places[0].unlink(missing_ok=True)
    for file, place in reversed(list(zip(aside, places, strict=True))):
        os.replace(file, place)
    _sync(places[0].parent)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with written_aside(path) as temporary:
        temporary.write_bytes(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """`content` as indented JSON."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


@contextmanager
def locked(path: Path, *, held: Path | None = None, option: str = "--out") -> Iterator[None]:
    """Hold the lock file `path`, which may lie in a folder that its holder removes at the end.

    The system gives a lock up with the process that holds it, however that ends.

    Args:
        path: the lock file.
        held: what it stands for; None is the folder around the lock's own.
        option: with which the user names another.

    Raises:
        InputError: another process holds it.
    """
    descriptor = None
    try:
        while descriptor is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(path, held or path.parent.parent, option)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path, held: Path, option: str) -> int | None:
    """The lock's descriptor, or None where the one who had it removed the file meanwhile: try again."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            "another run is at work in this folder",
            file=held,
            fix=f"Wait for it, or choose another {option}",
        ) from error
    except FileNotFoundError:
        pass
    except OSError:  # a file system without locks: as safe as it was before there were any
        return descriptor
    os.close(descriptor)
    return None


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, whole or not at all."""
    with written_aside(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


def make_folder(path: Path) -> Path:
    """Create `path` and check that files can be written into it.

    Raises:
        InputError: it cannot be created or written.
    """
    probe = path / f".write-test-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            "cannot write into this folder",
            file=path,
            got=error.strerror,
            fix="Give another with --out or --workspace",
        ) from error
    return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
