"""Images that come twice, found by content before anything is decoded.

Sizes first, then 4 KiB out of the middle, and the whole content only of what is still alike: pairs of a data
set without duplicates are hardly read at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.sources import PairRef
from pipelines.sources.base import EncodedImage

log = logging.getLogger(__name__)

Image = Path | EncodedImage
_T = TypeVar("_T")
_NUM_THREADS = 16  # they wait for the disk or the network
_SAMPLE_BYTES, _BLOCK_BYTES = 4096, 2**20


def find_duplicates(refs: Sequence[PairRef]) -> dict[str, str]:
    """Pairs of which both images equal, byte for byte, those of a pair before them.

    Several blurred variants of one sharp image are none. Sharp images of several scenes are warned of.

    Returns:
        The key of each later pair, with the key of the first.
    """
    sharp = same_content([ref.gt for ref in refs])
    _warn_of_shared_sharp(refs, sharp)
    _, inverse, counts = np.unique(sharp, return_inverse=True, return_counts=True)
    alike = np.flatnonzero(counts[inverse] > 1)
    blurred = same_content([refs[index].lq for index in alike])
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
        raise InputError(
            f"both images are byte for byte those of pair {duplicates[ref.key]!r}",
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

    Files that are missing or empty equal nothing.
    """
    first = np.arange(len(images))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        facts = _each(pool, lambda index: _facts(images[index]), range(len(images)))
        # Hard links are one file: looked at once.
        files: dict[Any, int] = {}
        for index, (_, file) in enumerate(facts):
            if file is not None:
                first[index] = files.setdefault(file, index)
        own = [i for i in range(len(images)) if first[i] == i and facts[i][0] > 0]
        groups = _grouped(own, (facts[index][0] for index in own))
        for read in (_sample, _digest):
            alike = [index for group in groups for index in group]
            keys = _each(pool, lambda index, read=read: (facts[index][0], read(images[index])), alike)
            groups = _grouped(alike, keys)
    for group in groups:
        first[group] = group[0]
    return first[first]  # a link to a file that equals another


def _each(pool: ThreadPoolExecutor, function: Callable[[int], _T], indices: Sequence[int]) -> list[_T]:
    """`function` of each, in order; in runs, since a task costs more than a `stat`."""
    length = max(1, min(1000, len(indices) // (4 * _NUM_THREADS)))
    runs = [indices[start : start + length] for start in range(0, len(indices), length)]
    return [value for values in pool.map(lambda run: [function(i) for i in run], runs) for value in values]


def _grouped(indices: Sequence[int], keys: Iterable[Any]) -> list[list[int]]:
    """Those of equal keys, where there are two or more, each group in order."""
    groups: dict[Any, list[int]] = {}
    for index, key in zip(indices, keys, strict=True):
        groups.setdefault(key, []).append(index)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def _facts(image: Image) -> tuple[int, tuple[int, int] | None]:
    """Size in bytes, -1 where it cannot be told, and what names the file behind several links."""
    if not isinstance(image, Path):
        return image.size_bytes(), None
    try:
        status = os.stat(image)
    except OSError:
        return -1, None
    # No inode number: a file system that has none.
    return status.st_size, (status.st_dev, status.st_ino) if status.st_size and status.st_ino else None


def _sample(image: Image) -> bytes:
    return _read(image, max(0, _facts(image)[0] // 2 - _SAMPLE_BYTES // 2), _SAMPLE_BYTES)


def _digest(image: Image) -> bytes:
    state = hashlib.sha256()
    start = 0
    while block := _read(image, start, _BLOCK_BYTES):
        state.update(block)
        start += len(block)
    return state.digest()


def _read(image: Image, start: int, count: int) -> bytes:
    if not isinstance(image, Path):
        return image.read_bytes(start, count)
    try:
        with image.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:  # whoever decodes it says more; two that fail alike are not the same
        return f"{image}: {error}".encode() if start == 0 else b""
