"""Patches for training: the sample plan, read through Ray Data.

Each training worker runs one Ray Data pipeline over its own slice of every global batch:
plan → readers → ordered batches. One execution spans epochs, so nothing stalls where one
ends. (`streaming_split` promises no order, so the rank's slice comes from the plan instead.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from nafnet_core.transforms import dihedral
from pipelines.config import DataSection
from pipelines.plan import SamplePlan, rank_slice
from pipelines.store import PairStore, read_manifest

# Rows in one block: enough to amortise the task, few enough that readers stay just ahead of the steps.
_ROWS_PER_BLOCK = 64
_MAX_TASKS = 20_000
_PREFETCH_BATCHES = 4


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
    return PatchBatch(samples=numbers, lq=lq, gt=gt)


class PlanDatasource(Datasource):
    """Ray Data source of one rank's samples of a span, in order.

    A source of its own, and not `range → map_batches`: there the range's tasks ask for a whole CPU each, and
    wait for ever where training workers hold them.
    """

    def __init__(
        self, plan: SamplePlan, roots: Sequence[Path], span: Span, rank: int, world_size: int
    ) -> None:
        self._plan, self._roots, self._span = plan, tuple(roots), span
        self._part = rank_slice(span.batch, rank, world_size)

    @property
    def num_rows(self) -> int:
        return self._span.num_batches * (self._part[1] - self._part[0])

    def estimate_inmemory_data_size(self) -> int:
        return self.num_rows * self._row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Tasks of consecutive rows; `parallelism` is a hint that the plan's own sizes overrule."""
        rows = max(_ROWS_PER_BLOCK, -(-self.num_rows // _MAX_TASKS))
        tasks = []
        for start in range(0, self.num_rows, rows):
            stop = min(start + rows, self.num_rows)
            metadata = BlockMetadata(
                num_rows=stop - start,
                size_bytes=(stop - start) * self._row_bytes,
                input_files=None,
                exec_stats=None,
            )
            tasks.append(ReadTask(partial(self.read, start, stop), metadata))
        return tasks

    def read(self, start: int, stop: int) -> Iterator[Block]:
        """Blocks of the rows from `start` to `stop`; runs in a Ray task."""
        stores = [_opened(root) for root in self._roots]
        for first in range(start, stop, _ROWS_PER_BLOCK):
            rows = np.arange(first, min(first + _ROWS_PER_BLOCK, stop))
            numbers = rank_samples(self._span, self._part, rows)
            batch = read_patches(self._plan, stores, numbers, self._span.patch_px)
            yield BlockAccessor.batch_to_block({"sample": batch.samples, "lq": batch.lq, "gt": batch.gt})

    @property
    def _row_bytes(self) -> int:
        return self._span.patch_px**2 * 6


@lru_cache(maxsize=64)
def _opened(root: Path) -> PairStore:
    """Stores stay open for the life of a reader process; LMDB wants each file opened once a process."""
    return PairStore(root)


def rank_samples(span: Span, part: tuple[int, int], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sample numbers of a rank's rows: row *j* is the (j mod m)-th of its part of batch j ÷ m."""
    length = part[1] - part[0]
    return span.start + rows // length * span.batch + part[0] + rows % length


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
    """Batches of one rank over one span, in order, read by `num_readers` Ray tasks at a time.

    Raises:
        InputError: a shard is missing or damaged.
    """
    quiet_data_context()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    source = PlanDatasource(plan, roots, span, rank, world_size)
    dataset = ray.data.read_datasource(source, concurrency=num_readers, num_cpus=reader_cpus)
    part = rank_slice(span.batch, rank, world_size)
    length = part[1] - part[0]
    batches = dataset.iter_batches(
        batch_size=length, prefetch_batches=_PREFETCH_BATCHES, batch_format="numpy"
    )
    expected = rank_samples(span, part, np.arange(length))
    try:
        for batch in batches:
            # The whole point of the plan: never train on other samples than these.
            if not np.array_equal(batch["sample"], expected):
                raise AssertionError(f"expected samples {expected}, got {batch['sample']}")
            yield PatchBatch(samples=batch["sample"], lq=batch["lq"], gt=batch["gt"])
            expected = expected + span.batch
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from error
        raise


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
