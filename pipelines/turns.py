"""Times of several calls, taken in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter


def times_in_turns(
    calls: Sequence[Callable[[], object]], *, runs: int, on_run: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """Seconds of each call in each round, after a round that warms up.

    A round takes every call once: what else the machine does, and how fast it is just then, meets all alike.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(runs + 1):
        for call, taken in zip(calls, seconds, strict=True):
            start = perf_counter()
            call()
            if turn:
                taken.append(perf_counter() - start)
            on_run()
    return seconds
