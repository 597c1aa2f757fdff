"""One thread that owns the network, and a queue before it: equal tiles of several requests share a batch.

    network = NetworkThread(served)
    future = network.submit(rgb_hwc)       # a `concurrent.futures.Future` of `Answer`
    network.swap(other)                    # between two images; none is lost

A request never waits for a fuller batch: when the queue is empty, what there is is run.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from pipelines.restorer import Restoration, Restorer

log = logging.getLogger(__name__)

_PAUSE_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model that answers requests."""

    restorer: Restorer
    label: str
    version: str | None
    """In the registry; None where it is a file or a run."""
    digest: str
    """SHA-256 of the weights, in torch as in another runtime."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A restored image, and by which model."""

    restoration: Restoration
    served: Served
    queue_s: float
    """From `submit` to the network."""
    network_s: float
    """In the network and around it, the wait for others of its batch included."""


@dataclass(eq=False, slots=True)
class _Job:
    image: NDArray[Any]
    future: Future[Answer] = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0


class NetworkThread:
    """Runs images through the model that is current when their turn comes."""

    def __init__(self, served: Served, *, on_batch: Callable[[], None] = lambda: None) -> None:
        self._served, self._on_batch = served, on_batch
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._fed: deque[_Job] = deque()
        self._is_closing = self._has_come = False
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    @property
    def served(self) -> Served:
        """The model that the next image gets."""
        return self._served

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Images before the network."""
        return self._queue.qsize()

    def submit(self, image: NDArray[Any]) -> Future[Answer]:
        """Put an image in the queue: (H, W, 3) RGB, uint8 or uint16, full range.

        Cancelled before its turn, it is not run.
        """
        job = _Job(image)
        self._queue.put(job)
        return job.future

    def swap(self, served: Served) -> None:
        """Let another model answer from the next image on."""
        self._served = served
        self._queue.put(None)  # so that the old one is let go though nobody asks

    def close(self) -> None:
        """End after what is queued."""
        self._is_closing = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not (self._is_closing and self._queue.empty()):
            served = self._served
            try:
                for restoration in served.restorer.stream(self._feed(served)):
                    self._deliver(self._fed.popleft(), served, restoration)
            except Exception:
                log.exception("the network failed with %d images", len(self._fed))
                if not self._fed:
                    time.sleep(_PAUSE_S)  # not for an image's sake: it will again
                self._one_by_one(served)

    def _feed(self, served: Served) -> Iterator[NDArray[Any] | None]:
        """Images for one model, until there is another one."""
        while served is self._served:
            if self._fed and self._queue.empty():
                yield None  # nobody comes: run what waits for a fuller batch
            job = self._queue.get()
            if job is None:
                if self._is_closing and self._queue.empty():
                    return
                continue
            if not job.future.set_running_or_notify_cancel():
                continue
            job.started, self._has_come = time.perf_counter(), True
            self._fed.append(job)
            yield job.image

    def _deliver(self, job: _Job, served: Served, restoration: Restoration) -> None:
        if self._has_come:  # since the last one, so this is the first of what was run with it
            self._has_come = False
            self._on_batch()
        answer = Answer(
            restoration=restoration,
            served=served,
            queue_s=job.started - job.submitted,
            network_s=time.perf_counter() - job.started,
        )
        job.future.set_result(answer)

    def _one_by_one(self, served: Served) -> None:
        """Run again those that were under way: the others shall not suffer from the one that failed."""
        while self._fed:
            job = self._fed.popleft()
            try:
                (restoration,) = served.restorer.stream([job.image])
            except Exception as error:
                job.future.set_exception(error)
            else:
                self._deliver(job, served, restoration)
