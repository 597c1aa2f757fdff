"""Sequences of millions of values in some ten bytes each, and sorting and matching them.

Values lie in blocks, pickled and compressed: what repeats from pair to pair, such as folders, costs nothing.
Those of a block are made again when they are asked for; the blocks used last are kept as they are.
"""

from __future__ import annotations

import heapq
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby, islice
from operator import index as as_index
from operator import itemgetter
from typing import Any, TypeVar, overload

_T = TypeVar("_T")
_Left = TypeVar("_Left")
_Right = TypeVar("_Right")
_BLOCK = 256
_BLOCKS_AT_HAND = 64  # with pairs some 12 MB; a binary search of millions touches a dozen
_RUN = 2**15  # values that are sorted in memory at a time
_LEVEL = 1  # of zlib; higher ones save little and cost twice the time


class Packed(Sequence[_T]):
    """A sequence that grows at its end. Its values are pickled, so they should not be changed."""

    def __init__(self, values: Iterable[_T] = ()) -> None:
        self._blocks: list[bytes] = []
        self._rest: list[_T] = []  # of the block to come
        self.extend(values)

    def append(self, value: _T) -> None:
        """Take one more."""
        self._rest.append(value)
        if len(self._rest) == _BLOCK:
            self._blocks.append(zlib.compress(pickle.dumps(self._rest, pickle.HIGHEST_PROTOCOL), _LEVEL))
            self._rest = []

    def extend(self, values: Iterable[_T]) -> None:
        """Take these as well."""
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return _BLOCK * len(self._blocks) + len(self._rest)

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> list[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | list[_T]:
        """A value, or a plain list of some."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = as_index(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(index)
        number, place = divmod(place, _BLOCK)
        return self._block(number)[place]

    def __iter__(self) -> Iterator[_T]:
        for number in range(len(self._blocks)):
            yield from self._block(number)
        yield from self._rest

    def _block(self, number: int) -> list[_T]:
        return _unpacked(self._blocks[number]) if number < len(self._blocks) else self._rest


@lru_cache(_BLOCKS_AT_HAND)
def _unpacked(block: bytes) -> list[Any]:
    return pickle.loads(zlib.decompress(block))  # of this process's own making


def in_order(values: Iterable[_T], key: Callable[[_T], Any] | None = None) -> Iterator[_T]:
    """Sorted as `sorted` does it, equal ones in the order in which they came; all are taken at once."""
    runs: list[Packed[_T]] = []
    values = iter(values)
    while run := sorted(islice(values, _RUN), key=key):  # type: ignore[type-var]
        runs.append(Packed(run))
    return heapq.merge(*runs, key=key)  # type: ignore[type-var]


def matched(
    left: Iterable[tuple[str, _Left]], right: Iterable[tuple[str, _Right]]
) -> Iterator[tuple[str, list[_Left], list[_Right]]]:
    """Each name that comes on either side, sorted, with what there is under it on both, in order."""
    by_name = itemgetter(0)
    sides = [in_order(((name, side, value) for name, value in values), by_name)
             for side, values in enumerate((left, right))]  # fmt: skip
    for name, rows in groupby(heapq.merge(*sides, key=by_name), by_name):
        values: tuple[list[Any], list[Any]] = [], []
        for _, side, value in rows:
            values[side].append(value)
        yield name, *values
