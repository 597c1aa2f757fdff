"""What a run of `prepare` writes down below `STORE/.progress`, by which a later one goes on.

job.json             what it makes of what
shard-00000.json     a note a finished shard: its size and checksum, digests, refused pairs, scenes
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nafnet_core import InputError
from pipelines.files import json_bytes
from pipelines.shards import Format
from pipelines.storage import LocalFolder, RemoteFolder
from pipelines.store import PROGRESS

_JOB = "job.json"
_NUM_READS = 16  # notes read at a time: one takes a bucket some 50 ms
_Folder = LocalFolder | RemoteFolder


def shard_name(number: int, format: Format) -> str:
    """File of a shard in the store."""
    return f"shard-{number:05d}.{format}"


def note_name(number: int) -> str:
    """File of the note of a shard."""
    return f"shard-{number:05d}.json"


def claim(store: _Folder, identity: Mapping[str, Any]) -> None:
    """Notes of another job must not be taken for this one's: pin the job's identity beside them.

    Where the job before has written no pair yet, nothing is lost, and this one takes its place.

    Raises:
        InputError: another job has written some.
    """
    progress = store.below(PROGRESS)
    job = json.loads(json.dumps(identity, default=str))  # so that it compares with what was written
    names = progress.names()
    earlier = json.loads(progress.read(_JOB)) if _JOB in names else job
    changed = [name for name in job | earlier if job.get(name) != earlier.get(name)]
    if changed:
        left = [name for name in names if name.startswith("shard-")]
        if any(json.loads(progress.read(note))["info"]["pairs"] for note in left):
            raise InputError(
                "an unfinished store of other data or options",
                file=store,
                expected=", ".join(f"{name} {earlier.get(name)}" for name in changed),
                got=", ".join(f"{name} {job.get(name)}" for name in changed),
                fix="Run the command that began it, or remove the folder",
            )
        for note in left:
            progress.delete(note)
    progress.write(_JOB, json_bytes(job))


def whole_shards(store: _Folder, num_shards: int, format: Format) -> set[int]:
    """Numbers of the shards that an earlier run has written, and that still have their size."""
    progress, sizes = store.below(PROGRESS), store.sizes()
    names = set(progress.names())
    noted = [n for n in range(num_shards) if note_name(n) in names and shard_name(n, format) in sizes]
    return {
        number
        for number, note in zip(noted, notes(progress, noted), strict=True)
        if sizes[shard_name(number, format)] == note["info"]["bytes"]
    }


def notes(progress: _Folder, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What was written down of each of these shards, in order, some read ahead."""
    with ThreadPoolExecutor(_NUM_READS) as pool:
        for start in range(0, len(numbers), 4 * _NUM_READS):
            names = [note_name(number) for number in numbers[start : start + 4 * _NUM_READS]]
            yield from map(json.loads, pool.map(progress.read, names))
