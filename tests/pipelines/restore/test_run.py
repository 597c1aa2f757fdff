from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nafnet_core import InputError, restore_image
from nafnet_core.colour import colour_shift
from pipelines.files import sha256
from pipelines.images import read_photo
from pipelines.models import LoadedModel
from pipelines.png import encode_png
from pipelines.restore import RECORD, find_items
from pipelines.restorer import RestoreSettings
from tests.pipelines.pairs import piece
from tests.pipelines.restore.conftest import RestoreFiles
from tests.pipelines.restore.results import files_of, loaded_network, record_of, statuses

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
        "backend": "torch",
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
