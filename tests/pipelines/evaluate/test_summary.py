"""Means, percentiles and groups, on scores that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluate.drawing import error_map, median_of, most_different, worst_and_best
from pipelines.evaluate.summary import by_blur, by_scene, distributions, means, percentiles
from pipelines.scoring import ImageScore


def score(key: str, *, scene: str = "s", gain_db: float = 1.0, lost: float | None = 0.5) -> ImageScore:
    return ImageScore(
        key=key,
        scene=scene,
        height_px=20,
        width_px=20,
        psnr_blurred_db=25.0,
        psnr_restored_db=25.0 + gain_db,
        ssim_blurred=0.8,
        ssim_restored=None if key == "tiny" else 0.9,
        detail_lost=lost,
    )


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(0).normal(size=57)
    found = percentiles(values.tolist())
    assert found.min == values.min() and found.max == values.max()
    assert found.p50 == pytest.approx(np.median(values))
    ranked, place = np.sort(values), 0.05 * 56
    assert found.p5 == pytest.approx(ranked[2] + (place - 2) * (ranked[3] - ranked[2]))


def test_means_are_over_the_images_that_have_the_score() -> None:
    found = means([score("a", gain_db=1), score("tiny", gain_db=4)])
    assert found["psnr_restored_db"] == 27.5 and found["ssim_restored"] == 0.9
    assert found["perceptual_restored"] is None and "detail_lost" not in found
    assert "ssim_restored" not in distributions([score("tiny")])
    with pytest.raises(ValueError, match="no images"):
        means([])


def test_scenes_by_name() -> None:
    scores = [
        score("1", scene="b", gain_db=1),
        score("2", scene="a", gain_db=3),
        score("3", scene="b", gain_db=2),
    ]
    groups = by_scene(scores)
    assert [(group.name, group.num_images, group.gain_db) for group in groups] == [
        ("a", 1, 3.0),
        ("b", 2, 1.5),
    ]
    assert sum(group.num_images for group in groups) == len(scores)


def test_thirds_by_the_strength_of_the_blur() -> None:
    strengths = [0.9, 0.1, 0.5, 0.2, 0.6, 0.8, 0.3]
    scores = [score(str(number), lost=lost) for number, lost in enumerate(strengths)]
    groups = by_blur([*scores, score("flat", lost=None)])
    assert [(group.name, group.num_images, group.detail_lost) for group in groups] == [
        ("weak", 3, (0.1, 0.3)),
        ("medium", 2, (0.5, 0.6)),
        ("strong", 2, (0.8, 0.9)),
    ]
    assert [group.name for group in by_blur(scores[:2])] == ["weak", "medium"]
    assert by_blur([score("flat", lost=None)]) == ()


def test_the_same_groups_in_any_order() -> None:
    scores = [score(str(number), lost=0.5, gain_db=number) for number in range(10)]
    assert by_blur(scores) == by_blur(scores[::-1])


@pytest.mark.parametrize(
    ("number", "shown"), [(1, (1, 0)), (2, (1, 1)), (5, (3, 2)), (20, (10, 10)), (99, (10, 10))]
)
def test_worst_and_best_are_apart_and_the_extremes_first(number: int, shown: tuple[int, int]) -> None:
    values = np.random.default_rng(0).permutation(number).astype(float)
    worst, best = worst_and_best(values.tolist(), [str(i) for i in range(number)])
    assert (len(worst), len(best)) == shown and not set(worst) & set(best)
    assert [values[i] for i in worst] == list(range(len(worst)))
    assert [values[i] for i in best] == [number - 1 - i for i in range(len(best))]
    assert values[median_of(values.tolist())] == number // 2


def test_names_decide_between_equals() -> None:
    assert worst_and_best([0.0, 0.0, 0.0, 0.0], ["d", "b", "c", "a"]) == ([3, 1], [0, 2])
    assert most_different([0.1, -0.5, 0.5, 0.0], ["a", "c", "b", "d"]) == [2, 1, 0, 3]


def test_the_error_map_has_a_fixed_scale() -> None:
    gt = np.full((4, 6, 3), 100, np.uint8)
    restored = gt.copy()
    restored[0, 0] += 32
    restored[0, 1] += 90
    restored[0, 2, 1] += 96  # the mean of three channels
    restored[0, 3] -= 16
    drawn = error_map(restored, gt)
    assert drawn.shape == gt.shape and drawn.dtype == np.uint8
    assert drawn[1, 1].max() < 10, "no error is black"
    brightest = drawn[0, 0].tolist()
    assert drawn[0, 1].tolist() == drawn[0, 2].tolist() == brightest
    assert brightest[0] > 240 and brightest[1] > 240, "yellow, as RGB"
    assert drawn[0, 3].tolist() not in (brightest, drawn[1, 1].tolist())
