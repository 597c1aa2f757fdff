"""Two models side by side: the difference, its interval, what is resampled, what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nafnet_core import InputError
from nafnet_core.bootstrap import bootstrap_interval
from pipelines import evaluate
from pipelines.evaluate import Comparison, Pairs, Report, difference_of
from pipelines.evaluate.comparison_page import interval_told, notes, score_table, verdict
from pipelines.evaluate.summary import means
from pipelines.models import LoadedModel, open_model
from pipelines.scoring import ImageScore, Protocol
from pipelines.workspace import Workspace


def _report(
    scores_db: Sequence[float], scenes: Sequence[str], *, data: str = "d", threads: int = 1
) -> Report:
    images = tuple(
        ImageScore(
            key=f"{scene}/{number}",
            scene=scene,
            height_px=64,
            width_px=64,
            psnr_blurred_db=25.0,
            psnr_restored_db=score_db,
            ssim_blurred=0.8,
            ssim_restored=score_db / 40,
        )
        for number, (score_db, scene) in enumerate(zip(scores_db, scenes, strict=True))
    )
    return Report(
        model="m",
        weights_digest="w",
        data="store",
        data_digest=data,
        protocol=Protocol(threads=threads),
        num_images=len(images),
        latency_s=0.1,
        peak_memory_mib=100.0,
        images=images,
        **means(images),  # type: ignore[arg-type]
    )


def test_scenes_are_resampled_where_several_have_several_images() -> None:
    scenes = ["a"] * 4 + ["b"] * 3 + ["c"]
    first = _report([27.0] * 8, scenes)
    second = _report([27.4, 27.5, 27.6, 27.5, 26.9, 26.8, 27.0, 27.2], scenes)
    found = difference_of(first, second)
    gains = [0.4, 0.5, 0.6, 0.5, -0.1, -0.2, 0.0, 0.2]
    assert (found.unit, found.num_units) == ("scene", 3)
    assert found.psnr_db.mean == pytest.approx(np.mean(gains))
    assert (found.psnr_db.low, found.psnr_db.high) == pytest.approx(
        bootstrap_interval(gains, scenes), abs=1e-9
    )
    assert (found.num_better, found.num_worse) == (5, 2)
    assert not found.psnr_db.is_clear and "no clear difference" in verdict(found)
    assert "worse on 2, the same on 1." in verdict(found)
    assert "3 scenes" in interval_told(found) and "rough" in interval_told(found)
    assert found.ssim is not None and found.ssim.mean == pytest.approx(np.mean(gains) / 40)
    assert found.perceptual is None


@pytest.mark.parametrize(
    ("scenes", "told"),
    [
        (["a"] * 30, "All images are of one scene"),
        ([str(n) for n in range(30)], "Each image counts by itself"),
    ],
)
def test_images_are_resampled_else(scenes: list[str], told: str) -> None:
    better = np.random.default_rng(0).normal(27.2, 0.1, 30).tolist()
    found = difference_of(_report([27.0] * 30, scenes), _report(better, scenes))
    assert (found.unit, found.num_units) == ("image", 30)
    assert found.psnr_db.is_clear and found.psnr_db.low == pytest.approx(
        np.mean(better) - 27 - 2.05 * np.std(better, ddof=1) / 30**0.5, abs=0.01
    )
    assert told in interval_told(found)


def test_one_image_has_no_interval() -> None:
    found = difference_of(_report([27.0], ["a"]), _report([27.5], ["a"]))
    assert found.psnr_db.low is None and not found.psnr_db.is_clear
    assert "gives no interval" in verdict(found)


def test_times_stand_side_by_side_and_are_not_compared() -> None:
    first, second = _report([27.0], ["a"]), _report([27.5], ["a"])
    found = difference_of(first, second.model_copy(update={"latency_s": 0.3}))
    assert score_table(found).rows[-1] == ["Time, s", "0.100", "0.300", "not compared", ""]
    assert any("registry compare" in note for note in notes(found))


def test_images_are_matched_by_name() -> None:
    first, second = _report([27.0, 28.0], ["a", "b"]), _report([27.5, 28.1], ["a", "b"])
    turned = second.model_copy(update={"images": second.images[::-1]})
    assert difference_of(first, turned).images == difference_of(first, second).images


def test_other_data_or_protocol_is_not_compared() -> None:
    first = _report([27.0], ["a"])
    with pytest.raises(InputError, match="different data"):
        difference_of(first, _report([27.0], ["a"], data="e"))
    with pytest.raises(InputError, match="threads 1 ≠ 2"):
        difference_of(first, _report([27.0], ["a"], threads=2))


def test_a_comparison_is_a_folder_beside_both_reports(
    model: LoadedModel, other: LoadedModel, places: Path, workspace: Workspace, tmp_path: Path
) -> None:
    done: list[tuple[int, int]] = []
    drawn: list[tuple[int, int]] = []
    result = evaluate.compare(
        model,
        other,
        Pairs(places / "store"),
        workspace,
        out=tmp_path / "out",
        on_progress=lambda *both: done.append(both),
        on_drawing=lambda *both: drawn.append(both),
    )
    found = result.comparison
    assert done == [(number, 12) for number in range(1, 13)]
    assert drawn == [(number, 6) for number in range(7)] * 3, "two reports and the comparison"
    assert not any("same model" in note for note in notes(result.comparison))
    assert found.first == evaluate.find_report(workspace, model, found.first.data_digest)
    assert found.second == evaluate.find_report(workspace, other, found.first.data_digest)
    assert found.psnr_db.mean == pytest.approx(
        found.second.psnr_restored_db - found.first.psnr_restored_db, abs=1e-9
    )
    assert found.unit == "scene" and found.num_units == 3
    assert Comparison.model_validate(json.loads(result.path.read_text())) == found
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert names == {f"pictures/{place:02}.jpg" for place in range(1, 7)} | {
        "comparison.json", "comparison.md", "comparison.html", "images.csv", "difference.png",
    }  # fmt: skip
    largest = max(found.images, key=lambda image: abs(image.psnr_gain_db))
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert page.index(f"{largest.key}: B") < page.index("pictures/01.jpg") < page.index("pictures/02.jpg")


def test_a_model_against_itself_has_no_difference(
    model: LoadedModel, places: Path, workspace: Workspace
) -> None:
    found = evaluate.compare(model, model, Pairs(places / "store"), workspace).comparison
    assert (found.psnr_db.mean, found.psnr_db.low, found.psnr_db.high) == (0, 0, 0)
    assert (found.num_better, found.num_worse) == (0, 0) and "the same on 6" in verdict(found)
    assert "the same model" in notes(found)[0]


def test_with_and_without_local_statistics_are_not_compared(
    model: LoadedModel, places: Path, workspace: Workspace
) -> None:
    without = open_model(str(places / "a.safetensors"), workspace, train_patch_px=0)
    with pytest.raises(InputError, match="local_statistics True ≠ False"):
        evaluate.compare(model, without, Pairs(places / "store"), workspace)
