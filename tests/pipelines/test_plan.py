from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines import plan as module
from pipelines.plan import SEGMENT_PAIRS, PlannedSamples, SamplePlan, drawn_augmentation, rank_slice

ROOT = Path(__file__).resolve().parents[2]


def plan_of(*store_pairs: int, weights: tuple[float, ...] | None = None, **changes: object) -> SamplePlan:
    plan = SamplePlan(
        seed=3, store_pairs=store_pairs, weights=weights or (1.0,) * len(store_pairs), window_pairs=65_536
    )
    return replace(plan, **changes)


def planned(plan: SamplePlan, start: int, stop: int) -> PlannedSamples:
    return plan.samples(np.arange(start, stop))


def epoch(plan: SamplePlan, number: int) -> PlannedSamples:
    return planned(plan, number * plan.epoch_samples, (number + 1) * plan.epoch_samples)


def visits(samples: PlannedSamples, store: int, pairs: int) -> NDArray[np.int64]:
    """How often each pair of a store is visited."""
    return np.bincount(samples.pair[samples.store == store], minlength=pairs)


def assert_equal(one: PlannedSamples, other: PlannedSamples) -> None:
    for field in fields(PlannedSamples):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


def joined(parts: list[PlannedSamples]) -> PlannedSamples:
    return PlannedSamples(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(PlannedSamples)
        }
    )


# Of `plan_of(600, 50, weights=(1.0, 0.5), window_pairs=400)` at samples 0, 1, 2, 624, 625 and 10^9.
GOLDEN = {
    "store": [0, 0, 1, 0, 0, 0],
    "pair": [332, 43, 15, 552, 355, 588],
    "variant": [3, 1, 5, 4, 2, 5],
    "seed": [
        2618719934470416154,
        1449761762294997915,
        15953835577464547507,
        1957929105581877713,
        1756592741336929776,
        17601718867814228342,
    ],
    "top_share": [
        0.7400963480618715,
        0.3521428358194809,
        0.134733123002995,
        0.7891081284740457,
        0.05878690864189762,
        0.023044602179287277,
    ],
    "left_share": [
        0.8483457319721872,
        0.1814881831420363,
        0.02854340948594758,
        0.04014261030079502,
        0.8496091694630021,
        0.939687153232332,
    ],
}


# Small segments, so that a small plan has many of them.
@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "SEGMENT_PAIRS", 8)
    module._epoch_order.cache_clear()
    yield
    module._epoch_order.cache_clear()


PLANS = [
    plan_of(7),
    plan_of(700),
    plan_of(1500, 40, weights=(0.4, 2.0), window_pairs=300),
    plan_of(3, 600, 1, weights=(1.0, 0.3, 5.0), window_pairs=1),
]


# A pure function of the sample's number


@settings(deadline=None, max_examples=60)
@given(
    plan=st.sampled_from(PLANS),
    start=st.integers(0, 5000),
    cuts=st.lists(st.integers(0, 300), max_size=6),
)
def test_any_split_gives_the_same_samples(plan: SamplePlan, start: int, cuts: list[int]) -> None:
    edges = sorted({0, 300, *cuts})
    parts = [planned(plan, start + a, start + b) for a, b in zip(edges, edges[1:], strict=False)]
    assert_equal(joined(parts), planned(plan, start, start + 300))


@settings(deadline=None, max_examples=60)
@given(
    plan=st.sampled_from(PLANS),
    numbers=st.lists(st.integers(0, 4000), min_size=1, max_size=50),
    data=st.data(),
)
def test_any_order_gives_the_same_samples(plan: SamplePlan, numbers: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(numbers))
    one, other = plan.samples(np.array(numbers)), plan.samples(np.array(shuffled))
    order = np.argsort(numbers, kind="stable"), np.argsort(shuffled, kind="stable")
    for field in fields(PlannedSamples):
        values = getattr(one, field.name)[order[0]], getattr(other, field.name)[order[1]]
        assert np.array_equal(*values), field.name
    assert np.array_equal(one.sample, numbers)


def test_no_samples() -> None:
    assert len(plan_of(7).samples(np.arange(0)).pair) == 0


def test_another_process_plans_the_same() -> None:
    code = (
        "import numpy as np; from tests.pipelines.test_plan import PLANS; "
        "s = PLANS[2].samples(np.arange(700, 720)); print(s.pair.tolist(), s.seed.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    here = planned(PLANS[2], 700, 720)
    assert done.stdout.strip() == f"{here.pair.tolist()} {here.seed.tolist()}"


def test_golden_values() -> None:
    # A run that is resumed reads on from the plan: if these change, it reads other data than it would have.
    # Then say so in CHANGELOG.md, and let checkpoints of before be refused.
    plan = plan_of(600, 50, weights=(1.0, 0.5), window_pairs=400)
    samples = plan.samples(np.array([0, 1, 2, 624, 625, 10**9]))
    assert {name: getattr(samples, name).tolist() for name in GOLDEN} == GOLDEN


# Every pair its turns


@pytest.mark.parametrize("pairs", [1, 2, 7, 255, 256, 257, 1000])
@pytest.mark.parametrize("window", [1, 100, 65_536])
def test_an_epoch_visits_every_pair_once(pairs: int, window: int) -> None:
    plan = plan_of(pairs, window_pairs=window)
    assert plan.epoch_samples == pairs
    for number in (0, 1, 5):
        assert (visits(epoch(plan, number), 0, pairs) == 1).all()


def test_a_mixture_visits_every_store_by_its_weight() -> None:
    plan = plan_of(300, 40, 9, weights=(1.0, 2.0, 3.0), window_pairs=128)
    assert plan.epoch_samples == 300 + 80 + 27
    for number in (0, 3):
        samples = epoch(plan, number)
        for store, (pairs, weight) in enumerate(((300, 1), (40, 2), (9, 3))):
            assert (visits(samples, store, pairs) == weight).all()
    # The stores are mixed and not read one after the other.
    stores = epoch(plan, 0).store
    assert (np.diff(stores) != 0).sum() > 10


@pytest.mark.parametrize("pairs", [10, 300, 1000])
def test_a_part_of_a_store_goes_on_where_the_last_epoch_left_it(pairs: int) -> None:
    plan = plan_of(pairs, weights=(0.4,), window_pairs=128)
    assert plan.epoch_samples == 0.4 * pairs
    total = np.zeros(pairs, int)
    for number in range(5):
        visited = visits(epoch(plan, number), 0, pairs)
        assert visited.max() == 1 and visited.sum() == 0.4 * pairs
        total += visited
    # Five times 0.4 is twice all, and no pair is preferred.
    assert (total == 2).all()


@given(pairs=st.integers(1, 400), weight=st.floats(0.001, 4), epochs=st.integers(1, 5))
def test_no_pair_is_preferred_whatever_the_weight(pairs: int, weight: float, epochs: int) -> None:
    plan = plan_of(pairs, weights=(weight,), window_pairs=64)
    quota = max(1, round(pairs * weight))
    assert plan.epoch_samples == quota
    total = visits(planned(plan, 0, epochs * quota), 0, pairs)
    assert total.sum() == epochs * quota
    assert total.max() - total.min() <= 1


# Shuffling


def test_epochs_and_seeds_differ() -> None:
    plan = plan_of(500)
    orders = [epoch(plan, number).pair for number in range(3)]
    orders += [epoch(replace(plan, seed=seed), 0).pair for seed in (0, 4, 2**63 - 1)]
    for one in range(len(orders)):
        for other in range(one):
            # Two shuffles agree in about one place.
            assert (orders[one] == orders[other]).sum() < 10
    corners = [epoch(plan, 0).top_share, epoch(plan, 1).top_share, epoch(replace(plan, seed=4), 0).top_share]
    assert not any(np.isin(corners[a], corners[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.usefixtures("small_segments")
def test_windows_are_disjoint_pieces() -> None:
    # A remote store is read in pieces: the pairs of one window lie in few runs, and no other window's do.
    plan = plan_of(400, window_pairs=80)
    pair = epoch(plan, 2).pair
    pieces = [set(pair[start : start + 80].tolist()) for start in range(0, 400, 80)]
    assert sum(len(piece) for piece in pieces) == len(set().union(*pieces)) == 400
    for piece in pieces:
        assert {number // 8 for number in piece} == {number // 8 for number in piece if number % 8 == 0}
        assert len({number // 8 for number in piece}) == 10
    # Inside, pairs of all the runs are mixed: neighbours are rarely from the same.
    runs = pair[:80] // 8
    assert (np.diff(runs) == 0).mean() < 0.3
    # Another epoch has other windows.
    assert set(epoch(plan, 3).pair[:80].tolist()) not in pieces


@pytest.mark.usefixtures("small_segments")
def test_windows_of_a_mixture_hold_every_store() -> None:
    plan = plan_of(400, 100, window_pairs=250)
    stores = epoch(plan, 0).store
    for start in (0, 250):
        assert 10 < (stores[start : start + 250] == 1).sum() < 90


def test_one_window_shuffles_everything() -> None:
    pair = epoch(plan_of(4000), 0).pair
    # Rank correlation of place and pair, none for a shuffle; three standard deviations.
    assert abs(np.corrcoef(np.arange(4000), pair)[0, 1]) < 3 / np.sqrt(4000)


# Patch, variant, seed


def test_corners_and_variants_cover_their_ranges_evenly() -> None:
    samples = planned(plan_of(5000), 0, 40_000)
    for shares in (samples.top_share, samples.left_share):
        assert shares.min() >= 0 and shares.max() < 1
        counts = np.histogram(shares, bins=10, range=(0, 1))[0]
        assert np.abs(counts - 4000).max() < 5 * np.sqrt(4000)
    counts = np.bincount(samples.variant, minlength=8)
    assert len(counts) == 8 and np.abs(counts - 5000).max() < 5 * np.sqrt(5000)
    assert len(np.unique(samples.seed)) == 40_000
    columns = [samples.top_share, samples.left_share, samples.variant, samples.seed / 2.0**64]
    correlations = np.corrcoef(columns) - np.eye(4)
    assert np.abs(correlations).max() < 5 / np.sqrt(40_000)


def test_without_augmentation_only_the_variant_changes() -> None:
    plan = plan_of(300)
    plain = epoch(replace(plan, augment=False), 1)
    assert not plain.variant.any()
    assert_equal(replace(epoch(plan, 1), variant=plain.variant), plain)


def test_types() -> None:
    samples = epoch(plan_of(300), 0)
    for name in ("sample", "store", "pair", "variant"):
        assert getattr(samples, name).dtype == np.int64
    assert samples.seed.dtype == np.uint64
    assert samples.top_share.dtype == samples.left_share.dtype == np.float64


# Ranks


@given(batch=st.integers(1, 300), world_size=st.integers(1, 64))
def test_slices_cut_a_batch_evenly(batch: int, world_size: int) -> None:
    slices = [rank_slice(batch, rank, world_size) for rank in range(world_size)]
    assert slices[0][0] == 0 and slices[-1][1] == batch
    assert all(one[1] == other[0] for one, other in zip(slices, slices[1:], strict=False))
    sizes = [stop - start for start, stop in slices]
    assert max(sizes) - min(sizes) <= 1
    # A rank without a sample would wait in vain for its batch.
    assert min(sizes) >= 1 or batch < world_size


def test_uneven_slices_by_hand() -> None:
    assert [rank_slice(8, rank, 3) for rank in range(3)] == [(0, 2), (2, 5), (5, 8)]


# Colour and CutBlur


def test_augmentation_is_drawn_as_often_as_asked_and_inside_the_patch() -> None:
    plan = plan_of(100, cutblur=0.3, channel_shuffle=0.6)
    drawn = [drawn_augmentation(plan, int(seed), 64) for seed in planned(plan, 0, 2000).seed]
    boxes = [extra.sharp_box for extra in drawn if extra.sharp_box is not None]
    assert len(boxes) / 2000 == pytest.approx(0.3, abs=0.05)
    for top, left, height, width in boxes:
        assert 0 <= top and top + height <= 64 and 0 <= left and left + width <= 64
        assert min(height, width) >= 6
    assert np.mean([box[2] for box in boxes]) == pytest.approx(0.7 * 64, abs=2)
    assert {extra.sharp_inside for extra in drawn if extra.sharp_box} == {True, False}
    # One order in six is the usual one.
    assert np.mean([extra.channels != 0 for extra in drawn]) == pytest.approx(0.6 * 5 / 6, abs=0.05)
    assert {extra.channels for extra in drawn} == set(range(6))


def test_augmentation_is_a_function_of_the_samples_seed() -> None:
    plan = plan_of(100, cutblur=1.0, channel_shuffle=1.0)
    seeds = [0, 1, 2**63, 2**63 + 1, 2**64 - 1]
    drawn = [drawn_augmentation(plan, seed, 64) for seed in seeds]
    assert drawn == [drawn_augmentation(plan, seed, 64) for seed in seeds]
    assert len({extra.sharp_box for extra in drawn}) == len(seeds)


@pytest.mark.parametrize("patch_px", [1, 2, 7])
def test_augmentation_of_tiny_patches(patch_px: int) -> None:
    plan = plan_of(100, cutblur=1.0)
    for seed in range(50):
        box = drawn_augmentation(plan, seed, patch_px).sharp_box
        assert box is not None and box[0] + box[2] <= patch_px and box[1] + box[3] <= patch_px


def test_augmentation_leaves_the_rest_of_the_plan_alone() -> None:
    assert_equal(planned(plan_of(100), 0, 50), planned(plan_of(100, cutblur=0.5, channel_shuffle=0.5), 0, 50))


def test_a_ramp_begins_with_few_pieces_and_loses_nothing() -> None:
    plan = SamplePlan(seed=1, store_pairs=(60_000,), weights=(1.0,), window_pairs=16_384, ramp=True)
    first, second = (plan.samples(np.arange(60_000) + epoch * 60_000).pair for epoch in (0, 1))
    assert len(np.unique(first)) == len(np.unique(second)) == 60_000
    assert len(np.unique(first[:32] // SEGMENT_PAIRS)) <= 8 < len(np.unique(second[:32] // SEGMENT_PAIRS))
    assert len(np.unique(first[40_000:40_032] // SEGMENT_PAIRS)) > 8
