"""Ray Data's part of ingest: the sample plan goes in at one end, one rank's batches come out at the other.

    sample plan ──▶ readers (actor pool) ──▶ patches in shared memory ──▶ training worker

Each training worker has a feeder, an actor that runs *one* Ray Data execution over all of the worker's
batches: epochs begin and end inside of it, so nothing stalls there. Of `n` readers each reads every `n`-th
block; they come in any order, and the worker puts them in the plan's. (`streaming_split` promises no order,
so the rank's slice comes from the plan instead.)

Not in the worker's process: Ray Data's scheduling thread would hold the interpreter lock that the backward
pass waits for. And not held back at its output: Ray Data's scheduler then polls without a pause, and takes
most of a core (measured with Ray 2.60: training at a third of its speed on two cores). It is held back at its
source instead: a reader waits until the worker has come near enough.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.data.block import Block, BlockAccessor
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connect import quiet_data_context
from nafnet_core import NAFNetError
from pipelines.ingest import PatchBatch, Span, read_patches, slice_numbers
from pipelines.plan import SamplePlan, rank_slice
from pipelines.prefetch import Prefetcher
from pipelines.shard_cache import DEFAULT_CACHE_GIB
from pipelines.store import PairStore

log = logging.getLogger(__name__)

_Columns = dict[str, NDArray[Any]]

# A block is what a reader hands over at a time: Ray Data takes milliseconds for each. So many may lie ready,
# beside the one that is trained on; all ranks' together in a part of shared memory.
_MAX_BLOCK_BYTES, _AHEAD_BLOCKS, _STORE_PARTS = 64 * 2**20, 4, 4
_REQUESTS_AHEAD = 3
_MAX_RESTARTS = 3
_STATISTICS_TIMEOUT_S = 5.0
_DEATHS = (ActorDiedError, ActorUnavailableError, NodeDiedError, WorkerCrashedError)


def ray_batches(
    plan: SamplePlan,
    roots: Sequence[Path | str],
    span: Span,
    *,
    rank: int,
    world_size: int,
    num_readers: int,
    reader_cpus: float,
    cache_gib: float = DEFAULT_CACHE_GIB,
) -> Generator[PatchBatch, None, None]:
    """Batches of one rank over one span, in order, read by `num_readers` Ray actors.

    A reader or feeder that dies is replaced, and reading goes on where the worker is.

    Raises:
        InputError: a shard is missing or damaged.
    """
    reading = Reading(
        plan=plan,
        roots=tuple(roots),
        span=span,
        part=rank_slice(span.batch, rank, world_size),
        num_readers=num_readers,
        reader_cpus=reader_cpus,
        block_bytes=_block_bytes(world_size, num_readers),
        cache_gib=cache_gib,
    )
    restarts = 0
    while reading.first < span.num_batches:
        feed = _Feed(reading)
        try:
            for batch in feed.batches():
                yield batch
                reading = replace(reading, first=reading.first + 1)
        except RayError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, NAFNetError):
                # Ray Data writes advice of its own below our line.
                raise type(cause)(str(cause).splitlines()[0]) from error
            restarts += 1
            if not isinstance(cause, _DEATHS) or restarts > _MAX_RESTARTS:
                raise
            log.warning("rank %d: a reader died; reading goes on at batch %d", rank, reading.first)
        finally:
            feed.close()


def _block_bytes(world_size: int, num_readers: int) -> int:
    """Size of a block, such that what lies ready for all ranks is a part of shared memory only."""
    share = ray.cluster_resources().get("object_store_memory", 0) / _STORE_PARTS / world_size
    return int(min(_MAX_BLOCK_BYTES, share / _blocks_ahead(num_readers)))


def _blocks_ahead(num_readers: int) -> int:
    return max(2 * num_readers, _AHEAD_BLOCKS)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one rank reads, by how many, in what pieces."""

    plan: SamplePlan
    roots: tuple[Path | str, ...]
    span: Span
    part: tuple[int, int]
    """The rank's slice of each global batch."""
    first: int = 0
    """Batch of the span that is the first to read."""
    num_readers: int
    reader_cpus: float
    block_bytes: int
    cache_gib: float

    @property
    def busy_readers(self) -> int:
        """Readers for which there is a block. Of one that reads none, Ray Data makes an empty block."""
        return sum(self._start(turn) < self.span.num_batches for turn in range(self.num_readers))

    def turns_of(self, reader: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Numbers of a reader's blocks, every `busy_readers`-th, and of the batches in each.

        The first block is of one batch, the next of two, and so on, so that training starts soon.
        """
        for turn in itertools.count(reader, self.busy_readers):
            start, stop = self._start(turn), min(self._start(turn + 1), self.span.num_batches)
            if start >= stop:
                return
            yield turn, np.arange(start, stop)

    def _start(self, turn: int) -> int:
        slice_bytes = (self.part[1] - self.part[0]) * self.span.patch_px**2 * 6
        most_batches = max(1, self.block_bytes // slice_bytes)
        ramp = min(turn, most_batches.bit_length() - 1)
        return self.first + 2**ramp - 1 + (turn - ramp) * most_batches


class _Feed:
    """The worker's end: asks the feeder for blocks, some ahead, and cuts them into batches."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        # One thread hands out blocks, others let readers go on.
        groups = {"pace": reading.busy_readers, "tell": 1}
        actor = ray.remote(num_cpus=0, concurrency_groups=groups)(Feeder)
        self._feeder: ActorHandle = actor.options(scheduling_strategy=_here(0)).remote(reading)

    def batches(self) -> Iterator[PatchBatch]:
        """Views of the blocks in shared memory, one a batch."""
        span, part = self._reading.span, self._reading.part
        done, length = self._reading.first, part[1] - part[0]
        for block in self._in_order():
            for start in range(0, len(block["sample"]), length):
                rows = slice(start, start + length)
                numbers = slice_numbers(span, part, np.array([done]))[0]
                # The whole point of the plan: never train on other samples than these.
                assert np.array_equal(block["sample"][rows], numbers), f"batch {done} of {span}"
                yield PatchBatch(samples=numbers, lq=block["lq"][rows], gt=block["gt"][rows])
                done += 1
        assert done == span.num_batches, f"{done} batches of {span}"

    def _in_order(self) -> Iterator[_Columns]:
        early: dict[int, _Columns] = {}
        expected = 0
        requests = deque(self._feeder.next_block.remote() for _ in range(_REQUESTS_AHEAD))
        while (refs := ray.get(requests.popleft())) is not None:
            requests.append(self._feeder.next_block.remote())
            columns = BlockAccessor.for_block(ray.get(refs[0])).to_numpy()
            block = {name: column[0] for name, column in columns.items()}
            early[int(block["turn"])] = block
            while expected in early:
                yield early.pop(expected)
                expected += 1

    def close(self) -> None:
        """End the reading; what Ray Data counted goes to the log."""
        with contextlib.suppress(RayError):  # it may be dead already
            statistics = self._feeder.statistics.remote()
            log.info("Ray Data's statistics:\n%s", ray.get(statistics, timeout=_STATISTICS_TIMEOUT_S))
        ray.kill(self._feeder)


class Feeder:
    """One rank's Ray Data execution; an actor beside its training worker."""

    def __init__(self, reading: Reading) -> None:
        quiet_data_context()
        context = ray.data.DataContext.get_current()
        # Each row a block, and at once: else Ray Data keeps rows back until they fill a large one.
        context.target_max_block_size = 1
        # Walking through a reader's mappings, of all shards and of shared memory, takes it milliseconds.
        context.memory_usage_poll_interval_s = None
        self._ahead = _blocks_ahead(reading.busy_readers)
        self._taken, self._changed = 0, threading.Condition()
        # Not `ray.data.range`: its tasks want a CPU each, and wait for ever where training workers hold them.
        readers = [{"reader": number} for number in range(reading.busy_readers)]
        self._dataset = ray.data.from_items(readers, override_num_blocks=len(readers)).map_batches(
            Reader,
            fn_constructor_args=(reading, ray.get_runtime_context().current_actor),
            # One task an actor: a second one would wait behind the first, which lasts to the end.
            compute=ray.data.ActorPoolStrategy(size=len(readers), max_tasks_in_flight_per_actor=1),
            batch_size=None,
            num_cpus=reading.reader_cpus,
            scheduling_strategy=_here(reading.reader_cpus),
            # Ray would have a reader that died begin anew; the worker knows better where to go on.
            max_restarts=0,
            max_task_retries=0,
        )
        self._bundles: Iterator[Any] | None = None

    def next_block(self) -> list[ray.ObjectRef[Block]] | None:
        """The block that comes next, whichever of those ahead it is; None at the end."""
        if self._bundles is None:
            # Not before: it waits for the first block, and so for `wait_for_turn`.
            self._bundles = self._dataset.iter_internal_ref_bundles()
        bundle = next(self._bundles, None)
        with self._changed:
            self._taken += 1
            self._changed.notify_all()
        if bundle is None:
            return None
        (ref,) = bundle.block_refs
        return [ref]

    @ray.method(concurrency_group="tell")
    def statistics(self) -> str:
        """Ray Data's own, of what has been read so far."""
        return self._dataset.stats()

    @ray.method(concurrency_group="pace")
    def wait_for_turn(self, turn: int) -> None:
        """Return when the block of this number may be read."""
        with self._changed:
            self._changed.wait_for(lambda: turn < self._taken + self._ahead)


class Reader:
    """Reads the patches of planned batches; its shards stay open."""

    def __init__(self, reading: Reading, feeder: ActorHandle) -> None:
        cv2.setNumThreads(1)  # one reader a core
        self._reading, self._feeder = reading, feeder
        self._prefetcher: Prefetcher | None = None
        self._stores: list[PairStore] = []

    def __call__(self, row: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        """Number of a reader → its blocks, a row each, for as long as the reading lasts."""
        reading, reader = self._reading, int(row["reader"][0])
        # Not in the constructor: an actor that fails there counts as dead, and is started again and again.
        self._stores = [PairStore(root, cache_gib=reading.cache_gib) for root in reading.roots]
        if reader == 0:  # for all of them: they share the node's cache
            self._prefetcher = Prefetcher(
                reading.plan,
                self._stores,
                first=reading.span.start + reading.first * reading.span.batch,
                stop=reading.span.start + reading.span.num_batches * reading.span.batch,
            )
        for turn, batches in reading.turns_of(reader):
            if self._prefetcher is not None:
                self._prefetcher.advance(reading.span.start + int(batches[0]) * reading.span.batch)
            may_go_on = self._feeder.wait_for_turn.remote(turn)
            numbers = slice_numbers(reading.span, reading.part, batches).reshape(-1)
            ray.get(may_go_on)
            patches = read_patches(reading.plan, self._stores, numbers, reading.span.patch_px)
            block = {"sample": patches.samples, "lq": patches.lq, "gt": patches.gt}
            yield {"turn": np.array([turn]), **{name: column[None] for name, column in block.items()}}


def _here(num_cpus: float) -> NodeAffinitySchedulingStrategy:
    """On this node: patches go through its shared memory, shards through its cache.

    Who reserves CPUs goes elsewhere where there are none left. Not who reserves none: of a wish, Ray 2.60
    takes no notice then, and had half of the feeders on the head.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=num_cpus > 0)
