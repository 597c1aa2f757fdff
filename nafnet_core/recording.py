"""Work on a GPU recorded as a CUDA graph. Whoever replays one keeps alive all that it reads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
_ONE_AT_A_TIME = threading.Lock()  # torch can record one graph at a time in a process


def warm_up(run: Callable[[], object], *, passes: int) -> None:
    """Run on a stream of its own, as torch wants it first: libraries choose and set up then."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(passes):
            run()
    torch.cuda.current_stream().wait_stream(beside)


def recorded(run: Callable[[], _Result], *, pool: Any) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """What `run` launches, and what it returns, which each replay overwrites.

    Args:
        run: warmed up; it waits for nothing on the device.
        pool: memory of several graphs, of which one runs at a time.
    """
    graph = torch.cuda.CUDAGraph()
    # What other threads do on the GPU meanwhile, a checkpoint's copy or NCCL's watchdog, is none of ours.
    with _ONE_AT_A_TIME, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return graph, result
