from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nafnet_core import InputError
from nafnet_core.transforms import dihedral
from pipelines import ingest
from pipelines.config import DataSection, StoreSection
from pipelines.ingest import (
    PatchBatch,
    Span,
    Stopwatch,
    WindowSource,
    check_patches,
    plan_for,
    ray_batches,
    read_patches,
    slice_numbers,
    windows,
)
from pipelines.plan import SamplePlan, drawn_augmentation, rank_slice
from pipelines.sources import FolderPairs
from pipelines.store import PairStore
from tests.pipelines.pairs import make_store

SPAN = Span(start=40, num_batches=13, batch=5, patch_px=16)


@pytest.fixture(scope="module")
def mixture(
    pairs: FolderPairs, store: PairStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SamplePlan, list[PairStore]]:
    """Two stores: crops in Parquet, whole images in LMDB; the second visited twice an epoch."""
    whole = make_store(
        pairs, tmp_path_factory.mktemp("whole") / "store", crop_px=None, format="lmdb", codec="raw"
    )
    sections = (StoreSection(path=store.root), StoreSection(path=whole.root, weight=2.0))
    return plan_for(DataSection(train=sections), seed=11), [store, whole]


def assert_same(one: PatchBatch, other: PatchBatch) -> None:
    assert np.array_equal(one.samples, other.samples)
    assert one.lq.dtype == one.gt.dtype == np.uint8
    assert np.array_equal(one.lq, other.lq) and np.array_equal(one.gt, other.gt)


# Plan and patches


def test_plan_of_a_mixture(mixture: tuple[SamplePlan, list[PairStore]]) -> None:
    plan, _ = mixture
    assert (plan.seed, plan.store_pairs, plan.weights) == (11, (45, 5), (1.0, 2.0))
    assert plan.epoch_samples == 55


def test_plan_follows_the_configuration(store: PairStore) -> None:
    section = DataSection(train=(StoreSection(path=store.root),), shuffle_window_pairs=9, augment=False)
    plan = plan_for(section, seed=0)
    assert (plan.window_pairs, plan.augment) == (9, False)


def test_plan_of_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such store"):
        plan_for(DataSection(train=(StoreSection(path=tmp_path / "nothing"),)), seed=0)


def test_patches_must_fit(store: PairStore) -> None:
    section = DataSection(train=(StoreSection(path=store.root),))
    check_patches(section, 32)
    with pytest.raises(InputError, match=r"larger than the pairs.*at most 32 px, got 33 px.*patch_px"):
        check_patches(section, 33)


def test_patches_are_crops_of_the_planned_pairs(mixture: tuple[SamplePlan, list[PairStore]]) -> None:
    plan, stores = mixture
    numbers = np.array([0, 1, 2, 54, 55, 7, 1000, 10**7])
    batch, planned = read_patches(plan, stores, numbers, 16), plan.samples(numbers)
    assert batch.lq.shape == batch.gt.shape == (8, 16, 16, 3)
    assert np.array_equal(batch.samples, numbers)
    assert set(planned.store) == {0, 1} and len(set(planned.variant)) > 2
    for row in range(8):
        pair = stores[planned.store[row]].pair(int(planned.pair[row]))
        height, width = pair.lq.shape[:2]
        top = int(planned.top_share[row] * (height - 15))
        left = int(planned.left_share[row] * (width - 15))
        for side, patches in ((pair.lq, batch.lq), (pair.gt, batch.gt)):
            crop = side[top : top + 16, left : left + 16]
            assert np.array_equal(patches[row], dihedral(crop, int(planned.variant[row])))
    assert not np.array_equal(batch.lq, batch.gt)


def test_cutblur_and_channel_shuffle_change_patches_as_planned(store: PairStore) -> None:
    section = DataSection(train=(StoreSection(path=store.root),), cutblur=0.5, channel_shuffle=0.5)
    plan, numbers = plan_for(section, seed=3), np.arange(60)
    plain = read_patches(
        plan_for(section.model_copy(update={"cutblur": 0.0, "channel_shuffle": 0.0}), seed=3),
        [store],
        numbers,
        24,
    )
    batch, seeds = read_patches(plan, [store], numbers, 24), plan.samples(numbers).seed
    seen = set()
    for row in range(60):
        extra = drawn_augmentation(plan, int(seeds[row]), 24)
        order = list(permutations(range(3)))[extra.channels]
        assert np.array_equal(batch.gt[row], plain.gt[row][..., order])
        mixed = plain.lq[row].copy()
        if extra.sharp_box is not None:
            top, left, height, width = extra.sharp_box
            sharp = np.zeros((24, 24), bool)
            sharp[top : top + height, left : left + width] = True
            sharp = sharp if extra.sharp_inside else ~sharp
            mixed[sharp] = plain.gt[row][sharp]
        assert np.array_equal(batch.lq[row], mixed[..., order])
        seen.add((extra.channels != 0, extra.sharp_box is not None))
    assert len(seen) == 4
    assert np.array_equal(read_patches(plan, [store], numbers[40:41], 24).lq[0], batch.lq[40])


def test_a_patch_as_large_as_the_pair(store: PairStore) -> None:
    plan = plan_for(DataSection(train=(StoreSection(path=store.root),), augment=False), seed=0)
    batch, planned = read_patches(plan, [store], np.arange(10), 32), plan.samples(np.arange(10))
    for row in range(10):
        assert np.array_equal(batch.gt[row], store.pair(int(planned.pair[row])).gt)


# Slices and windows


def test_slice_numbers_by_hand() -> None:
    span = Span(start=100, num_batches=9, batch=8, patch_px=16)
    assert slice_numbers(span, (2, 5), np.array([0, 3])).tolist() == [[102, 103, 104], [126, 127, 128]]


@given(
    start=st.integers(0, 10**9),
    num_batches=st.integers(1, 40),
    batch=st.integers(4, 33),
    world_size=st.integers(1, 4),
)
def test_ranks_together_read_every_batch_once(
    start: int, num_batches: int, batch: int, world_size: int
) -> None:
    span = Span(start=start, num_batches=num_batches, batch=batch, patch_px=16)
    numbers = [
        slice_numbers(span, rank_slice(batch, rank, world_size), np.arange(num_batches))
        for rank in range(world_size)
    ]
    # The same samples in the same order for any number of workers, batch by batch.
    alone = np.arange(start, start + num_batches * batch).reshape(num_batches, batch)
    assert np.array_equal(np.concatenate(numbers, axis=1), alone)


@given(
    start=st.integers(0, 10**6),
    num_batches=st.integers(1, 3000),
    batch=st.integers(1, 64),
    patch_px=st.sampled_from([16, 128, 512]),
)
def test_windows_tile_a_span(start: int, num_batches: int, batch: int, patch_px: int) -> None:
    span = Span(start=start, num_batches=num_batches, batch=batch, patch_px=patch_px)
    cut = list(windows(span, (0, batch)))
    at = start
    for window in cut:
        assert (window.start, window.batch, window.patch_px) == (at, batch, patch_px)
        at += window.num_batches * batch
    assert at == start + num_batches * batch
    lengths = [window.num_batches for window in cut]
    # Small at first, so that training starts soon; then up to a size that memory holds thrice.
    assert lengths[0] <= 4
    assert all(one <= other <= 2 * one for one, other in zip(lengths[:-1], lengths[1:-1], strict=False))
    assert max(lengths) == 1 or max(lengths) * batch * patch_px**2 * 6 <= ingest._WINDOW_BYTES


@pytest.mark.usefixtures("data_context")
def test_blocks_of_a_window_are_its_batches(
    mixture: tuple[SamplePlan, list[PairStore]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, stores = mixture
    part = (1, 4)
    monkeypatch.setattr(ingest, "_BLOCK_BYTES", 4 * 3 * 16 * 16 * 6)  # four batches of three samples
    source = WindowSource(plan, [store.root for store in stores], SPAN, part)
    assert source.num_blocks == 4
    tasks = source.get_read_tasks(99)
    assert [task.metadata.num_rows for task in tasks] == [12, 12, 12, 3]
    assert source.estimate_inmemory_data_size() == sum(task.metadata.size_bytes for task in tasks)
    # One store object a process: LMDB opens a file only once, and `mixture` has it open.
    monkeypatch.setattr(ingest, "opened_store", lambda root: next(s for s in stores if s.root == root))
    samples = [number for task in tasks for block in task() for number in block["sample"].to_pylist()]
    assert samples == slice_numbers(SPAN, part, np.arange(13)).reshape(-1).tolist()


def test_stopwatch_counts_only_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(ingest.time, "perf_counter", lambda: next(clock))
    watch, items = Stopwatch(), []
    for item in watch.over(iter([1, 2, 3])):  # type: ignore[arg-type]
        items.append(item)
        next(clock)  # a step of training
    assert items == [1, 2, 3]
    # Three items and the end, one tick each; the three steps between do not count.
    assert watch.waited_s == 4


# Through Ray


@pytest.fixture(scope="module")
def reading(mixture: tuple[SamplePlan, list[PairStore]], ray_session: None) -> Any:
    """Read one rank's batches of a span."""
    plan, stores = mixture

    def read(span: Span, rank: int, world_size: int, roots: list[Path] | None = None) -> Iterator[PatchBatch]:
        return ray_batches(
            plan,
            roots or [store.root for store in stores],
            span,
            rank=rank,
            world_size=world_size,
            num_readers=2,
            reader_cpus=0.2,
        )

    return read


@pytest.mark.ray
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_batches_through_ray_are_those_of_the_plan(
    reading: Any, mixture: tuple[SamplePlan, list[PairStore]], rank: int, world_size: int
) -> None:
    plan, stores = mixture
    part = rank_slice(SPAN.batch, rank, world_size)
    batches = list(reading(SPAN, rank, world_size))
    assert len(batches) == SPAN.num_batches
    for number, batch in enumerate(batches):
        expected = slice_numbers(SPAN, part, np.array([number]))[0]
        assert_same(batch, read_patches(plan, stores, expected, SPAN.patch_px))


@pytest.mark.ray
def test_reading_can_start_in_the_middle(reading: Any, mixture: tuple[SamplePlan, list[PairStore]]) -> None:
    # A run that is resumed starts where it stopped, in the middle of an epoch.
    plan, stores = mixture
    rest = Span(start=10 * plan.epoch_samples + 7, num_batches=4, batch=5, patch_px=16)
    for number, batch in enumerate(reading(rest, 0, 1)):
        assert_same(batch, read_patches(plan, stores, np.arange(5) + rest.start + 5 * number, 16))
    assert number == 3


@pytest.mark.ray
def test_reading_can_stop_early(reading: Any) -> None:
    # A budget in minutes ends where it ends; nothing may hang on what was read ahead.
    endless = Span(start=0, num_batches=100_000, batch=5, patch_px=16)
    batches = reading(endless, 0, 1)
    assert next(batches).samples.tolist() == [0, 1, 2, 3, 4]
    batches.close()


@pytest.mark.ray
@pytest.mark.parametrize("damage", ["missing", "overwritten"])
def test_damaged_shard_is_one_line_for_the_trainer(
    reading: Any, own_store: Path, mixture: tuple[SamplePlan, list[PairStore]], damage: str
) -> None:
    shard = own_store / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        content[200:-2000] = bytes(len(content) - 2200)
        shard.write_bytes(content)
    roots = [own_store, mixture[1][1].root]
    with pytest.raises(InputError, match=r"missing or damaged shard: '.*shard-00001\.parquet'") as caught:
        for _ in reading(SPAN, 0, 1, roots):
            pass
    assert "\n" not in str(caught.value)
