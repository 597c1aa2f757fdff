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
    sharp = same_content(_Images(refs, _sharp_of, range(len(refs))))
    if len(refs) and refs[0].lq is not None:  # else all but one of them are refused
        _warn_of_shared_sharp(refs, sharp)
    alike, group = _repeated(np.arange(len(refs)), sharp)
    del sharp
    first = alike[_first_alike(group, same_content(_Images(refs, _blurred_of, alike)))]
    twice = first != alike
    return {
        refs[index].key: refs[before].key for index, before in zip(alike[twice], first[twice], strict=True)
    }


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
    _warn_of_shared_sharp(refs, same_content(_Images(refs, _sharp_of, range(len(refs)))))


def _warn_of_shared_sharp(refs: Sequence[PairRef], sharp: NDArray[np.int64]) -> None:
    later, num_shared = None, 0
    for index in np.flatnonzero(sharp != np.arange(len(sharp))):
        if refs[index].scene != refs[sharp[index]].scene:
            num_shared += 1
            later = index if later is None else later
    if later is not None:
        later, first = refs[later], refs[sharp[later]]
        log.warning(
            "%d sharp images belong to several scenes, which a split by scene (--holdout) would not keep "
            "apart; the first: %s of scene %r is %s of scene %r. Give them one scene",
            num_shared, later.gt, later.scene, first.gt, first.scene,
        )  # fmt: skip


class _Images(Sequence[Image]):
    """An image of each of the pairs at some places, looked up when it is asked for."""

    def __init__(
        self, refs: Sequence[PairRef], image_of: Callable[[PairRef], Image], places: Sequence[int]
    ) -> None:
        self._refs, self._image_of, self._places = refs, image_of, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Image:
        return self._image_of(self._refs[self._places[index]])


def _sharp_of(ref: PairRef) -> Image:
    return ref.gt


def _blurred_of(ref: PairRef) -> Image:
    return ref.lq or ref.gt


def same_content(images: Sequence[Image]) -> NDArray[np.int64]:
    """For each image the place of the first one with the same bytes, its own where there is none before.

    Files that are missing or empty equal nothing. What is kept of an image is a few numbers, some 80 bytes.
    """
    first = np.arange(len(images))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        size, device, inode = _of_each(pool, _facts, images, first)
        # Hard links are one file: looked at once. No inode number: a file system that has none.
        named = np.flatnonzero((size > 0) & (inode > 0))
        first[named] = named[_first_alike(device[named], inode[named])]
        alike = np.flatnonzero((first == np.arange(len(images))) & (size > 0))
        alike, group = _repeated(alike, size[alike])
        del size, device, inode, named
        for read in (_sample, _digest):
            alike, group = _repeated(alike, group, *_of_each(pool, read, images, alike))
    first[alike] = alike[_first_alike(group)]
    return first[first]  # a link to a file that equals another


def _of_each(
    pool: ThreadPoolExecutor,
    numbers_of: Callable[[Image], tuple[int, int, int]],
    images: Sequence[Image],
    indices: NDArray[np.int64],
) -> NDArray[np.int64]:
    """(3, N) of those at `indices`; in runs, since a task costs more than a `stat`, some at a time."""
    found = np.empty((3, len(indices)), np.int64)
    length = max(1, min(250, len(indices) // (4 * _NUM_THREADS)))
    window = 4 * _NUM_THREADS * length
    for begin in range(0, len(indices), window):
        # Looked up by this thread alone, in order: a pair costs little beside its neighbours.
        ours = [images[index] for index in indices[begin : begin + window]]
        runs = [ours[start : start + length] for start in range(0, len(ours), length)]
        numbers = pool.map(lambda run: np.array([numbers_of(image) for image in run], np.int64), runs)
        found[:, begin : begin + window] = np.concatenate(list(numbers)).T
    return found


def _first_alike(*columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the place of the first one that is the same. By sorting places: rows are not copied."""
    order = np.lexsort(columns)
    is_new = np.zeros(len(order), bool)
    is_new[:1] = True
    for column in columns:
        ordered = column[order]
        is_new[1:] |= ordered[1:] != ordered[:-1]
    first = np.empty_like(order)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def _repeated(
    indices: NDArray[np.int64], *columns: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those `indices` of which the row comes more than once, each with a number of its group."""
    first = _first_alike(*columns)
    is_repeated = np.bincount(first, minlength=len(first))[first] > 1
    return indices[is_repeated], first[is_repeated]


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
