"""How long a network takes in each of its forms on this machine: measured once, and remembered beside them.

WORKSPACE/exports/NETWORK/times.json has the seconds by machine, threads and versions. They are in no exported
file: the same export is the same file, wherever it was made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from pipelines.files import write_json
from pipelines.restorer import Restorer
from pipelines.tracking.machine import processor

TIMES = "times.json"
SCHEMA_VERSION = 1
_SIZE_PX = (384, 512)
_LEAST_TURNS, _MOST_TURNS = 3, 7
_LONG_S = 10.0

log = logging.getLogger(__name__)


def read_times(folder: Path, machine: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by form, as they were measured on such a machine; none where nothing can be read."""
    for entry in _entries(folder):
        if entry["machine"] == machine:
            return entry["seconds"]
    return {}


def write_times(folder: Path, machine: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Remember what was measured, in the place of what was measured on such a machine before."""
    others = [entry for entry in _entries(folder) if entry["machine"] != machine]
    entries = [*others, {"machine": machine, "seconds": seconds}]
    try:
        write_json(folder / TIMES, {"schema_version": SCHEMA_VERSION, "entries": entries})
    except OSError as error:  # a workspace to read only
        log.warning("times are measured anew next time: %s", error)


def this_machine(num_threads: int, runtimes: set[str]) -> dict[str, Any]:
    """What times depend on: the processor, its threads, and the versions of what is timed.

    Not the host's name, which a container has anew at each start.
    """
    versions = {name: version(name) for name in sorted({"torch", *runtimes})}
    return {"processor": processor(), "threads": num_threads, "versions": versions}


def measure(forms: Mapping[str, Restorer], *, num_threads: int) -> dict[str, float]:
    """Seconds of each on one image of 384×512 px, the fastest of three to seven turns.

    What else the machine does only ever adds time. After three, turns end once all have taken ten seconds.
    """
    down, across = np.mgrid[0 : _SIZE_PX[0], 0 : _SIZE_PX[1]] / max(_SIZE_PX)
    image = (255 * np.stack([down, across, 1 - down], axis=2)).round().astype(np.uint8)
    taken = dict.fromkeys(forms, float("inf"))
    begin = perf_counter()
    with _torch_on(num_threads):
        for restorer in forms.values():  # to warm up
            restorer(image)
        for turn in range(1, _MOST_TURNS + 1):
            for name, restorer in forms.items():
                start = perf_counter()
                restorer(image)
                taken[name] = min(taken[name], perf_counter() - start)
            if turn >= _LEAST_TURNS and perf_counter() - begin > _LONG_S:
                break
    return taken


@contextmanager
def _torch_on(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _entries(folder: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads((folder / TIMES).read_bytes())
        if content["schema_version"] != SCHEMA_VERSION:
            return []
        return [
            {"machine": dict(entry["machine"]), "seconds": {k: float(v) for k, v in entry["seconds"].items()}}
            for entry in content["entries"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("times that cannot be read are measured anew: %s", error)
        return []
