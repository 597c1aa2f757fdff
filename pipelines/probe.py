"""What `pipelines.preflight` has every node do.

Apart from it, as its actors import this: no torch, or each would take seconds to start.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from cluster.preflight import Facts, Probe
from nafnet_core import NAFNetError
from pipelines.shard_cache import cache_folder
from pipelines.storage import LocalFolder, RemoteFolder, folder
from pipelines.store import read_manifest

CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_STORAGE_ACCOUNT_KEY",
)


class StageProbe(Probe):
    """What stages will do on a node; each returns MB/s, or in words what went wrong."""

    def look(self, *, gpus: int, object_store_bytes: float, works: bool) -> Facts:
        """The facts of this node, as far as they matter to us."""
        # Where Ray spills, and where shards are cached.
        folders = ("/tmp/ray", str(cache_folder())) if works else ("/tmp/ray",)
        return self.facts(
            gpus=gpus, object_store_bytes=object_store_bytes, variables=CREDENTIALS, folders=folders
        )

    def write(self, storage: LocalFolder | RemoteFolder, name: str, size: int) -> float | str:
        """Write a file into the run's storage."""
        if isinstance(storage, LocalFolder) and not storage.path.is_dir():
            return "there is no such folder"
        return _rate(size, lambda: storage.write(name, os.urandom(size)))

    def read_back(self, storage: LocalFolder | RemoteFolder, name: str, size: int) -> float | str:
        """Read what another node has written."""
        if storage.size(name) is None:
            return "does not see what another node wrote there"
        return _rate(size, lambda: storage.read(name))

    def read_store(self, place: str, number: int, size: int) -> float | str:
        """Read the manifest, and the beginning of one shard."""
        try:
            shards = read_manifest(place).shards
            shard = shards[number % len(shards)] if shards else None
        except (OSError, NAFNetError) as error:
            return str(error)
        if shard is None:
            return 0.0
        source, count = folder(place), min(size, shard.bytes)

        def read() -> None:
            if isinstance(source, RemoteFolder):
                source.read(shard.file, 0, count)
            else:
                with (source.path / shard.file).open("rb") as file:
                    file.read(count)

        return _rate(count, read)

    def reaches(self, host: str, port: int) -> str | None:
        """What is wrong with a connection to a server."""
        try:
            socket.create_connection((host, port), timeout=10).close()
        except OSError as error:
            return error.strerror or str(error)
        return None


def _rate(size: int, action: Callable[[], object]) -> float | str:
    started = time.perf_counter()
    try:
        action()
    except (OSError, NAFNetError) as error:
        return str(error)
    return size / 1e6 / max(time.perf_counter() - started, 1e-9)
