"""Patches for training: the sample plan, read through Ray Data.

Each training worker runs one Ray Data pipeline over its own slice of every global batch:
`range → readers (actor pool) → ordered batches`. One execution spans epochs, so nothing stalls where one
ends. (`streaming_split` promises no order, so the rank's slice comes from the plan instead.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from nafnet_core.transforms import dihedral
from pipelines.config import DataSection
from pipelines.plan import SamplePlan, rank_slice
from pipelines.store import PairStore, read_manifest

# Rows in one read task: enough to amortise the task, few enough that readers stay just ahead of the steps.
_ROWS_PER_TASK = 64
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


class PatchReader:
    """Reader of one pipeline; runs in a Ray actor. Stores are opened once, in the actor."""

    def __init__(
        self, plan: SamplePlan, roots: Sequence[Path], span: Span, rank: int, world_size: int
    ) -> None:
        self._plan = plan
        self._stores = [PairStore(root) for root in roots]
        self._span = span
        self._slice = rank_slice(span.batch, rank, world_size)

    def __call__(self, rows: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        numbers = rank_samples(self._span, self._slice, rows["id"])
        batch = read_patches(self._plan, self._stores, numbers, self._span.patch_px)
        return {"sample": batch.samples, "lq": batch.lq, "gt": batch.gt}


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
    """Batches of one rank over one span, in order, read by Ray actors.

    Raises:
        InputError: a shard is missing or damaged.
    """
    import ray.data
    from ray.exceptions import RayTaskError

    from cluster.connect import quiet_data_context

    quiet_data_context()
    part = rank_slice(span.batch, rank, world_size)
    length = part[1] - part[0]
    num_rows = span.num_batches * length
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    dataset = ray.data.range(num_rows, override_num_blocks=-(-num_rows // _ROWS_PER_TASK)).map_batches(
        PatchReader,
        fn_constructor_args=(plan, list(roots), span, rank, world_size),
        batch_size=min(_ROWS_PER_TASK, num_rows),
        compute=ray.data.ActorPoolStrategy(size=num_readers),
        num_cpus=reader_cpus,
    )
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
        cause = error.cause
        if isinstance(cause, InputError):
            raise cause from error
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
