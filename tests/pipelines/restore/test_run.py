from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from nafnet_core import InputError, restore_image, save_model, tiling
from nafnet_core.colour import colour_shift
from pipelines.encoding import write_photo
from pipelines.files import sha256
from pipelines.images import Photo, read_photo
from pipelines.models import LoadedModel, open_model
from pipelines.png import encode_png
from pipelines.restore import RECORD, RestoreResult, find_items
from pipelines.restorer import RestoreSettings
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, lively_network
from tests.pipelines.pairs import piece
from tests.pipelines.restore.conftest import RestoreFiles


def loaded_network(folder: Path, seed: int) -> LoadedModel:
    path = folder / f"model-{seed}.safetensors"
    save_model(lively_network(SMALL, seed=seed), path, metadata={"train_patch_px": 64})
    return open_model(str(path), Workspace.find(folder))


def statuses(result: RestoreResult) -> dict[str, str]:
    return {Path(file.input).name: file.status for file in result.files}


def record_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORD).read_text().splitlines()]


def files_of(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


# What is restored, and where it goes


def test_one_file(restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = restore_files(photos / "a.png", loaded, out)
    assert files_of(out) == ["a.png", RECORD]
    lq, restored = piece(0, 32, 40), read_photo(out / "a.png").rgb_hwc
    assert np.array_equal(restored, restore_image(loaded.model, lq, train_patch_px=64))
    assert np.abs(restored.astype(int) - lq).mean() > 2, "the network did nothing"
    (entry,) = record_of(out)
    assert entry == {
        "input": str(photos / "a.png"),
        "output": "a.png",
        "status": "restored",
        "error": None,
        "model": loaded.label,
        "model_digest": loaded.digest,
        "settings": {
            **RestoreSettings(precision="fp32").to_dict(),
            "train_patch_px": 64,
            "quality": 95,
        },
        "input_digest": sha256(photos / "a.png"),
        "output_digest": sha256(out / "a.png"),
        "width_px": 40,
        "height_px": 32,
        "num_frames": None,
        "tile_px": None,
        "num_tiles": 1,
        "tiles_redone": 0,
        "tiles_kept": 0,
        "colour_shift": pytest.approx(colour_shift(lq, restored), abs=0.001),
        "notes": [],
        "seconds": entry["seconds"],
    }
    assert entry["seconds"] > 0 and result.count("restored") == 1


def test_folder_keeps_its_tree(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    steps: list[tuple[int, int, str]] = []
    result = restore_files(photos, loaded, tmp_path / "out", on_progress=lambda *step: steps.append(step))
    assert files_of(tmp_path / "out") == ["a.png", RECORD, "sub/b.png", "sub/deep/c.png"]
    assert result.count("restored") == 3
    assert steps == [(1, 3, ""), (2, 3, ""), (3, 3, "")]
    for number, name in enumerate(["a.png", "sub/b.png", "sub/deep/c.png"]):
        expected = restore_image(loaded.model, piece(number, 32, 40), train_patch_px=64)
        assert np.array_equal(read_photo(tmp_path / "out" / name).rgb_hwc, expected)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*.png", ["a"]), ("**/*.png", ["a", "sub/b", "sub/deep/c"]), ("s*/b*", ["sub/b"]), ("sub/b*", ["b"])],
)
def test_glob(
    restore_files: RestoreFiles,
    photos: Path,
    loaded: LoadedModel,
    tmp_path: Path,
    pattern: str,
    names: list[str],
) -> None:
    (photos / "sub" / "b.txt").write_text("not a photo, and named so")
    restore_files(photos / pattern, loaded, tmp_path / "out")
    assert files_of(tmp_path / "out") == sorted([*(f"{name}.png" for name in names), RECORD])


def test_names_with_the_signs_of_a_glob(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    folder = photos.rename(tmp_path / "trip [2024]")
    (folder / "a.png").rename(folder / "a*[1].png")
    assert restore_files(folder, loaded, tmp_path / "1").count("restored") == 3
    assert restore_files(folder / "a*[1].png", loaded, tmp_path / "2").count("restored") == 1


def test_two_photos_of_one_name_have_results_of_two(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    (photos / "sub" / "a.png").write_bytes(encode_png(piece(7, 32, 40)))
    inputs = [str(photos / "a.png"), str(photos / "sub" / "a.png")]
    out = tmp_path / "out"
    result = restore_files(inputs, loaded, out)
    first, second = (file.output for file in result.files)
    assert first == "a.png" and re.fullmatch(r"a~[0-9a-f]{6}\.png", second)
    for name, number in ((first, 0), (second, 7)):
        expected = restore_image(loaded.model, piece(number, 32, 40), train_patch_px=64)
        assert np.array_equal(read_photo(out / name).rgb_hwc, expected)
    assert restore_files(inputs, loaded, out).count("skipped") == 2, "the names stay"


def test_formats_that_become_one_do_not_collide(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    Image.fromarray(piece(8, 32, 40)).save(photos / "a.jpg")
    result = restore_files(photos, loaded, tmp_path / "out", suffix=".webp")
    assert len({file.output for file in result.files}) == 4
    assert all(name.endswith((".webp", RECORD)) for name in files_of(tmp_path / "out"))


def test_output_inside_the_input_is_left_out(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel
) -> None:
    out = photos / "restored"
    assert restore_files(photos, loaded, out).count("restored") == 3
    # Else each run would restore what the last one wrote, deeper and deeper.
    assert statuses(restore_files(photos, loaded, out)) == dict.fromkeys(
        ["a.png", "b.png", "c.png"], "skipped"
    )


@pytest.mark.parametrize("way", ["same", "around", "link"])
def test_photos_are_never_overwritten(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, way: str
) -> None:
    out = {"same": photos, "around": photos / "sub" / "..", "link": photos.parent / "link"}[way]
    if way == "link":
        out.symlink_to(photos)
    before = (photos / "a.png").read_bytes()
    for inputs in (photos, photos / "a.png", photos / "*.png"):
        with pytest.raises(InputError, match="lie in the output folder"):
            restore_files(inputs, loaded, out)
    assert (photos / "a.png").read_bytes() == before


def test_nothing_to_restore(photos: Path, tmp_path: Path) -> None:
    for inputs in (tmp_path / "nothing", tmp_path / "*.nothing"):
        with pytest.raises(InputError, match="no such file, folder or match"):
            find_items([str(inputs)], str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for inputs in (tmp_path / "empty", tmp_path / "*.txt"):
        with pytest.raises(InputError, match=r"no photos.*\.png"):
            find_items([str(inputs)], str(tmp_path / "out"))


def test_output_that_cannot_be_written(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write into this folder"):
        restore_files(photos, loaded, tmp_path / "file")


# A second run


def test_second_run_skips_what_is_done(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    restore_files(photos, loaded, out)
    before = {name: (out / name).stat().st_mtime_ns for name in files_of(out)}
    result = restore_files(photos, loaded, out)
    assert result.count("skipped") == 3
    assert all((out / file.output).is_file() for file in result.files)
    assert {name: (out / name).stat().st_mtime_ns for name in files_of(out)} == before
    # A photo that came later is done.
    (photos / "d.png").write_bytes(encode_png(piece(5, 32, 40)))
    assert statuses(restore_files(photos, loaded, out))["d.png"] == "restored"


def test_what_changed_is_restored_again(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    restore_files(photos, loaded, out)
    (photos / "a.png").write_bytes(encode_png(piece(9, 32, 40)))
    (out / "sub" / "b.png").unlink()
    assert statuses(restore_files(photos, loaded, out)) == {
        "a.png": "restored",
        "b.png": "restored",
        "c.png": "skipped",
    }
    expected = restore_image(loaded.model, piece(9, 32, 40), train_patch_px=64)
    assert np.array_equal(read_photo(out / "a.png").rgb_hwc, expected)


def test_another_model_restores_again(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    restore_files(photos, loaded, out)
    first = read_photo(out / "a.png").rgb_hwc
    other = loaded_network(tmp_path, 1)
    assert restore_files(photos, other, out).count("restored") == 3
    assert not np.array_equal(read_photo(out / "a.png").rgb_hwc, first)
    # The record's latest line counts: going back is a change too.
    assert restore_files(photos, loaded, out).count("restored") == 3
    assert restore_files(photos, loaded, out).count("skipped") == 3


def test_record_cut_short_is_passed_over(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    restore_files(photos, loaded, out)
    lines = (out / RECORD).read_text().splitlines()
    (out / RECORD).write_text("\n".join([lines[0], "3", '{"other": 1}', "", lines[1], lines[2][:40]]) + "\n")
    assert statuses(restore_files(photos, loaded, out)) == {
        "a.png": "skipped",
        "b.png": "skipped",
        "c.png": "restored",
    }


# Bad photos


def test_bad_photo_does_not_stop_the_others(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", (photos / "sub" / "b.png").read_bytes()
    (photos / "sub" / "b.png").write_bytes(whole[: len(whole) // 2])
    result = restore_files(photos, loaded, out)
    assert statuses(result) == {"a.png": "restored", "b.png": "failed", "c.png": "restored"}
    assert files_of(out) == ["a.png", RECORD, "sub/deep/c.png"]
    failed = next(row for row in record_of(out) if row["status"] == "failed")
    assert failed["status"] == "failed" and failed["output_digest"] is None
    assert "truncated" in failed["error"] and str(photos / "sub" / "b.png") in failed["error"]
    # Repaired, it alone is done.
    (photos / "sub" / "b.png").write_bytes(whole)
    assert statuses(restore_files(photos, loaded, out)) == {
        "a.png": "skipped",
        "b.png": "restored",
        "c.png": "skipped",
    }


def test_stop_at_the_first_bad_photo(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    (photos / "sub" / "b.png").write_text("no image")
    with pytest.raises(InputError, match=r"not an image.*b\.png"):
        restore_files(photos, loaded, tmp_path / "out", stop_on_error=True)
    assert "a.png" in files_of(tmp_path / "out") and "sub/b.png" not in files_of(tmp_path / "out")
    assert record_of(tmp_path / "out")[-1]["status"] == "failed"


def test_file_that_is_no_photo(restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (file,) = restore_files(tmp_path / "notes.txt", loaded, tmp_path / "out").files
    assert file.status == "failed" and "not an image" in (file.error or "")


def test_link_to_nowhere_is_told(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    (photos / "gone.png").symlink_to(tmp_path / "nothing")
    result = restore_files(photos, loaded, tmp_path / "out")
    assert result.count("restored") == 3
    (failed,) = [file for file in result.files if file.status == "failed"]
    assert "no such image" in (failed.error or "") and "gone.png" in (failed.error or "")


# Kinds of photos


def test_photo_keeps_its_kind(restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path) -> None:
    sharp = piece(0, 32, 40)
    deep = sharp.astype(np.uint16) * 257 + 100
    gray = np.repeat(sharp[..., :1], 3, axis=2)
    kinds = {
        "deep.png": Photo(rgb_hwc=deep, alpha_hw=deep[..., 2].copy(), is_gray=False, exif=None, icc=None),
        "deep.tif": Photo(rgb_hwc=deep, alpha_hw=None, is_gray=False, exif=None, icc=None),
        "gray.png": Photo(rgb_hwc=gray, alpha_hw=sharp[..., 1].copy(), is_gray=True, exif=None, icc=None),
        "alpha.png": Photo(rgb_hwc=sharp, alpha_hw=sharp[..., 1].copy(), is_gray=False, exif=None, icc=None),
    }
    (tmp_path / "in").mkdir()
    for name, photo in kinds.items():
        write_photo(tmp_path / "in" / name, photo)
    assert restore_files(tmp_path / "in", loaded, tmp_path / "out").count("restored") == 4
    for name, photo in kinds.items():
        again = read_photo(tmp_path / "out" / name)
        expected = restore_image(loaded.model, photo.rgb_hwc, train_patch_px=64)
        if photo.is_gray:
            expected = np.repeat(expected.mean(axis=2, keepdims=True).round().astype(np.uint8), 3, axis=2)
        assert again.rgb_hwc.dtype == photo.rgb_hwc.dtype and again.is_gray == photo.is_gray
        assert np.array_equal(again.rgb_hwc, expected)
        assert (again.alpha_hw is None) == (photo.alpha_hw is None)
        assert photo.alpha_hw is None or np.array_equal(again.alpha_hw, photo.alpha_hw)
    # 16 bit is restored as such, and not by way of 8.
    assert len(np.unique(read_photo(tmp_path / "out" / "deep.png").rgb_hwc % 257)) > 100


def test_turned_photo_comes_out_upright(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    Image.fromarray(piece(0, 32, 40)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    (file,) = restore_files(tmp_path / "photo.jpg", loaded, tmp_path / "out").files
    assert (file.height_px, file.width_px) == (40, 32)
    with Image.open(tmp_path / "out" / "photo.jpg") as image:
        assert image.size == (32, 40)
        assert image.getexif()[0x0112] == 1 and image.getexif()[0x010F] == "Maker"


def test_one_pixel(restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "dot.png").write_bytes(encode_png(np.full((1, 1, 3), 90, np.uint8)))
    assert restore_files(tmp_path / "dot.png", loaded, tmp_path / "out").count("restored") == 1
    assert read_photo(tmp_path / "out" / "dot.png").rgb_hwc.shape == (1, 1, 3)


# Tiles, precision, memory


def test_tiles_give_the_same_picture(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path
) -> None:
    sharp = cv2.resize(piece(0, 200, 300), (330, 220))
    (tmp_path / "photo.png").write_bytes(encode_png(sharp))
    (whole,) = restore_files(tmp_path / "photo.png", loaded, tmp_path / "whole", tile_px=1024).files
    (tiled,) = restore_files(tmp_path / "photo.png", loaded, tmp_path / "tiled", tile_px=192).files
    assert (whole.tile_px, tiled.tile_px) == (None, 192)
    one, other = (read_photo(tmp_path / way / "photo.png").rgb_hwc.astype(int) for way in ("whole", "tiled"))
    assert np.abs(one - sharp).mean() > 2
    assert np.abs(one - other).mean() < 0.1 * np.abs(one - sharp).mean()


def test_tile_follows_from_free_memory(
    restore_files: RestoreFiles,
    photos: Path,
    loaded: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def tile_px_for(model: torch.nn.Module, memory_mib: float) -> int:
        asked.append(memory_mib)
        return 192

    monkeypatch.setattr(tiling, "free_memory_mib", lambda device: 1000.0)
    monkeypatch.setattr(tiling, "tile_px_for", tile_px_for)
    (tmp_path / "wide.png").write_bytes(encode_png(piece(0, 32, 220)))
    (file,) = restore_files(tmp_path / "wide.png", loaded, tmp_path / "out").files
    assert file.tile_px == 192
    # Half, since an overrun is no error but the end of the process.
    assert asked == [500.0]


def test_too_small_a_tile_is_refused_at_once(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="tiles too small.*more than 128 px.*got 64"):
        restore_files(photos, loaded, tmp_path / "out", tile_px=64)
    assert not (tmp_path / "out").exists()


def test_bf16_is_close_and_said(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    restore_files(photos / "a.png", loaded, tmp_path / "fp32")
    (file,) = restore_files(photos / "a.png", loaded, tmp_path / "bf16", precision="bf16").files
    assert file.settings is not None and file.settings["precision"] == "bf16"
    one, other = (read_photo(tmp_path / way / "a.png").rgb_hwc.astype(int) for way in ("fp32", "bf16"))
    assert 0 < np.abs(one - other).mean() < 3


def test_several_inputs_and_the_kinds_that_are_not_read(
    restore_files: RestoreFiles,
    photos: Path,
    loaded: LoadedModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (photos / "phone.HEIC").write_bytes(b"....ftypheic")
    names = [str(photos / "a.png"), str(photos / "sub")]
    result = restore_files(names, loaded, tmp_path / "out")
    assert statuses(result) == {"a.png": "restored", "b.png": "restored", "c.png": "restored"}
    assert not caplog.records
    # Named twice is restored once, at its place below the folder.
    both = find_items([str(photos / "a.png"), str(photos)], str(tmp_path / "other"))
    assert [item.output for item in both] == ["a.png", "sub/b.png", "sub/deep/c.png"]
    restore_files(photos, loaded, tmp_path / "out")
    assert "passed over 1 file of kinds that are not read: .heic" in caplog.text
    (failed,) = restore_files(photos / "phone.HEIC", loaded, tmp_path / "out").files
    assert failed.status == "failed" and "Export it as JPEG" in (failed.error or "")


def test_progress_counts_tiles_of_a_large_photo(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(encode_png(piece(0, 200, 330)))
    steps: list[tuple[int, int, str]] = []
    restore_files(
        tmp_path / "photo.png",
        loaded,
        tmp_path / "out",
        tile_px=192,
        on_progress=lambda *step: steps.append(step),
    )
    # Two rows; three columns, which start every 128 px.
    assert steps == [*((0, 1, f"photo.png tile {number}/6") for number in range(1, 7)), (1, 1, "")]
