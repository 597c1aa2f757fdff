"""Patches for training: what to read follows from the sample plan, wherever and by whomever it is read.

`pipelines/feeder.py` has them read by Ray Data beside the training workers.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from nafnet_core.transforms import channel_order, cutblur, dihedral_into
from pipelines.blurring import FreshBlur
from pipelines.config import DataSection
from pipelines.plan import SEGMENT_PAIRS, PlannedSamples, SamplePlan, blur_rng, drawn_augmentation
from pipelines.storage import is_url
from pipelines.store import Manifest, PairStore, patch_box, read_manifest, refuse_sharp_only

_WINDOWS_IN_CACHE = 2.5


@dataclass(frozen=True, kw_only=True)
class Span:
    """A run of global batches of one shape: `num_batches` of `batch`, the first at sample `start`."""

    start: int
    num_batches: int
    batch: int
    patch_px: int

    def starts_like(self, other: Span) -> bool:
        """Whether both have the same first batch, however many follow."""
        return replace(self, num_batches=other.num_batches) == other


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
    window = data.shuffle_window_pairs
    remote = [
        manifest
        for store, manifest in zip(data.train, manifests, strict=True)
        if is_url(store.path) and manifest.num_pairs
    ]
    cache_bytes = data.cache_gib * 2**30
    if sum(shard.bytes for manifest in remote for shard in manifest.shards) > cache_bytes:
        # Two windows must find room in the cache, or each sample would fetch its shard anew.
        pair_bytes = max(_fetched_bytes(manifest) for manifest in remote)
        window = max(1, min(window, int(cache_bytes / _WINDOWS_IN_CACHE / pair_bytes)))
    return SamplePlan(
        seed=seed,
        store_pairs=tuple(manifest.num_pairs for manifest in manifests),
        weights=tuple(store.weight for store in data.train),
        window_pairs=window,
        ramp=bool(remote),
        augment=data.augment,
        cutblur=data.cutblur,
        channel_shuffle=data.channel_shuffle,
        blurs=tuple(None if store.blur is None else FreshBlur.of(store.blur) for store in data.train),
    )


def data_digests(data: DataSection, plan: SamplePlan) -> list[str]:
    """What names the data of a run: digests of its stores, then of the measured kernels of each."""
    stores = [read_manifest(store.path).digest for store in data.train]
    return stores + [blur.kernels_digest for blur in plan.blurs if blur is not None and blur.kernels_digest]


def check_blur(data: DataSection) -> None:
    """Raise `InputError` where a store has not the images that are asked of it."""
    for number, store in enumerate(data.train):
        own_share = 1.0 if store.blur is None else store.blur.own_share
        if own_share:
            name = f"data.train.{number}.blur"
            refuse_sharp_only(
                store.path,
                read_manifest(store.path),
                fix=f"Have them blurred in training, with --set '{name}.kinds=[shake]'"
                if store.blur is None
                else f"Set {name}.own_share=0",
            )


def _fetched_bytes(manifest: Manifest) -> float:
    """What a pair of a window of shuffling costs: a segment of pairs is fetched by whole shards."""
    segment_pairs, num_shards = min(SEGMENT_PAIRS, manifest.num_pairs), len(manifest.shards)
    touched = min(num_shards, 1 + (segment_pairs - 1) * num_shards / manifest.num_pairs)
    return touched * sum(shard.bytes for shard in manifest.shards) / num_shards / segment_pairs


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
        pair = _read_pair(plan, stores, planned, row, patch_px)
        for out, image in zip((lq[row], gt[row]), pair, strict=True):
            dihedral_into(out, image, int(planned.variant[row]))
        if plan.cutblur or plan.channel_shuffle:
            extra = drawn_augmentation(plan, int(planned.seed[row]), patch_px)
            if extra.sharp_box is not None:
                lq[row] = cutblur(lq[row], gt[row], extra.sharp_box, sharp_inside=extra.sharp_inside)
            lq[row], gt[row] = (channel_order(image, extra.channels) for image in (lq[row], gt[row]))
    return PatchBatch(samples=numbers, lq=lq, gt=gt)


def _read_pair(
    plan: SamplePlan, stores: Sequence[PairStore], planned: PlannedSamples, row: int, patch_px: int
) -> Sequence[NDArray[np.uint8]]:
    """lq and gt of one sample, not flipped or turned yet."""
    number, index = int(planned.store[row]), int(planned.pair[row])
    store, blur = stores[number], plan.blurs[number] if plan.blurs else None
    shares = float(planned.top_share[row]), float(planned.left_share[row])
    if blur is None:
        return store.patch(index, *shares, patch_px)
    return blur.patch(
        store, index, patch_box(store.size(index), *shares, patch_px), blur_rng(int(planned.seed[row]))
    )


def slice_numbers(span: Span, part: tuple[int, int], batches: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sample numbers of a rank's slice of the given batches of a span: (N,) → (N, slice)."""
    return span.start + batches[:, None] * span.batch + np.arange(*part)[None, :]


class Begun:
    """Batches of which the first is fetched on a thread, while something else goes on."""

    def __init__(self, span: Span, batches: Generator[PatchBatch, None, None]) -> None:
        self.span, self._batches = span, batches
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="first-batch")
        self._first = self._pool.submit(next, batches, None)
        self._ahead: list[PatchBatch] = []

    def close(self) -> None:
        """End the reading of batches that nobody wants."""
        self._first.result() if self._first is not None else None
        self._batches.close()

    def rehearsed(self, count: int) -> Iterator[PatchBatch]:
        """The first `count`, which come again when the whole is gone through."""
        while len(self._ahead) < count and (batch := self._next()) is not None:
            self._ahead.append(batch)
            yield batch

    def __iter__(self) -> Iterator[PatchBatch]:
        # Not `yield from`: whoever drops this iterator half-way would close the batches with it.
        while (batch := self._ahead.pop(0) if self._ahead else self._next()) is not None:
            yield batch

    def _next(self) -> PatchBatch | None:
        if self._first is None:
            return next(self._batches, None)
        first, self._first = self._first.result(), None
        self._pool.shutdown()
        return first


class Stopwatch:
    """Time spent waiting for the next item of an iterator."""

    def __init__(self) -> None:
        self.waited_s = self.first_s = 0.0
        self._begin = self._end = 0.0

    def over(self, batches: Iterator[PatchBatch]) -> Iterator[PatchBatch]:
        self._begin = time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._end = time.perf_counter()
            self.waited_s += self._end - start
            if batch is None:
                return
            if not self.first_s:
                self.first_s = self.waited_s
            yield batch

    @property
    def share(self) -> float:
        """Part of the time after the first batch that was spent waiting."""
        after_first_s = self._end - self._begin - self.first_s
        return (self.waited_s - self.first_s) / after_first_s if after_first_s > 0 else 0.0
