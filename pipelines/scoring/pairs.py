"""Pairs to score, read here or on another node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nafnet_core import InputError
from pipelines import nodes
from pipelines.shards import Pair
from pipelines.sources import PairRef, find_source, place, two_sides
from pipelines.store import PairStore, is_store, opened_store, refuse_sharp_only
from pipelines.urls import absolute, is_url, local_path, public

_MAKE_PAIRS = "Make pairs of the photos with `nafnet synth`, and prepare these with --crop 0 --split test"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPlace:
    """Where one pair is, so that a worker on any node can read it."""

    index: int
    store: str | None = field(default=None, repr=False)
    """Folder or URL, which may hold credentials; None of pairs in folders."""
    digest: str | None = None
    """The store's."""
    ref: PairRef | None = None

    def read(self) -> Pair:
        """The pair.

        Raises:
            InputError: it is unreadable, its images differ in size, or this node sees other folders than
                the driver.
        """
        if self.ref is not None:
            nodes.check_pairs([self.ref])
            lq, gt = self.ref.read()
            return Pair(key=self.ref.key, scene=self.ref.scene, lq=lq, gt=gt)
        assert self.store is not None and self.digest is not None
        nodes.check_store(self.store, self.digest)
        return opened_store(self.store).pair(self.index)


class Pairs:
    """Pairs to score: a PairStore, a folder of pairs, or two folders."""

    def __init__(self, first: Path | str, second: Path | str | None = None) -> None:
        """Open `first` as a store or a folder of pairs, or `first` and `second` as blurred and sharp folders.

        Raises:
            InputError: no store and no pairs, a store of sharp photos alone, or folders that do not match.
        """
        self.label = public(local_path(first))
        first = _anywhere(first)
        self._store: PairStore | None = None
        self._refs: Sequence[PairRef] = []
        if second is not None:
            self.label = f"{self.label} and {public(local_path(second))}"
            self._refs = two_sides(place(first), place(_anywhere(second))).pairs()
        elif is_store(first) or not place(first).is_dir():
            self._store = PairStore(first)
            refuse_sharp_only(first, self._store.manifest, fix=_MAKE_PAIRS)
        else:
            self._refs = find_source(place(first), split="test").pairs()
        if not len(self):
            raise InputError("no pairs to score", file=self.label)

    def __len__(self) -> int:
        return len(self._refs) if self._store is None else len(self._store)

    def __iter__(self) -> Iterator[Pair]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> Pair:
        if self._store is not None:
            return self._store.pair(index)
        ref = self._refs[index]
        lq, gt = ref.read()
        return Pair(key=ref.key, scene=ref.scene, lq=lq, gt=gt)

    def place_of(self, index: int) -> PairPlace:
        """Where a pair is, to be read by a worker."""
        if self._store is not None:
            return PairPlace(index=index, store=str(self._store.root), digest=self._store.digest)
        return PairPlace(index=index, ref=self._refs[index])

    @property
    def digest(self) -> str | None:
        """Known beforehand of a store only; of folders it comes with reading them."""
        return None if self._store is None else self._store.digest


def _anywhere(given: Path | str) -> str:
    """A place that means the same in a worker, whose current folder is another."""
    given = local_path(given)
    return str(given) if is_url(given) else absolute(given)
