"""Shards of remote stores are fetched before the samples in them come up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

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
        if self._remote:
            threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def advance(self, sample: int) -> None:
        """The reader has come to this sample."""
        with self._moved:
            self._position = sample
            self._moved.notify_all()

    def _run(self) -> None:
        window = self._plan.window_pairs
        # Of a small window only a part at a time, or its shards push one another out of the cache.
        chunk = max(1, min(_CHUNK_SAMPLES, window // 4))
        with ThreadPoolExecutor(_NUM_FETCHES) as pool:
            for start in range(self._first, self._stop, chunk):
                with self._moved:
                    self._moved.wait_for(lambda s=start: s < self._position + window)
                for shard in self._shards_of(np.arange(start, min(start + chunk, self._stop))):
                    pool.submit(self._fetch, *shard)

    def _shards_of(self, numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Shards that these samples need, in their order.

        Those at hand are asked for as well: the cache then knows that they are in use.
        """
        planned = self._plan.samples(numbers)
        return [
            (number, shard)
            for number, store in self._remote.items()
            for shard in store.shards_of(planned.pair[planned.store == number])
        ]

    def _fetch(self, store: int, shard: int) -> None:
        try:
            self._remote[store].at_hand(shard)
        except NAFNetError as error:
            # The reader meets the same fault, and has somebody to tell.
            log.warning("not fetched ahead: %s", error)
