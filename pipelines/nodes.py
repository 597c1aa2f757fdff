"""Does this node see the folders that the driver sees?

A cluster's nodes need not share a disk. A worker on one that does not would write shards where nobody finds
them, or take every image for missing. Each shard's worker looks first; nodes may join while a job runs.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from pathlib import Path

from nafnet_core import InputError
from pipelines.sources import PairRef
from pipelines.sources.lmdbs import LmdbImage
from pipelines.storage import LocalFolder, RemoteFolder, folder
from pipelines.store import is_store, opened_store

_MARK = "run.txt"
_WAIT_S = 5.0  # network disks may show a new file late


def mark(place: LocalFolder | RemoteFolder, token: str) -> None:
    """Leave a mark in a folder, by which other nodes tell that it is the same one."""
    if isinstance(place, LocalFolder):
        place.write(_MARK, token.encode())


def check_folder(place: LocalFolder | RemoteFolder, token: str) -> None:
    """Raise `InputError` where a folder on this node is not the one that was marked."""
    if not isinstance(place, LocalFolder):
        return
    deadline = time.monotonic() + _WAIT_S
    while not _is_marked(place, token):
        if time.monotonic() > deadline:
            raise InputError(
                "the nodes of this cluster do not share the folder to write",
                file=place.path.parent,
                got=f"another one, or none, on {socket.gethostname()}",
                fix="Choose an --out on storage that all nodes share, or a URL",
            )
        time.sleep(0.2)


def check_pairs(refs: Iterable[PairRef]) -> None:
    """Raise `InputError` where pairs are on a disk, and not one of their folders is on this node."""
    check_images(image for ref in refs for image in (ref.lq, ref.gt) if image is not None)


def check_images(images: Iterable[object]) -> None:
    """Raise `InputError` where images are on a disk, and not one of their folders is on this node."""
    folders = {_folder_of(image) for image in images}
    if folders and None not in folders and not any(folder.is_dir() for folder in folders if folder):
        raise InputError(
            "the nodes of this cluster do not share the folder of the images",
            file=min(str(folder) for folder in folders),
            got=f"none on {socket.gethostname()}",
            fix="Put them on storage that all nodes share, or name a URL",
        )


def check_store(root: str, digest: str) -> None:
    """Raise `InputError` where a store on a disk is not on this node, or is another one there."""
    place = folder(root)
    if isinstance(place, LocalFolder) and not (is_store(root) and opened_store(root).digest == digest):
        raise InputError(
            "the nodes of this cluster do not share the folder of the store",
            file=root,
            got=f"another one, or none, on {socket.gethostname()}",
            fix="Put it on storage that all nodes share, or name a URL",
        )


def _is_marked(place: LocalFolder, token: str) -> bool:
    try:
        return place.read(_MARK) == token.encode()
    except OSError:
        return False


def _folder_of(image: object) -> Path | None:
    if isinstance(image, LmdbImage):
        return image.path
    return image.parent if isinstance(image, Path) else None
