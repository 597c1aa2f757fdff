"""Many jobs at once, results in the order of the jobs: in threads, or as Ray tasks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_threads(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """`function` of each job. Jobs are taken as workers become free, so memory holds a few at a time."""
    num_workers = os.cpu_count() or 1
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(max_workers=num_workers)
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # After Ctrl-C, or when nobody wants the rest: what runs is finished, what waits is not begun.
        pool.shutdown(cancel_futures=True)


def over_ray(function: Callable[..., Result], jobs: Iterable[Job], *shared: Any) -> Iterator[Result]:
    """`function(job, *shared)` of each job as a Ray task; Ray must be connected.

    Tasks and not Ray Data: results come in the order of the jobs, and the frames of a video are handed over
    while it is decoded.
    """
    import ray

    num_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(num_cpus=1, max_retries=3)(_call)
    handle = ray.put((function, shared))
    pending: deque[Any] = deque()
    try:
        for job in jobs:
            pending.append(task.remote(handle, job))
            if len(pending) > 2 * num_workers:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())
    finally:
        for reference in pending:
            ray.cancel(reference)


def _call(work: tuple[Callable[..., Result], tuple[Any, ...]], job: Any) -> Result:
    import cv2

    cv2.setNumThreads(1)  # one task a core
    function, shared = work
    return function(job, *shared)
