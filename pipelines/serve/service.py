"""A replica's work: from the bytes of an upload to the bytes of an answer, within its limits.

Images are decoded only a little ahead of the network, so that a full queue holds uploads, not pixels.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import cv2
import torch

from pipelines.serve import coding
from pipelines.serve.batching import Answer, NetworkThread
from pipelines.serve.bodies import too_large
from pipelines.serve.champion import Follower, open_aside
from pipelines.serve.metrics import Metrics
from pipelines.serve.options import Options
from pipelines.serve.refusals import Refusal
from pipelines.serve.settings import ServeSettings

_Value = TypeVar("_Value")

_CODING_THREADS = 2
_DECODED_AHEAD = 3  # one being decoded, one waiting, one being encoded, beside a batch in the network
_FIRST_GUESS_S, _SMOOTHING = 1.0, 0.2
_MAX_RETRY_S = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """An answer, and how it came about."""

    download: coding.Download
    answer: Answer
    queue_s: float


@dataclass(slots=True)
class Place:
    """A request that was let in."""

    num_bytes: int = 0
    """Of its upload, so far."""


class Service:
    """One model behind one queue, in the process that serves. Its methods are called on one event loop."""

    def __init__(self, settings: ServeSettings, *, replica: str = "0") -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        cv2.setNumThreads(1)
        self.settings, self.metrics = settings, Metrics(replica)
        served = open_aside(settings)
        self.network = NetworkThread(served, on_batch=self.metrics.batch)
        self.follower = Follower(
            settings,
            served,
            hand_over=self._take,
            on_refused=lambda: self.metrics.champion(is_refused=True),
        )
        self._pool = ThreadPoolExecutor(_CODING_THREADS, thread_name_prefix="coding")
        self._slots = asyncio.Semaphore(_DECODED_AHEAD + served.restorer.settings.tile_batch)
        self._num_open = self._bytes_held = 0
        self._usual_s = _FIRST_GUESS_S

    @property
    def num_open(self) -> int:
        """Requests that were let in and are not answered."""
        return self._num_open

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """A place in the queue, for as long as a request is worked on.

        Raises:
            Refusal: 429, there is none.
        """
        if self._num_open >= self.settings.max_queue:
            raise self._come_back(f"{self._num_open} requests in the queue")
        self._num_open += 1
        place = Place()
        try:
            yield place
        finally:
            self._num_open -= 1
            self._bytes_held -= place.num_bytes

    async def read(self, chunks: AsyncIterator[bytes], place: Place) -> bytearray:
        """Read an upload, within its own limit and that of all that are held.

        Raises:
            Refusal: 408, too slow; 413, too large; 429, too much at a time.
        """
        try:
            return await asyncio.wait_for(self._read(chunks, place), self.settings.timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            limit_s = self.settings.timeout_s
            raise Refusal(
                408, "the upload took too long", expected=f"all of it within {limit_s:g} s"
            ) from None

    async def _read(self, chunks: AsyncIterator[bytes], place: Place) -> bytearray:
        body, limit = bytearray(), self.settings.max_bytes
        async for chunk in chunks:
            if len(body) + len(chunk) > limit:
                raise too_large(limit)
            if self._bytes_held + len(chunk) > self.settings.max_bytes_held:
                raise self._come_back("other uploads that fill its memory")
            self._bytes_held += len(chunk)
            place.num_bytes += len(chunk)
            body += chunk
        return body

    async def restore(self, content: bytes, options: Options) -> Result:
        """Decode, restore, encode.

        Raises:
            Refusal: 415 or 422, no image to restore; 504, not done in time; 500, the network failed.
        """
        start = time.perf_counter()
        try:
            result = await asyncio.wait_for(self._restored(content, options, start), self.settings.timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise Refusal(
                504,
                "not done in time",
                expected=f"an answer within {self.settings.timeout_s:g} s",
                fix="Send a smaller image, or come back when the queue is shorter",
                headers={"Retry-After": str(self._retry_s())},
            ) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise Refusal(503, "not enough memory for this image", fix="Send a smaller one") from None
        seconds = time.perf_counter() - start
        self._usual_s += _SMOOTHING * (result.answer.network_s - self._usual_s)
        self.metrics.restored(result.answer, result.queue_s, seconds)
        return result

    def metrics_text(self) -> bytes:
        """In Prometheus's format."""
        return self.metrics.text(
            served=self.network.served,
            num_open=self._num_open,
            num_waiting=self.network.num_waiting,
            is_silent=self.follower.silent_because is not None,
        )

    def close(self) -> None:
        self.follower.close()
        self.network.close()
        self._pool.shutdown()

    async def _restored(self, content: bytes, options: Options, start: float) -> Result:
        limit = self.settings.max_megapixels
        kind = await self._on_a_thread(partial(coding.check_header, content, limit))
        async with self._slots:
            upload = await self._on_a_thread(partial(coding.decode, content, kind, options, limit))
            submitted = time.perf_counter()
            answer = await asyncio.wrap_future(self.network.submit(upload.image))
            restored = answer.restoration.image
            download = await self._on_a_thread(partial(coding.encode, upload, restored, options))
        return Result(download=download, answer=answer, queue_s=submitted - start + answer.queue_s)

    async def _on_a_thread(self, work: Callable[[], _Value]) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _take(self, served: Any) -> None:
        self.network.swap(served)
        self.metrics.champion(is_refused=False)

    def _come_back(self, got: str) -> Refusal:
        seconds = self._retry_s()
        return Refusal(
            429,
            "the service is busy",
            expected=f"at most {self.settings.max_queue} requests at a time",
            got=got,
            fix=f"Come back in {seconds} s",
            headers={"Retry-After": str(seconds)},
        )

    def _retry_s(self) -> int:
        """Until about half of the queue is done."""
        return max(1, min(_MAX_RETRY_S, math.ceil(self._usual_s * self._num_open / 2)))
