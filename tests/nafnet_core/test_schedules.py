from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nafnet_core.schedules import ScheduleKind, learning_rate

TOTAL, BASE, FINAL = 10_000, 1e-3, 1e-7
DECAYING: list[ScheduleKind] = ["cosine", "linear", "exponential"]
STEP: dict[str, Any] = {"kind": "step", "decay": 0.5, "milestones": (0.5, 0.8)}
EVERY: dict[str, Any] = {"kind": "step", "decay": 0.5, "step_samples": 3_000}
ALL: list[dict[str, Any]] = [*({"kind": kind} for kind in DECAYING), STEP, EVERY, {"kind": "constant"}]


def rate(samples: int, **options: Any) -> float:
    return learning_rate(samples, total_samples=TOTAL, base=BASE, final=FINAL, **options)


@pytest.mark.parametrize("kind", DECAYING)
@pytest.mark.parametrize("warmup_samples", [0, 1, 777])
def test_ends(kind: ScheduleKind, warmup_samples: int) -> None:
    options = {"kind": kind, "warmup_samples": warmup_samples}
    assert rate(warmup_samples, **options) == pytest.approx(BASE, rel=1e-12)
    assert rate(TOTAL, **options) == pytest.approx(FINAL, rel=1e-9)


@pytest.mark.parametrize("options", ALL, ids=lambda options: options["kind"])
def test_rate_stays_at_its_end_past_the_budget(options: dict[str, Any]) -> None:
    # The last batch may carry the run a little over its budget.
    assert rate(TOTAL + 999, **options) == rate(TOTAL, **options)


@pytest.mark.parametrize(
    ("kind", "half_way"),
    [
        ("cosine", (BASE + FINAL) / 2),
        ("linear", (BASE + FINAL) / 2),
        ("exponential", math.sqrt(BASE * FINAL)),
    ],
)
def test_half_way_by_hand(kind: ScheduleKind, half_way: float) -> None:
    assert rate(TOTAL // 2, kind=kind) == pytest.approx(half_way, rel=1e-9)
    # With a warm-up the schedule runs over what is left.
    assert rate(2_000 + 4_000, kind=kind, warmup_samples=2_000) == pytest.approx(half_way, rel=1e-9)


def test_cosine_is_the_papers() -> None:
    # Loshchilov & Hutter 2017, equation 5, at a third of the run.
    expected = FINAL + 0.5 * (BASE - FINAL) * (1 + math.cos(math.pi * 3_000 / TOTAL))
    assert rate(3_000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("options", ALL, ids=lambda options: options["kind"])
def test_rate_never_rises_after_the_warm_up(options: dict[str, Any]) -> None:
    rates = [rate(samples, warmup_samples=500, **options) for samples in range(500, TOTAL + 1, 50)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))
    if options["kind"] in DECAYING:
        assert len(set(rates)) == len(rates)


@pytest.mark.parametrize("options", ALL, ids=lambda options: options["kind"])
def test_warm_up_rises_in_equal_steps(options: dict[str, Any]) -> None:
    rates = [rate(samples, warmup_samples=4, **options) for samples in range(5)]
    assert rates[:4] == pytest.approx([BASE / 4, BASE / 2, 3 * BASE / 4, BASE])
    assert rates[4] == pytest.approx(BASE)
    assert min(rates) > 0, "a step with rate zero is wasted"


def test_step_falls_at_its_milestones() -> None:
    around = [0, 4_999, 5_000, 7_999, 8_000, TOTAL]
    expected = [BASE, BASE, BASE / 2, BASE / 2, BASE / 4, BASE / 4]
    assert [rate(samples, **STEP) for samples in around] == pytest.approx(expected)


def test_milestones_count_from_the_start_of_the_run() -> None:
    # They are fractions of the budget, warm-up included.
    assert rate(4_999, warmup_samples=1_000, **STEP) == pytest.approx(BASE)
    assert rate(5_000, warmup_samples=1_000, **STEP) == pytest.approx(BASE / 2)


def test_step_without_milestones_is_constant() -> None:
    assert {rate(samples, kind="step") for samples in range(0, TOTAL, 500)} == {BASE}


@given(
    samples=st.integers(0, 2 * TOTAL),
    warmup_samples=st.integers(0, TOTAL),
    options=st.sampled_from(ALL),
)
def test_rate_is_a_pure_function_within_its_bounds(
    samples: int, warmup_samples: int, options: dict[str, Any]
) -> None:
    first = rate(samples, warmup_samples=warmup_samples, **options)
    # Resuming asks for one sample without having asked for those before it.
    for earlier in (0, TOTAL, samples // 2):
        rate(earlier, warmup_samples=warmup_samples, **options)
    assert rate(samples, warmup_samples=warmup_samples, **options) == first
    lowest = min(FINAL, BASE / max(1, warmup_samples))
    assert lowest * (1 - 1e-9) <= first <= BASE * (1 + 1e-9)


def test_final_may_be_zero() -> None:
    assert rate_to_zero(TOTAL, "cosine") == rate_to_zero(TOTAL, "linear") == 0.0
    assert rate_to_zero(TOTAL - 1, "linear") > 0


def rate_to_zero(samples: int, kind: ScheduleKind) -> float:
    return learning_rate(samples, total_samples=TOTAL, base=BASE, final=0.0, kind=kind)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'plateau'"):
        rate(0, kind="plateau")


def test_step_falls_every_so_many_samples() -> None:
    rates = [
        rate(samples, **EVERY) / BASE for samples in (0, 2_999, 3_000, 5_999, 6_000, 9_000, 10_000, 12_000)
    ]
    # Beyond the budget nothing falls any more.
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.125, 0.125, 0.125]
