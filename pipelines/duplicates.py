"""Images that come twice, found by content before anything is decoded.

Sizes first, then 4 KiB out of the middle, and the whole content only of what is still alike: pairs of a data
set without duplicates are hardly read at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.sources import PairRef
from pipelines.sources.base import EncodedImage

log = logging.getLogger(__name__)

Image = Path | EncodedImage
_NUM_THREADS = 16  # they wait for the disk or the network
_63_BITS = 2**63 - 1
_SAMPLE_BYTES, _BLOCK_BYTES = 4096, 2**20


def find_duplicates(refs: Sequence[PairRef]) -> dict[str, str]:
    """Pairs of which all images equal, byte for byte, those of a pair before them.

    Several blurred variants of one sharp image are none. Sharp images of several scenes are warned of.

    Returns:
        The key of each later pair, with the key of the first.
    """
    sharp = same_content([ref.gt for ref in refs])
    if any(ref.lq is not None for ref in refs):  # else all but one of them are refused
        _warn_of_shared_sharp(refs, sharp)
    _, inverse, counts = np.unique(sharp, return_inverse=True, return_counts=True)
    alike = np.flatnonzero(counts[inverse] > 1)
    blurred = same_content([refs[index].lq or refs[index].gt for index in alike])
    firsts: dict[tuple[int, int], int] = {}
    found = {}
    for index, content in zip(alike.tolist(), blurred.tolist(), strict=True):
        first = firsts.setdefault((int(sharp[index]), content), index)
        if first != index:
            found[refs[index].key] = refs[first].key
    return found


def refuse_duplicate(ref: PairRef, duplicates: Mapping[str, str]) -> None:
    """Raise `InputError` where the pair is among `duplicates`."""
    if ref.key in duplicates:
        first = duplicates[ref.key]
        if ref.lq is None:
            raise InputError(
                f"byte for byte the photo {first!r}", file=str(ref.gt), fix="Remove one of the two"
            )
        raise InputError(
            f"both images are byte for byte those of pair {first!r}",
            file=str(ref.lq),
            fix="Remove one of the two pairs",
        )


def warn_of_shared_sharp(refs: Sequence[PairRef]) -> None:
    """Log a warning where one sharp image belongs to several scenes: a split by scene would not part them."""
    _warn_of_shared_sharp(refs, same_content([ref.gt for ref in refs]))


def _warn_of_shared_sharp(refs: Sequence[PairRef], sharp: NDArray[np.int64]) -> None:
    changed = np.flatnonzero(sharp != np.arange(len(sharp))).tolist()
    others = [index for index in changed if refs[index].scene != refs[int(sharp[index])].scene]
    if others:
        later, first = refs[others[0]], refs[int(sharp[others[0]])]
        log.warning(
            "%d sharp images belong to several scenes, which a split by scene (--holdout) would not keep "
            "apart; the first: %s of scene %r is %s of scene %r. Give them one scene",
            len(others), later.gt, later.scene, first.gt, first.scene,
        )  # fmt: skip


def same_content(images: Sequence[Image]) -> NDArray[np.int64]:
    """For each image the place of the first one with the same bytes, its own where there is none before.

    Files that are missing or empty equal nothing. What is kept of an image is a few numbers.
    """
    first = np.arange(len(images))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        facts = _of_each(pool, _facts, images, first)
        size, device, inode = facts.T
        # Hard links are one file: looked at once. No inode number: a file system that has none.
        named = np.flatnonzero((size > 0) & (inode > 0))
        first[named] = named[_first_alike(np.stack([device[named], inode[named]], axis=1))]
        alike = np.flatnonzero((first == np.arange(len(images))) & (size > 0))
        alike, group = _repeated(alike, size[alike, None])
        for read in (_sample, _digest):
            content = _of_each(pool, read, images, alike)
            alike, group = _repeated(alike, np.column_stack([group, content]))
    first[alike] = alike[_first_alike(group[:, None])]
    return first[first]  # a link to a file that equals another


def _of_each(
    pool: ThreadPoolExecutor,
    numbers_of: Callable[[Image], tuple[int, ...]],
    images: Sequence[Image],
    indices: NDArray[np.int64],
) -> NDArray[np.int64]:
    """(N, K) of those at `indices`; in runs, since a task costs more than a `stat`."""
    length = max(1, min(1000, len(indices) // (4 * _NUM_THREADS)))
    runs = [indices[start : start + length] for start in range(0, len(indices), length)]
    found = pool.map(lambda run: np.array([numbers_of(images[i]) for i in run], np.int64), runs)
    return np.concatenate([np.empty((0, 3), np.int64), *found])


def _first_alike(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the place of the first one that is the same."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _repeated(
    indices: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those `indices` of which the row comes more than once, each with a number of its group."""
    _, inverse, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    is_repeated = counts[inverse] > 1
    return indices[is_repeated], inverse[is_repeated]


def _facts(image: Image) -> tuple[int, int, int]:
    """Size in bytes, -1 where there is none; device and inode, which name the file behind several links."""
    if not isinstance(image, Path):
        return image.size_bytes(), 0, 0
    try:
        status = os.stat(image)
    except OSError:
        return -1, 0, 0
    return status.st_size, status.st_dev & _63_BITS, status.st_ino & _63_BITS


def _sample(image: Image) -> tuple[int, int, int]:
    start = max(0, _facts(image)[0] // 2 - _SAMPLE_BYTES // 2)
    return _numbers(hashlib.sha256(_read(image, start, _SAMPLE_BYTES)))


def _digest(image: Image) -> tuple[int, int, int]:
    state = hashlib.sha256()
    start = 0
    while block := _read(image, start, _BLOCK_BYTES):
        state.update(block)
        start += len(block)
    return _numbers(state)


def _numbers(state: hashlib._Hash) -> tuple[int, int, int]:
    """192 bits of a digest."""
    return struct.unpack("<qqq", state.digest()[:24])


def _read(image: Image, start: int, count: int) -> bytes:
    if not isinstance(image, Path):
        return image.read_bytes(start, count)
    try:
        with image.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:  # whoever decodes it says more; two that fail alike are not the same
        return f"{image}: {error}".encode() if start == 0 else b""
