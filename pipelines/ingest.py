"""Patches for training: the sample plan, read through Ray Data.

Each training worker has a feeder that reads its slice of every global batch, in order and ahead of the
steps, through Ray Data: plan → read tasks → blocks in shared memory → batches. Windows of reading know
nothing of epochs, so nothing stalls where one ends. (`streaming_split` promises no order, so the rank's
slice comes from the plan instead.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayTaskError

from cluster.connect import quiet_data_context
from nafnet_core import InputError
from nafnet_core.transforms import channel_order, cutblur, dihedral
from pipelines.config import DataSection
from pipelines.plan import SamplePlan, drawn_augmentation, rank_slice
from pipelines.store import PairStore, read_manifest

# A window is read while the one before is trained on; two more may wait in the object store.
_WINDOW_BYTES, _BLOCK_BYTES = 64 * 2**20, 8 * 2**20
_FIRST_WINDOW_BATCHES, _WINDOWS_AHEAD = 4, 2


@dataclass(frozen=True, kw_only=True)
class Span:
    """A run of global batches of one shape: `num_batches` of `batch`, the first at sample `start`."""

    start: int
    num_batches: int
    batch: int
    patch_px: int


@dataclass(frozen=True, kw_only=True)
class PatchBatch:
    """One rank's slice of one global batch."""

    samples: NDArray[np.int64]
    lq: NDArray[np.uint8]
    """(N, P, P, 3) RGB."""
    gt: NDArray[np.uint8]
    """(N, P, P, 3) RGB."""


def plan_for(data: DataSection, *, seed: int) -> SamplePlan:
    """The plan of a mixture; reads manifests only. Raises `InputError` where a store cannot be used."""
    manifests = [read_manifest(store.path) for store in data.train]
    return SamplePlan(
        seed=seed,
        store_pairs=tuple(manifest.num_pairs for manifest in manifests),
        weights=tuple(store.weight for store in data.train),
        window_pairs=data.shuffle_window_pairs,
        augment=data.augment,
        cutblur=data.cutblur,
        channel_shuffle=data.channel_shuffle,
    )


def check_patches(data: DataSection, patch_px: int) -> None:
    """Raise `InputError` where a store's pairs are smaller than a patch."""
    for store in data.train:
        smallest = read_manifest(store.path).min_side_px
        if patch_px > smallest:
            raise InputError(
                "patches are larger than the pairs of this store",
                file=store.path,
                expected=f"at most {smallest} px",
                got=f"{patch_px} px",
                fix="Choose a smaller stages.0.patch_px, or prepare the store with a larger --crop",
            )


def read_patches(
    plan: SamplePlan, stores: Sequence[PairStore], numbers: NDArray[np.int64], patch_px: int
) -> PatchBatch:
    """Read the given samples in this process."""
    planned = plan.samples(numbers)
    shape = (len(numbers), patch_px, patch_px, 3)
    lq, gt = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    for row in range(len(numbers)):
        pair = stores[planned.store[row]].patch(
            int(planned.pair[row]), planned.top_share[row], planned.left_share[row], patch_px
        )
        variant = int(planned.variant[row])
        lq[row], gt[row] = (dihedral(image, variant) for image in pair)
        if plan.cutblur or plan.channel_shuffle:
            extra = drawn_augmentation(plan, int(planned.seed[row]), patch_px)
            if extra.sharp_box is not None:
                lq[row] = cutblur(lq[row], gt[row], extra.sharp_box, sharp_inside=extra.sharp_inside)
            lq[row], gt[row] = (channel_order(image, extra.channels) for image in (lq[row], gt[row]))
    return PatchBatch(samples=numbers, lq=lq, gt=gt)


class WindowSource(Datasource):
    """Ray Data source of a run of one rank's batches, in order; a block holds whole batches.

    A source of its own, and not `range → map_batches`: there the range's tasks ask for a whole CPU each, and
    wait for ever where training workers hold them.
    """

    def __init__(self, plan: SamplePlan, roots: Sequence[Path], span: Span, part: tuple[int, int]) -> None:
        """Read the slice `part` of every global batch in `span` from the stores at `roots`."""
        self._plan, self._roots, self._span, self._part = plan, tuple(roots), span, part

    @property
    def num_blocks(self) -> int:
        return -(-self._span.num_batches // self._batches_per_block)

    @property
    def _batches_per_block(self) -> int:
        return max(1, _BLOCK_BYTES // _batch_bytes(self._span, self._part))

    def estimate_inmemory_data_size(self) -> int:
        return self._span.num_batches * _batch_bytes(self._span, self._part)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task a block; `parallelism` is a hint that is not needed."""
        tasks = []
        for first in range(0, self._span.num_batches, self._batches_per_block):
            last = min(first + self._batches_per_block, self._span.num_batches)
            metadata = BlockMetadata(
                num_rows=(last - first) * (self._part[1] - self._part[0]),
                size_bytes=(last - first) * _batch_bytes(self._span, self._part),
                input_files=None,
                exec_stats=None,
            )
            tasks.append(ReadTask(partial(self.read, first, last), metadata))
        return tasks

    def read(self, first: int, last: int) -> Iterator[Block]:
        """The block of batches `first` to `last`; runs in a Ray task."""
        numbers = slice_numbers(self._span, self._part, np.arange(first, last)).reshape(-1)
        stores = [opened_store(root) for root in self._roots]
        batch = read_patches(self._plan, stores, numbers, self._span.patch_px)
        yield BlockAccessor.batch_to_block({"sample": batch.samples, "lq": batch.lq, "gt": batch.gt})


class Feeder:
    """Runs one rank's reading, window by window, as an actor beside its training worker.

    Not in the worker: Ray Data's scheduling threads would hold the interpreter lock that the backward pass
    waits for. And not as one endless execution: under back-pressure its scheduler polls without a pause and
    takes most of a core (measured with Ray 2.60: training at a third of its speed on two cores). A window is
    small, is read at full speed while the one before is trained on, and then nothing runs.
    """

    def __init__(
        self,
        plan: SamplePlan,
        roots: Sequence[Path],
        part: tuple[int, int],
        *,
        num_readers: int,
        reader_cpus: float,
    ) -> None:
        quiet_data_context()
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        self._plan, self._roots, self._part = plan, roots, part
        self._options = {"concurrency": num_readers, "num_cpus": reader_cpus}

    def read(self, window: Span) -> list[ray.ObjectRef[Block]]:
        """Read a window into the object store and return its blocks, in order."""
        source = WindowSource(self._plan, self._roots, window, self._part)
        # Else Ray Data would split blocks further, to have two a CPU.
        dataset = ray.data.read_datasource(source, override_num_blocks=source.num_blocks, **self._options)
        return dataset.get_internal_block_refs()


def slice_numbers(span: Span, part: tuple[int, int], batches: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sample numbers of a rank's slice of the given batches of a span: (N,) → (N, slice)."""
    return span.start + batches[:, None] * span.batch + np.arange(*part)[None, :]


def windows(span: Span, part: tuple[int, int]) -> Iterator[Span]:
    """Cut a span into pieces of up to `_WINDOW_BYTES`; the first are small, so that training starts soon."""
    most = max(1, _WINDOW_BYTES // _batch_bytes(span, part))
    first, length = 0, min(_FIRST_WINDOW_BATCHES, most)
    while first < span.num_batches:
        length = min(length, span.num_batches - first)
        yield replace(span, start=span.start + first * span.batch, num_batches=length)
        first, length = first + length, min(2 * length, most)


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
    """Batches of one rank over one span, in order, read by up to `num_readers` Ray tasks at a time.

    Raises:
        InputError: a shard is missing or damaged.
    """
    part = rank_slice(span.batch, rank, world_size)
    feeder = (
        ray.remote(Feeder)
        .options(num_cpus=0)
        .remote(plan, list(roots), part, num_readers=num_readers, reader_cpus=reader_cpus)
    )
    ahead: deque[tuple[Span, ray.ObjectRef]] = deque()
    coming = windows(span, part)
    try:
        while True:
            while len(ahead) <= _WINDOWS_AHEAD and (window := next(coming, None)) is not None:
                ahead.append((window, feeder.read.remote(window)))
            if not ahead:
                return
            window, blocks = ahead.popleft()
            yield from _batches_of(ray.get(blocks), window, part)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            # Ray Data writes advice of its own below our line.
            raise InputError(str(error.cause).splitlines()[0]) from error
        raise
    finally:
        ray.kill(feeder)


def _batches_of(
    blocks: Sequence[ray.ObjectRef[Block]], window: Span, part: tuple[int, int]
) -> Iterator[PatchBatch]:
    """Views of the blocks in shared memory, one a batch."""
    expected = slice_numbers(window, part, np.arange(window.num_batches))
    length, done = part[1] - part[0], 0
    for ref in blocks:
        block = BlockAccessor.for_block(ray.get(ref)).to_numpy()
        for start in range(0, len(block["sample"]), length):
            rows = slice(start, start + length)
            # The whole point of the plan: never train on other samples than these.
            assert np.array_equal(block["sample"][rows], expected[done]), f"batch {done} of {window}"
            yield PatchBatch(samples=expected[done], lq=block["lq"][rows], gt=block["gt"][rows])
            done += 1
    assert done == window.num_batches, f"{done} batches of {window}"


def _batch_bytes(span: Span, part: tuple[int, int]) -> int:
    return (part[1] - part[0]) * span.patch_px**2 * 6


@lru_cache(maxsize=64)
def opened_store(root: Path) -> PairStore:
    """Stores stay open for the life of a reader process; LMDB wants each file opened once a process."""
    return PairStore(root)


class Stopwatch:
    """Time spent waiting for the next item of an iterator."""

    def __init__(self) -> None:
        self.waited_s = 0.0

    def over(self, batches: Iterator[PatchBatch]) -> Iterator[PatchBatch]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch
