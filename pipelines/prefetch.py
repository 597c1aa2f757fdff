"""Shards of remote stores are fetched before the samples in them come up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from nafnet_core import NAFNetError
from pipelines.plan import SamplePlan
from pipelines.storage import is_url
from pipelines.store import PairStore

log = logging.getLogger(__name__)

_NUM_FETCHES = 4  # at a time: one alone rarely fills a connection to an object store
_CHUNK_SAMPLES = 4096


class Prefetcher:
    """Walks through the plan ahead of a reader, on a thread of its own.

    All samples of a window of shuffling may come next, so it stays one window ahead: the cache must hold two.
    """

    def __init__(self, plan: SamplePlan, stores: Sequence[PairStore], *, first: int, stop: int) -> None:
        """For samples `first` to `stop`. Does nothing where no store is remote."""
        self._plan, self._first, self._stop = plan, first, stop
        self._remote = {number: store for number, store in enumerate(stores) if is_url(str(store.root))}
        self._position, self._moved = first, threading.Condition()
        self._requested: set[tuple[int, int]] = set()
        if self._remote:
            threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def advance(self, sample: int) -> None:
        """The reader has come to this sample."""
        with self._moved:
            self._position = sample
            self._moved.notify_all()

    def _run(self) -> None:
        with ThreadPoolExecutor(_NUM_FETCHES) as pool:
            pending: set[Future[None]] = set()
            for start in range(self._first, self._stop, _CHUNK_SAMPLES):
                with self._moved:
                    self._moved.wait_for(lambda s=start: s < self._position + self._plan.window_pairs)
                numbers = np.arange(start, min(start + _CHUNK_SAMPLES, self._stop))
                for shard in self._shards_of(numbers):
                    pending.add(pool.submit(self._fetch, *shard))

    def _shards_of(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """Shards that these samples are the first to need, in their order."""
        planned = self._plan.samples(numbers)
        found: list[tuple[int, int]] = []
        for number, store in self._remote.items():
            shards = store.shards_of(planned.pair[planned.store == number])
            found += [(number, shard) for shard in shards if (number, shard) not in self._requested]
        if len(self._requested) > 2 * self._plan.window_pairs:
            self._requested.clear()  # an epoch comes back to them
        self._requested.update(found)
        return found

    def _fetch(self, store: int, shard: int) -> None:
        try:
            self._remote[store].at_hand(shard)
        except NAFNetError as error:
            # The reader meets the same fault, and has somebody to tell.
            log.warning("not fetched ahead: %s", error)
