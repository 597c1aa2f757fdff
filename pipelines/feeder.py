"""Ray Data's part of ingest: the sample plan goes in at one end, one rank's batches come out at the other.

    plan blocks ──▶ readers (actor pool) ──▶ patches in shared memory ──▶ training worker

Each training worker has a feeder, an actor that runs *one* Ray Data execution over all of the worker's
batches: epochs begin and end inside of it, so nothing stalls there. (`streaming_split` promises no order, so
the rank's slice comes from the plan instead.)

Not in the worker's process: Ray Data's scheduling thread would hold the interpreter lock that the backward
pass waits for. And not held back at its output: Ray Data's scheduler then polls without a pause, and takes
most of a core (measured with Ray 2.60: training at a third of its speed on two cores). It is held back at its
input instead: the task that hands out the plan waits until the worker has come near enough.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connect import quiet_data_context
from nafnet_core import InputError
from pipelines.ingest import PatchBatch, Span, read_patches, slice_numbers
from pipelines.plan import SamplePlan, rank_slice
from pipelines.store import PairStore

log = logging.getLogger(__name__)

# A block is what one call of a reader makes; so much may lie ready, beside the block that is trained on.
_BLOCK_BYTES, _AHEAD_BYTES = 16 * 2**20, 128 * 2**20
_MIN_AHEAD_BLOCKS = 2
_REQUESTS_AHEAD = 4
_MAX_RESTARTS = 3


def ray_batches(
    plan: SamplePlan,
    roots: Sequence[Path],
    span: Span,
    *,
    rank: int,
    world_size: int,
    num_readers: int,
    reader_cpus: float,
) -> Iterator[PatchBatch]:
    """Batches of one rank over one span, in order, read by `num_readers` Ray actors.

    A reader that dies is replaced by Ray Data; a feeder that dies is started again where it was.

    Raises:
        InputError: a shard is missing or damaged.
    """
    part = rank_slice(span.batch, rank, world_size)
    done = restarts = 0
    while done < span.num_batches:
        feed = _Feed(plan, roots, span, part, done, num_readers=num_readers, reader_cpus=reader_cpus)
        try:
            for batch in feed.batches():
                yield batch
                done += 1
        except (ActorDiedError, ActorUnavailableError):
            if restarts == _MAX_RESTARTS:
                raise
            restarts += 1
            log.warning("rank %d: its feeder died, and is started again at batch %d", rank, done)
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                # Ray Data writes advice of its own below our line.
                raise InputError(str(error.cause).splitlines()[0]) from error
            raise
        finally:
            feed.close()


class _Feed:
    """The worker's end: asks the feeder for blocks, some ahead, and cuts them into batches."""

    def __init__(
        self,
        plan: SamplePlan,
        roots: Sequence[Path],
        span: Span,
        part: tuple[int, int],
        first: int,
        *,
        num_readers: int,
        reader_cpus: float,
    ) -> None:
        self._span, self._part, self._first = span, part, first
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # One thread hands out blocks, another waits for the worker to come nearer.
        self._feeder: ActorHandle = (
            ray.remote(num_cpus=0, concurrency_groups={"pace": 1})(Feeder)
            .options(scheduling_strategy=here)
            .remote(plan, list(roots), span, part, first, num_readers=num_readers, reader_cpus=reader_cpus)
        )

    def batches(self) -> Iterator[PatchBatch]:
        """Views of the blocks in shared memory, one a batch."""
        expected, length = self._first, self._part[1] - self._part[0]
        requests = deque(self._feeder.next_block.remote() for _ in range(_REQUESTS_AHEAD))
        while (refs := ray.get(requests.popleft())) is not None:
            requests.append(self._feeder.next_block.remote())
            block = BlockAccessor.for_block(ray.get(refs[0])).to_numpy()
            samples, lq, gt = (block[name][0] for name in ("sample", "lq", "gt"))
            for start in range(0, len(samples), length):
                rows = slice(start, start + length)
                numbers = slice_numbers(self._span, self._part, np.array([expected]))[0]
                # The whole point of the plan: never train on other samples than these.
                assert np.array_equal(samples[rows], numbers), f"batch {expected} of {self._span}"
                yield PatchBatch(samples=numbers, lq=lq[rows], gt=gt[rows])
                expected += 1
        assert expected == self._span.num_batches, f"{expected} batches of {self._span}"

    def close(self) -> None:
        ray.kill(self._feeder)


class Feeder:
    """One rank's Ray Data execution; an actor beside its training worker."""

    def __init__(
        self,
        plan: SamplePlan,
        roots: Sequence[Path],
        span: Span,
        part: tuple[int, int],
        first: int,
        *,
        num_readers: int,
        reader_cpus: float,
    ) -> None:
        quiet_data_context()
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        # Each row a block, and at once: else Ray Data keeps the plan's rows back until they fill a large one.
        context.target_max_block_size = 1
        slice_bytes = (part[1] - part[0]) * span.patch_px**2 * 6
        batches = max(1, _BLOCK_BYTES // slice_bytes)
        self._ahead = max(_MIN_AHEAD_BLOCKS, num_readers + 1, _AHEAD_BYTES // (batches * slice_bytes))
        self._taken, self._changed = 0, threading.Condition()
        me = ray.get_runtime_context().current_actor
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        source = PlanSource(me, range(first, span.num_batches), batches)
        # No CPU: it only waits. And with the readers' share Ray Data would make one operator of the two.
        self._dataset = ray.data.read_datasource(
            source, override_num_blocks=1, num_cpus=0, ray_remote_args={"scheduling_strategy": here}
        ).map_batches(
            Reader,
            fn_constructor_args=(plan, tuple(roots), span, part),
            compute=ray.data.ActorPoolStrategy(size=num_readers),
            batch_size=None,
            num_cpus=reader_cpus,
            scheduling_strategy=here,
        )
        self._bundles: Iterator[Any] | None = None

    def next_block(self) -> list[ray.ObjectRef[Block]] | None:
        """The next block, in order; None at the end."""
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

    @ray.method(concurrency_group="pace")
    def wait_for_turn(self, number: int) -> None:
        """Return when the block of this number may be read."""
        with self._changed:
            self._changed.wait_for(lambda: number < self._taken + self._ahead)


class PlanSource(Datasource):
    """Hands out the numbers of the batches to read, a few a block, no sooner than the feeder lets it."""

    def __init__(self, feeder: ActorHandle, batches: range, batches_per_block: int) -> None:
        self._feeder, self._batches, self._per_block = feeder, batches, batches_per_block

    def estimate_inmemory_data_size(self) -> int:
        return 16 * len(self._batches)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task, which lasts as long as the reading does."""
        metadata = BlockMetadata(
            num_rows=None, size_bytes=self.estimate_inmemory_data_size(), input_files=None, exec_stats=None
        )
        return [ReadTask(self._turns, metadata)]

    def _turns(self) -> Iterator[Block]:
        for number, first in enumerate(range(self._batches.start, self._batches.stop, self._per_block)):
            ray.get(self._feeder.wait_for_turn.remote(number))
            yield pa.table({"first": [first], "last": [min(first + self._per_block, self._batches.stop)]})


class Reader:
    """Reads the patches of planned batches; its shards stay open."""

    def __init__(self, plan: SamplePlan, roots: Sequence[Path], span: Span, part: tuple[int, int]) -> None:
        self._plan, self._span, self._part = plan, span, part
        self._stores = [PairStore(root) for root in roots]

    def __call__(self, turn: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
        """Batches `first` to `last` → their samples and patches, all in one row."""
        batches = np.arange(turn["first"][0], turn["last"][0])
        numbers = slice_numbers(self._span, self._part, batches).reshape(-1)
        patches = read_patches(self._plan, self._stores, numbers, self._span.patch_px)
        return {"sample": patches.samples[None], "lq": patches.lq[None], "gt": patches.gt[None]}
