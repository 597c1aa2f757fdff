"""Shards at hand: remote ones fetched whole into a bounded folder, all of them checked once.

A shard's name in the cache is its SHA-256, so that stores share it, and what lies there is never out of date.
Processes of one node share the folder: a lock a shard has it fetched, or checked, once.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nafnet_core import InputError
from pipelines.files import sha256
from pipelines.storage import RemoteFolder

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "NAFNET_CACHE"
DEFAULT_CACHE_GIB = 64.0
_GIB = 2**30
_PART = ".part"


class DamagedShardError(ValueError):
    """Its content is not what the manifest says."""


class ShardCache:
    """The cache of this node."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        (folder / "checked").mkdir(parents=True, exist_ok=True)

    def checked(self, path: Path, *, size: int, digest: str) -> Path:
        """A local shard, its SHA-256 compared once for each state of the file.

        Raises:
            FileNotFoundError, DamagedShardError.
        """
        state = path.stat()
        if state.st_size != size:
            raise DamagedShardError(f"{state.st_size} bytes instead of {size}")
        identity = f"{path.absolute()} {state.st_ino} {state.st_mtime_ns} {size} {digest}"
        note = self._folder / "checked" / hashlib.sha256(identity.encode()).hexdigest()
        if note.exists():
            return path
        with self._lock(note.name):
            if not note.exists():
                if (got := sha256(path)) != digest:
                    raise DamagedShardError(f"SHA-256 {got[:12]}… instead of {digest[:12]}…")
                note.touch()
        return path

    def fetched(self, source: RemoteFolder, name: str, *, size: int, digest: str) -> Path:
        """A remote shard, in the cache.

        Raises:
            FileNotFoundError, DamagedShardError, CapabilityError: it does not come.
        """
        path = self._folder / f"{digest}{Path(name).suffix}"
        with self._lock(path.name):
            if not path.exists():
                part = self._folder / f"{digest}{_PART}"
                for left in self._folder.glob(f"*{part.name}*"):  # by a process that was killed
                    left.unlink(missing_ok=True)
                self._make_room(size)
                # Once more, if it was damaged on the way.
                for got in (source.fetch(name, part) for _ in range(2)):
                    if got == digest:
                        part.replace(path)
                        break
                    part.unlink()
                    log.warning("%s came with another SHA-256", source.at(name))
                else:
                    raise DamagedShardError(f"SHA-256 {got[:12]}… instead of {digest[:12]}…")
        os.utime(path)
        return path

    def _make_room(self, size: int) -> None:
        """Remove the shards that nobody took for the longest time. Those still open stay readable."""
        shards = [path for path in self._folder.iterdir() if path.suffix in (".lmdb", ".parquet")]
        states = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in shards if path.exists())
        total = sum(bytes_ for _, bytes_, _ in states)
        for _, bytes_, path in states:
            if total + size <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= bytes_

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self._folder / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def cache_folder() -> Path:
    """Where this node's cache is, or will be: what `NAFNET_CACHE` names, else `~/.cache/nafnet/shards`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(base) / "nafnet" / "shards")


def node_cache(max_gib: float = DEFAULT_CACHE_GIB) -> ShardCache:
    """The cache of this node.

    Raises:
        InputError: the folder cannot be made.
    """
    folder = cache_folder()
    try:
        return ShardCache(folder, int(max_gib * _GIB))
    except OSError as error:
        raise InputError(
            "the cache of shards cannot be made",
            file=folder,
            got=error.strerror,
            fix=f"Name another folder with {FOLDER_VARIABLE}",
        ) from error
