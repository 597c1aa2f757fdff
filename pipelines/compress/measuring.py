"""Time and memory of networks: taken in turns, and each in a process of its own."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nafnet_core import CapabilityError
from nafnet_core.tiling import restore_image
from pipelines.compress.contenders import Contender
from pipelines.turns import times_in_turns

SIZES_PX = ((256, 256), (720, 1280))
"""Height and width of the images that are timed: a patch, and a frame."""
_MEMORY_RUNS = 2
_SELF = Path("/proc/self")


def speedups(seconds: Sequence[Sequence[float]]) -> list[float]:
    """How many times faster than the first each is: the median over the rounds of the ratio in each."""
    return [
        statistics.median(first / own for first, own in zip(seconds[0], each, strict=True))
        for each in seconds
    ]


def latencies(
    contenders: Sequence[Contender],
    size_px: tuple[int, int],
    *,
    runs: int,
    on_run: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Seconds of each network in each round, from 8-bit pixels to 8-bit pixels, the image as a whole.

    Args:
        contenders: all are open at once; on the CPU, each on as many threads as torch has.
        size_px: height and width of the image.
        runs: rounds.
        on_run: called after each image, those that warm up too.
    """
    image = _image(size_px)
    networks = [each.opener(torch.get_num_threads()) for each in contenders]
    calls = [
        lambda network=network, patch=each.train_patch_px: restore_image(
            network, image, train_patch_px=patch, tile_px=None
        )
        for each, network in zip(contenders, networks, strict=True)
    ]
    return times_in_turns(calls, runs=runs, on_run=on_run)


def peak_memory_mib(contender: Contender) -> float:
    """What opening a network and restoring images of 1280×720 adds to the memory of a fresh process.

    The highest resident size, up to the end of the second image, less the resident size just before the file
    is opened: weights, graph and maps count, and so does what the runtime prepares. Python, torch and the
    runtime's own libraries were imported before, and count only as far as they are touched first by the work.

    Raises:
        CapabilityError: the process was killed, as for want of memory.
    """
    # Ctrl-C goes to all processes of a terminal; this one is to end without a word.
    quiet = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=quiet) as pool:
        try:
            return pool.submit(_growth_mib, contender, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise CapabilityError(
                "the process that measures memory was killed", file=contender.label,
                expected="memory for an image of 1280×720", fix="Free some, or leave this model out",
            ) from error  # fmt: skip


def _growth_mib(contender: Contender, num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    for module in contender.modules:
        import_module(module)
    image = _image(SIZES_PX[-1])
    with suppress(OSError):  # forbidden in some containers: then the peak of the imports may hide a small one
        (_SELF / "clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    network = contender.opener(num_threads)
    for _ in range(_MEMORY_RUNS):
        restore_image(network, image, train_patch_px=contender.train_patch_px, tile_px=None)
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    status = (_SELF / "status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def _image(size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) noise: what is in an image does not change the time it takes."""
    return np.random.default_rng(0).integers(0, 256, (*size_px, 3), np.uint8)
