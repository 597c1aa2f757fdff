from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nafnet_core import InputError
from nafnet_core.transforms import dihedral
from pipelines import ingest
from pipelines.config import DataSection, StoreSection
from pipelines.ingest import (
    Begun,
    PatchBatch,
    Span,
    Stopwatch,
    check_patches,
    plan_for,
    read_patches,
    slice_numbers,
)
from pipelines.plan import SamplePlan, drawn_augmentation, rank_slice
from pipelines.store import PairStore

SPAN = Span(start=40, num_batches=13, batch=5, patch_px=16)


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


def test_stopwatch_counts_only_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(ingest.time, "perf_counter", lambda: next(clock))
    watch, items = Stopwatch(), []
    for item in watch.over(iter([1, 2, 3])):  # type: ignore[arg-type]
        items.append(item)
        next(clock)  # a step of training
    assert items == [1, 2, 3]
    # Three items and the end, one tick each; the three steps between do not count.
    assert (watch.waited_s, watch.first_s) == (4, 1)
    # It begins at 0, has the first at 2 and ends at 11; the tick before the first request belongs to it too.
    assert watch.share == pytest.approx(3 / 10)


def test_batches_that_were_rehearsed_come_again() -> None:
    none = np.empty((0, 16, 16, 3), np.uint8)
    batches = [PatchBatch(samples=np.array([number]), lq=none, gt=none) for number in range(5)]
    span = Span(start=0, num_batches=5, batch=1, patch_px=16)
    begun = Begun(span, (batch for batch in batches))
    assert list(begun.rehearsed(2)) == batches[:2]
    assert list(begun) == batches
    assert list(Begun(span, (batch for batch in batches))) == batches
    assert list(Begun(span, (batch for batch in batches[:0]))) == []
    unwanted = Begun(span, (batch for batch in batches))
    unwanted.close()
    assert list(unwanted) == batches[:1]
