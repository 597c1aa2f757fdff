from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nafnet_core import InputError
from pipelines import synth
from pipelines.images import read_rgb_u8
from pipelines.png import encode_png
from pipelines.sources import find_source, hold_out
from pipelines.synth import SynthConfig, SynthResult
from pipelines.synth.config import claim
from pipelines.synth.photos import blur_photo, find_photos
from tests.pipelines.pairs import piece


def write_photos(root: Path, names: Sequence[str], *, height: int = 72, width: int = 96) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(piece(number, height, width)).save(path)
    return root


def run(sharp: Path, out: Path, **options: Any) -> SynthResult:
    return synth.run(SynthConfig(sharp=[sharp], out=out, **options))


def outputs(out: Path, side: str = "blur") -> dict[str, np.ndarray]:
    folder = out / side
    return {
        path.relative_to(folder).with_suffix("").as_posix(): read_rgb_u8(path)
        for path in sorted(folder.rglob("*.png"))
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", ["a.png", "sub/b.jpg", "c.tif"])


def test_what_is_written(photos: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "out", []
    config = SynthConfig(sharp=[photos], out=out, variants=2)
    result = synth.run(config, on_progress=lambda done, total: steps.append((done, total)))
    keys = [f"{name}/{variant}" for name in ("a", "c", "sub_b") for variant in (0, 1)]
    blur, sharp = outputs(out), outputs(out, "sharp")
    assert list(blur) == list(sharp) == keys
    assert np.array_equal(sharp["a/0"], piece(0)) and np.array_equal(sharp["c/1"], piece(2))
    for key in keys:
        assert blur[key].shape == sharp[key].shape
        assert np.abs(blur[key].astype(int) - sharp[key]).mean() > 1, "not blurred"
        # Blur takes detail away.
        assert np.abs(np.diff(blur[key].astype(int), axis=1)).mean() < 0.9 * (
            np.abs(np.diff(sharp[key].astype(int), axis=1)).mean()
        )
    assert not np.array_equal(blur["a/0"], blur["a/1"])
    assert (result.num_pairs, result.refused) == (6, ())
    assert steps == [(1, 3), (2, 3), (3, 3)]
    records = [json.loads(line) for line in (out / "degradations.jsonl").read_text().splitlines()]
    assert [record["key"] for record in records] == keys
    assert records[0]["photo"] == str(photos / "a.png") and records[0]["kind"] == "shake"
    assert all(3 <= record["size_px"] <= 15 for record in records)
    sheet = read_rgb_u8(result.contact_sheet)
    assert sheet.shape[0] == 3 * (28 + 240) and sheet.std() > 10  # each row under its labels


def test_pixels_follow_from_seed_and_name(photos: Path, tmp_path: Path) -> None:
    first = run(photos, tmp_path / "1", variants=2, seed=5)
    assert first.num_pairs == 6
    # Other photos beside it, fewer variants, other names of the folder: no photo of ours changes.
    write_photos(photos, ["a.png", "sub/b.jpg", "c.tif", "z/0.png", "0.png"])
    run(photos, tmp_path / "2", variants=1, seed=5)
    one, two = outputs(tmp_path / "1"), outputs(tmp_path / "2")
    assert len(two) == 5
    assert same(
        {key: one[key] for key in one if key.endswith("/0")}, {key: two[key] for key in two & one.keys()}
    )
    # A rerun writes the same again, and the seed matters.
    run(photos, tmp_path / "2", variants=1, seed=5)
    assert same(outputs(tmp_path / "2"), two)
    run(photos, tmp_path / "3", variants=1, seed=6)
    assert not any(np.array_equal(two[key], image) for key, image in outputs(tmp_path / "3").items())


@pytest.mark.parametrize("name", ["a", "c", "photo", "chelsea", "coffee", "rocket", "flower"])
def test_variants_differ_whatever_the_name(tmp_path: Path, name: str) -> None:
    # Names whose hash has its highest bit set gave the same blur to all variants.
    run(write_photos(tmp_path / "photos", [f"{name}.png"]), tmp_path / "out", variants=4)
    assert len({image.tobytes() for image in outputs(tmp_path / "out").values()}) == 4


def test_large_photos_are_shrunk_and_small_ones_left(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", ["tall.png"], height=200, width=130)
    run(photos, tmp_path / "1", max_side_px=100)
    assert outputs(tmp_path / "1")["tall/0"].shape == (100, 65, 3)
    assert outputs(tmp_path / "1", "sharp")["tall/0"].shape == (100, 65, 3)
    run(photos, tmp_path / "2", max_side_px=200)
    assert np.array_equal(outputs(tmp_path / "2", "sharp")["tall/0"], piece(0, 200, 130))


@pytest.mark.parametrize("kind", ["shake", "defocus", "gaussian"])
def test_every_kind_blurs(photos: Path, tmp_path: Path, kind: Any) -> None:
    run(photos, tmp_path / "out", kinds=(kind,), min_size_px=8, max_size_px=12, max_noise=0)
    blur, sharp = outputs(tmp_path / "out"), outputs(tmp_path / "out", "sharp")
    assert all(np.abs(blur[key].astype(int) - sharp[key]).mean() > 1 for key in blur)
    records = (tmp_path / "out" / "degradations.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in records} == {kind}


def test_bad_photos_are_refused_and_the_others_made(photos: Path, tmp_path: Path) -> None:
    write_photos(photos, ["small.png"], height=63, width=200)
    content = (photos / "a.png").read_bytes()
    (photos / "cut.png").write_bytes(content[: len(content) // 2])
    result = run(photos, tmp_path / "out")
    assert result.num_pairs == 3
    assert len(result.refused) == 2
    assert "cut.png" in result.refused[0] and "truncated" in result.refused[0]
    assert "small.png" in result.refused[1] and "expected 64 px a side" in result.refused[1]
    assert {key.split("/")[0] for key in outputs(tmp_path / "out")} == {"a", "c", "sub_b"}


def test_no_usable_photo(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", ["small.png"], height=20, width=20)
    with pytest.raises(InputError, match=r"none of the photos could be used.*photo too small"):
        run(photos, tmp_path / "out")


def test_photos_of_one_name_are_all_used(tmp_path: Path) -> None:
    # Cameras number from DSC_0001 on, each its own.
    roots = [write_photos(tmp_path / f"camera{n}", [f"{n}/x.png"]) / str(n) for n in range(4)]
    for number, root in enumerate(roots):
        (root / "x.png").write_bytes(encode_png(piece(number)))
    write_photos(tmp_path / "same", ["x.jpg", "x.png"])
    result = synth.run(SynthConfig(sharp=[*roots, tmp_path / "same"], out=tmp_path / "out"))
    assert result.num_pairs == 6
    assert len({image.tobytes() for image in outputs(tmp_path / "out", "sharp").values()}) >= 5


def test_photo_named_twice_is_used_once(photos: Path, tmp_path: Path) -> None:
    config = SynthConfig(sharp=[photos / "a.png", photos, photos / "a.png"], out=tmp_path / "out")
    assert synth.run(config).num_pairs == 3


def test_own_output_is_not_blurred_again(photos: Path) -> None:
    assert run(photos, photos / "pairs").num_pairs == 3
    assert run(photos, photos / "pairs").num_pairs == 3


def test_variants_of_a_photo_are_one_scene(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out", variants=3)
    refs = find_source(tmp_path / "out", split="train").pairs()
    assert len(refs) == 9
    train, test = (hold_out(refs, 0.3, test=side) for side in (False, True))
    assert len(train) == 6 and len(test) == 3
    assert not {ref.scene for ref in train} & {ref.scene for ref in test}


@pytest.mark.parametrize(
    "options",
    [
        {"min_size_px": -1.0},
        {"min_size_px": 5.0, "max_size_px": 4.0},
        {"max_size_px": float("nan")},
        {"variants": 0},
    ],
)
def test_impossible_options(photos: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="blur that cannot be: expected 0|variants must be"):
        run(photos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_to_blur(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no photos in this folder"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path / "nothing", tmp_path / "out")


def test_output_that_cannot_be_written(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write into this folder"):
        run(photos, tmp_path / "file")


def test_pairs_of_another_run_are_not_mixed_in(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out", variants=2)
    before = outputs(tmp_path / "out")
    with pytest.raises(
        InputError, match=r"3 images of another run in this folder: .*a/1\.png.*another --out"
    ):
        run(photos, tmp_path / "out", variants=1)
    with pytest.raises(InputError, match=r"other settings.*expected seed 0, kinds \['shake'\], got seed 1"):
        run(photos, tmp_path / "out", variants=2, kinds=("gaussian",), seed=1)
    assert same(outputs(tmp_path / "out"), before)


def test_only_the_rest_is_made(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(photos, out)
    before, lines = outputs(out), (out / "degradations.jsonl").read_text()
    assert first.num_kept == 0
    kept = (out / "blur/a/0.png").stat().st_mtime_ns
    (out / "sharp/c/0.png").unlink()
    write_photos(photos, ["z.png"])
    again = run(photos, out, variants=2)
    assert (again.num_pairs, again.num_kept) == (8, 2)
    assert (out / "blur/a/0.png").stat().st_mtime_ns == kept, "not touched"
    assert same({key: image for key, image in outputs(out).items() if key in before}, before)
    now = (out / "degradations.jsonl").read_text().splitlines()
    assert len(now) == 8 and set(lines.splitlines()) <= set(now)
    run(photos, tmp_path / "afresh", variants=2)
    assert (tmp_path / "afresh" / "degradations.jsonl").read_text().splitlines() == now


def test_pairs_of_a_changed_photo_are_made_again(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out", variants=2)
    (photos / "a.png").write_bytes(encode_png(piece(5)))
    os.utime(photos / "a.png", (time.time() + 5,) * 2)
    assert run(photos, tmp_path / "out", variants=2).num_kept == 4
    sharp = outputs(tmp_path / "out", "sharp")
    assert np.array_equal(sharp["a/0"], piece(5)) and np.array_equal(sharp["a/1"], piece(5))


def test_foreign_images_are_left_alone(photos: Path, tmp_path: Path) -> None:
    out = write_photos(tmp_path / "out", ["blur/a/0.png", "sharp/a/0.png"])
    with pytest.raises(InputError, match="2 images of another run.*expected no settings"):
        run(photos, out)
    (out / "synth.json").write_text("{")
    with pytest.raises(InputError, match="damaged settings"):
        run(photos, out)


@pytest.mark.slow
def test_stopped_run_leaves_whole_files_and_goes_on(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", [f"{n}.png" for n in range(20)], height=240, width=320)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipelines", "synth", str(photos), "--out", str(out), "--variants", "12"]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    try:
        while len(list(out.glob("blur/*/*.png"))) < 5 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and words.splitlines()[-1] == "nafnet: stopped"
    made = outputs(out)
    assert 5 <= len(made) < 240, "neither finished nor lost"
    assert set(made) <= set(outputs(out, "sharp")), "no blurred image without its sharp one"
    assert not (out / "degradations.jsonl").exists() and not list(out.rglob(".*.tmp"))
    # What a kill leaves is swept away.
    (out / "blur" / "0" / ".0.png.1.tmp").touch()
    result = run(photos, out, variants=12)
    assert (result.num_pairs, result.num_kept) == (240, len(made))
    assert not list(out.rglob(".*.tmp"))
    run(photos, tmp_path / "once", variants=12)
    assert same(outputs(out), outputs(tmp_path / "once"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_threads_and_ray_write_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    write_photos(photos, ["small.png"], height=30, width=40)
    threads = run(photos, tmp_path / "threads", variants=2, min_jpeg_quality=40, use_ray=False)
    by_ray = run(photos, tmp_path / "ray", variants=2, min_jpeg_quality=40, use_ray=True)
    assert by_ray.refused == threads.refused and "photo too small" in by_ray.refused[0]
    # A loop in this process, one photo after another.
    config = SynthConfig(sharp=[photos], out=tmp_path / "loop", variants=2, min_jpeg_quality=40)
    claim(config, {})
    for job in reversed(find_photos(config)):
        blur_photo(job, config, [])
    files = [path.relative_to(tmp_path / "ray") for path in (tmp_path / "ray").rglob("*.*")]
    assert len(files) == 12 + 3
    for file in files:
        content = (tmp_path / "ray" / file).read_bytes()
        assert content == (tmp_path / "threads" / file).read_bytes()
        if len(file.parts) > 1:
            assert content == (tmp_path / "loop" / file).read_bytes()
