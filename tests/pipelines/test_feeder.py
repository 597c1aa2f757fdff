from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nafnet_core import InputError
from pipelines.config import BlurSection, DataSection, StoreSection
from pipelines.feeder import Reading, ray_batches
from pipelines.ingest import PatchBatch, Span, plan_for, read_patches, slice_numbers
from pipelines.plan import SamplePlan, rank_slice
from pipelines.store import PairStore

SPAN = Span(start=40, num_batches=13, batch=5, patch_px=16)
PLAN = SamplePlan(seed=0, store_pairs=(9,), weights=(1.0,), window_pairs=9)
Mixture = tuple[SamplePlan, list[PairStore]]
Read = Callable[..., Iterator[PatchBatch]]


def assert_same(one: PatchBatch, other: PatchBatch) -> None:
    assert np.array_equal(one.samples, other.samples)
    assert one.lq.dtype == one.gt.dtype == np.uint8
    assert np.array_equal(one.lq, other.lq) and np.array_equal(one.gt, other.gt)


# Who reads what


@given(
    num_batches=st.integers(1, 3000),
    slice_size=st.integers(1, 64),
    patch_px=st.sampled_from([16, 128, 512]),
    num_readers=st.integers(1, 5),
    first_share=st.floats(0, 0.99),
)
def test_readers_together_read_every_batch_once_in_order(
    num_batches: int, slice_size: int, patch_px: int, num_readers: int, first_share: float
) -> None:
    first, block_bytes = int(first_share * num_batches), 8 * 2**20
    span = Span(start=0, num_batches=num_batches, batch=64, patch_px=patch_px)
    reading = Reading(
        plan=PLAN, roots=(), span=span, part=(0, slice_size), first=first, num_readers=num_readers,
        reader_cpus=0.1, block_bytes=block_bytes, cache_gib=1.0,
    )  # fmt: skip
    each = [list(reading.turns_of(reader)) for reader in range(reading.busy_readers)]
    assert all(each) and len(each) <= num_readers
    turns = dict(turn for turns in each for turn in turns)
    assert sorted(turns) == list(range(len(turns)))
    batches = [turns[number] for number in range(len(turns))]
    assert np.array_equal(np.concatenate(batches), np.arange(first, num_batches))
    assert len(batches[0]) == 1
    assert all(len(b) == 1 or len(b) * slice_size * patch_px**2 * 6 <= block_bytes for b in batches)


# Through Ray


@pytest.fixture(scope="module")
def read(mixture: Mixture, ray_session: None) -> Read:
    """Read one rank's batches of a span."""
    plan, stores = mixture

    def read(
        span: Span, rank: int, world_size: int, *, roots: list[Any] | None = None, num_readers: int = 2
    ) -> Iterator[PatchBatch]:
        roots = roots or [store.root for store in stores]
        return ray_batches(
            plan, roots, span, rank=rank, world_size=world_size, num_readers=num_readers, reader_cpus=0.1
        )

    return read


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in a short span."""
    monkeypatch.setattr("pipelines.feeder._MAX_BLOCK_BYTES", 4 * 5 * 16 * 16 * 6)


@pytest.mark.ray
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("rank", "world_size", "num_readers"), [(0, 1, 1), (0, 1, 3), (1, 2, 2), (2, 3, 1), (3, 4, 2)]
)
def test_batches_are_those_of_the_plan(
    read: Read, mixture: Mixture, rank: int, world_size: int, num_readers: int
) -> None:
    plan, stores = mixture
    part = rank_slice(SPAN.batch, rank, world_size)
    batches = list(read(SPAN, rank, world_size, num_readers=num_readers))
    assert len(batches) == SPAN.num_batches
    for number, batch in enumerate(batches):
        expected = slice_numbers(SPAN, part, np.array([number]))[0]
        assert_same(batch, read_patches(plan, stores, expected, SPAN.patch_px))


@pytest.mark.ray
def test_a_span_may_be_too_short_for_all_readers(read: Read) -> None:
    few = replace(SPAN, num_batches=2)
    assert [batch.samples.tolist() for batch in read(few, 0, 1, num_readers=4)] == [
        slice_numbers(few, (0, SPAN.batch), np.array([number]))[0].tolist() for number in range(2)
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("small_blocks", "ray_session")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_blur_made_on_the_fly_is_the_same_whoever_makes_it(store: PairStore, world_size: int) -> None:
    blur = BlurSection(kinds=("shake", "varying", "gaussian"), sharp_share=0.2, min_jpeg_quality=50)
    sections = (StoreSection(path=store.root, blur=blur), StoreSection(path=store.root, weight=0.5))
    plan = plan_for(DataSection(train=sections), seed=3)
    rank = world_size - 1
    batches = list(
        ray_batches(
            plan, [store.root] * 2, SPAN, rank=rank, world_size=world_size, num_readers=1 + rank % 3,
            reader_cpus=0.1,
        )
    )  # fmt: skip
    assert len(batches) == SPAN.num_batches
    alone = read_patches(plan, [store, store], np.arange(SPAN.start, SPAN.start + 13 * 5), 16)
    for number, batch in enumerate(batches):
        start, stop = (5 * number + edge for edge in rank_slice(5, rank, world_size))
        mine = {name: getattr(alone, name)[start:stop] for name in ("samples", "lq", "gt")}
        assert_same(batch, PatchBatch(**mine))


@pytest.mark.ray
def test_reading_can_start_in_the_middle(read: Read, mixture: Mixture) -> None:
    # A run that is resumed starts where it stopped, in the middle of an epoch.
    plan, stores = mixture
    rest = Span(start=10 * plan.epoch_samples + 7, num_batches=4, batch=5, patch_px=16)
    for number, batch in enumerate(read(rest, 0, 1)):
        assert_same(batch, read_patches(plan, stores, np.arange(5) + rest.start + 5 * number, 16))
    assert number == 3


@pytest.mark.ray
@pytest.mark.usefixtures("small_blocks")
def test_every_pair_comes_once_an_epoch(read: Read, mixture: Mixture) -> None:
    plan, _ = mixture
    span = Span(start=0, num_batches=3 * plan.epoch_samples // 5, batch=5, patch_px=16)
    numbers = np.concatenate([batch.samples for batch in read(span, 0, 1)])
    assert np.array_equal(numbers, np.arange(3 * plan.epoch_samples))
    for epoch in np.split(numbers, 3):
        planned = plan.samples(epoch)
        times = Counter(zip(planned.store.tolist(), planned.pair.tolist(), strict=True))
        assert set(times.values()) == {1, 2}  # the second store is visited twice


@pytest.mark.ray
def test_stopping_early_leaves_nobody_behind(read: Read) -> None:
    # A budget in minutes ends where it ends; nothing may hang on what was read ahead.
    batches = read(Span(start=0, num_batches=100_000, batch=5, patch_px=16), 0, 1)
    assert next(batches).samples.tolist() == [0, 1, 2, 3, 4]
    assert _processes("Feeder") and _processes("MapWorker")
    batches.close()
    _until(lambda: not _processes("Feeder") and not _processes("MapWorker"))


@pytest.mark.ray
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("who", ["MapWorker", "Feeder"])
def test_a_process_killed_is_replaced(read: Read, mixture: Mixture, who: str) -> None:
    plan, stores = mixture
    long = replace(SPAN, num_batches=400)
    batches = []
    for number, batch in enumerate(read(long, 0, 1)):
        batches.append(PatchBatch(samples=batch.samples, lq=batch.lq.copy(), gt=batch.gt.copy()))
        if number == 3:
            os.kill(_processes(who)[0].pid, signal.SIGKILL)
            time.sleep(1)  # until it is known to be dead
    assert [int(batch.samples[0]) for batch in batches] == [long.start + 5 * n for n in range(400)]
    for batch in batches[::37]:
        assert_same(batch, read_patches(plan, stores, batch.samples, 16))


@pytest.mark.ray
@pytest.mark.parametrize("damage", ["missing", "overwritten"])
def test_damaged_shard_is_one_line_for_the_trainer(
    read: Read, own_store: Path, mixture: Mixture, damage: str
) -> None:
    shard = own_store / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    roots = [own_store, mixture[1][1].root]
    with pytest.raises(InputError, match=r"missing or damaged shard: '.*shard-00001\.parquet'") as caught:
        for _ in read(SPAN, 0, 1, roots=roots):
            pass
    assert "\n" not in str(caught.value)


def _processes(name: str) -> list[psutil.Process]:
    """Ray's processes of this name, below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ray::{name}" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
