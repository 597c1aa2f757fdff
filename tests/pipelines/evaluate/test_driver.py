"""The report of one model: its numbers by independent means, its folder, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.measure import blur_effect
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nafnet_core import InputError, restore_image
from nafnet_core.sharpness import luma
from pipelines import evaluate
from pipelines.evaluate import Pairs, installed_judge
from pipelines.models import LoadedModel
from pipelines.store import PairStore
from pipelines.workspace import Workspace


def test_scores_are_those_of_scikit_image(
    model: LoadedModel, whole_store: PairStore, workspace: Workspace
) -> None:
    report = evaluate.run(model, Pairs(whole_store.root), workspace).report
    assert report.num_images == len(whole_store) == 6 and report.data_digest == whole_store.digest
    for index, score in enumerate(report.images):
        pair = whole_store.pair(index)
        restored = restore_image(model.model, pair.lq, train_patch_px=32, tile_px=None)
        assert score.key == pair.key and (score.height_px, score.width_px) == restored.shape[:2]
        for image, psnr_db, ssim, sharpness in (
            (pair.lq, score.psnr_blurred_db, score.ssim_blurred, score.sharpness_blurred),
            (restored, score.psnr_restored_db, score.ssim_restored, score.sharpness_restored),
        ):
            assert psnr_db == pytest.approx(peak_signal_noise_ratio(pair.gt, image), abs=1e-6)
            expected = structural_similarity(
                pair.gt, image, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            assert ssim == pytest.approx(expected, abs=1e-6)
            assert sharpness == pytest.approx(1 - blur_effect(luma(image)), abs=1e-6)
        assert score.sharpness_truth == pytest.approx(1 - blur_effect(luma(pair.gt)), abs=1e-6)
        assert score.detail_lost is not None and 0.1 < score.detail_lost < 0.9
        assert score.perceptual_restored is None
    assert report.psnr_restored_db == pytest.approx(np.mean([s.psnr_restored_db for s in report.images]))
    assert report.sharpness_truth == pytest.approx(np.mean([s.sharpness_truth for s in report.images]))
    assert report.psnr_restored_db != report.psnr_blurred_db


def test_each_image_is_done_on_one_thread(
    model: LoadedModel, whole_store: PairStore, workspace: Workspace
) -> None:
    found = set()
    handle = model.model.register_forward_pre_hook(lambda *_: found.add(torch.get_num_threads()))
    intro = model.model.intro.register_forward_pre_hook(lambda *_: found.add(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        report = evaluate.run(model, Pairs(whole_store.root), workspace).report
        assert torch.get_num_threads() == 3, "what the caller had comes back"
    finally:
        torch.set_num_threads(before)
        handle.remove()
        intro.remove()
    assert found == {1} and report.protocol.threads == 1
    assert report.images == evaluate.run(model, Pairs(whole_store.root), workspace).report.images


def test_a_report_is_a_folder_with_all_that_it_names(
    model: LoadedModel, places: Path, workspace: Workspace, tmp_path: Path
) -> None:
    out = tmp_path / "reports" / "mine"
    told: list[tuple[str, int, int]] = []
    result = evaluate.run(
        model,
        Pairs(places / "store"),
        workspace,
        out=out,
        on_progress=lambda *both: told.append(("scored", *both)),
        on_drawing=lambda *both: told.append(("drawn", *both)),
    )
    assert told == [("scored", number, 6) for number in range(1, 7)] + [
        ("drawn", number, 6) for number in range(7)
    ]
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    strips = {f"pictures/{which}-{place:02}.jpg" for which in ("worst", "best") for place in (1, 2, 3)}
    assert names == strips | {
        "report.json", "report.md", "report.html", "images.csv", "gain.png", "before_after.png",
    }  # fmt: skip
    kept = {str(path.relative_to(result.path.parent)) for path in result.path.parent.rglob("*.*")}
    assert kept == names and result.picture.is_file()
    assert (out / "report.json").read_bytes() == result.path.read_bytes()
    content = json.loads(result.path.read_text())
    assert evaluate.Report.model_validate(content) == result.report
    with (out / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [image["key"] for image in content["images"]]
    assert [float(row["psnr_restored_db"]) for row in rows] == [
        score.psnr_restored_db for score in result.report.images
    ]
    assert [float(row["gain_db"]) for row in rows] == [score.gain_db for score in result.report.images]
    page = (out / "report.md").read_text()
    assert all(f"({name})" in page for name in strips | {"gain.png"})


def test_a_report_takes_the_place_of_the_one_before(
    model: LoadedModel, places: Path, workspace: Workspace, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate.run(model, Pairs(places / "pairs"), workspace, out=out)
    (out / "pictures" / "stray.jpg").touch()
    assert evaluate.run(model, Pairs(places / "pairs"), workspace, out=out).path.is_file()
    assert not (out / "pictures" / "stray.jpg").exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    assert len(list(workspace.reports.iterdir())) == 1


def test_a_folder_of_something_else_is_left_alone(
    model: LoadedModel, places: Path, workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    for out, words in (
        (tmp_path / "photos", "something else"),
        (tmp_path / "photos" / "a.jpg", "a file"),
        (Path("/proc/nafnet/report"), "cannot write"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate.run(
                model,
                Pairs(places / "store"),
                workspace,
                out=out,
                on_progress=lambda *_: pytest.fail("scored before it was refused"),
            )
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_what_stops_halfway_leaves_the_report_before(
    model: LoadedModel, places: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = evaluate.run(model, Pairs(places / "store"), workspace)
    content = result.path.read_bytes()
    monkeypatch.setattr("pipelines.evaluate.driver.draw_strip", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.run(model, Pairs(places / "store"), workspace)
    assert result.path.read_bytes() == content
    assert [path.name for path in workspace.reports.iterdir()] == [result.path.parent.name]


def test_a_report_is_found_by_its_digests_and_an_old_one_is_not(
    model: LoadedModel, other: LoadedModel, places: Path, workspace: Workspace
) -> None:
    result = evaluate.run(model, Pairs(places / "store"), workspace)
    digest = result.report.data_digest
    assert evaluate.find_report(workspace, model, digest) == result.report
    assert evaluate.find_report(workspace, other, digest) is None
    assert evaluate.find_report(workspace, model, "0" * 64) is None
    content = json.loads(result.path.read_text())
    content["schema_version"] = 1
    result.path.write_text(json.dumps(content))
    assert evaluate.find_report(workspace, model, digest) is None


def test_folders_have_the_scores_and_the_digest_of_the_store(
    model: LoadedModel, places: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    store, folder, two = (
        evaluate.run(model, pairs, workspace).report
        for pairs in (Pairs("store"), Pairs("pairs"), Pairs("pairs/blur", "pairs/sharp"))
    )
    assert store.images == folder.images == two.images
    assert store.data_digest == folder.data_digest == two.data_digest
    assert (store.data, two.data) == ("store", "pairs/blur and pairs/sharp")


def test_the_perceptual_distance_is_told_with_its_network(
    model: LoadedModel, places: Path, workspace: Workspace
) -> None:
    result = evaluate.run(model, Pairs(places / "store"), workspace, judge=installed_judge())
    report = result.report
    assert report.perceptual_network is not None and "EfficientNet-Lite0" in report.perceptual_network
    assert report.perceptual_blurred and report.perceptual_restored
    distances = [score.perceptual_restored for score in report.images]
    assert len(set(distances)) == 6 and report.perceptual_restored == pytest.approx(np.mean(distances))
    for page in ("report.md", "report.html"):
        assert "LPIPS-like and not LPIPS" in result.path.with_name(page).read_text()


def test_a_long_wait_for_pictures_is_announced(
    model: LoadedModel,
    places: Path,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="pipelines"):
        evaluate.run(model, Pairs(places / "store"), workspace)
        assert "drawing" not in caplog.text
        monkeypatch.setattr("pipelines.evaluate.driver._LONG_S", 0.0)
        evaluate.run(model, Pairs(places / "store"), workspace)
    assert "drawing 6 images" in caplog.text


def test_one_tiny_image_has_a_report(model: LoadedModel, workspace: Workspace, tmp_path: Path) -> None:
    from tests.pipelines.pairs import write_pairs

    write_pairs(tmp_path / "tiny", ["only"], height=9, width=7)
    report = evaluate.run(model, Pairs(tmp_path / "tiny"), workspace).report
    assert report.ssim_restored is None and "ssim_restored" not in report.distributions
    assert len(report.by_blur) == 1 and len(report.by_scene) == 1


def test_a_damaged_image_is_named(
    model: LoadedModel, workspace: Workspace, places: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(places / "pairs", tmp_path / "pairs")
    file = tmp_path / "pairs" / "blur" / "b" / "1.png"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=r"blur/b/1\.png"):
        evaluate.run(model, Pairs(tmp_path / "pairs"), workspace)
    assert not workspace.reports.exists()
