"""Pairs from frames and video: windows, flaws of sequences, what is read and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from skimage import data

from nafnet_core import InputError
from nafnet_core.blur import average_frames
from pipelines import synth
from pipelines.images import read_rgb_u8
from pipelines.png import encode_png
from pipelines.sources import find_source
from pipelines.synth import SynthConfig, SynthResult
from tests.pipelines.test_synth import outputs, same

Image = np.ndarray


def moving(number: int, *, photo: Any = data.chelsea, height: int = 80, width: int = 96) -> list[Image]:
    """Frames of a camera that pans over a photo, two pixels a frame."""
    whole = photo()
    return [np.ascontiguousarray(whole[60 : 60 + height, 2 * i : 2 * i + width]) for i in range(number)]


def write_frames(folder: Path, frames: Sequence[Image], *, name: str = "{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        (folder / name.format(number)).write_bytes(encode_png(frame))
    return folder


def write_video(path: Path, frames: Sequence[Image], codec: str, fps: float = 240.0) -> Path:
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (width, height))
    if not writer.isOpened():
        pytest.skip(f"this OpenCV writes no {codec}")
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def run(source: Path, out: Path, **options: Any) -> SynthResult:
    average = options.pop("average", (7, 7))
    return synth.run(SynthConfig(sharp=[source], out=out, average=average, **options))


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "degradations.jsonl").read_text().splitlines()]


def test_windows_are_averaged_and_their_middle_is_sharp(tmp_path: Path) -> None:
    frames = moving(24)
    # Not padded: 10.png follows 9.png, whatever the alphabet says.
    result = run(write_frames(tmp_path / "walk", frames), tmp_path / "out")
    blur, sharp = outputs(tmp_path / "out"), outputs(tmp_path / "out", "sharp")
    assert list(blur) == ["walk/000000", "walk/000001", "walk/000002"]
    for number, key in enumerate(blur):
        assert np.array_equal(blur[key], average_frames(frames[7 * number : 7 * number + 7]))
        assert np.array_equal(sharp[key], frames[7 * number + 3])
    record = records(tmp_path / "out")[1]
    assert (record["first_frame"], record["sharp_frame"], record["last_frame"]) == (
        "7.png",
        "10.png",
        "13.png",
    )
    assert record["num_frames"] == 7 and record["read_noise"] == 0 and record["gamma"] == 2.2
    assert result.notes == ("walk: 24 frames of 96×80",) and result.refused == ()
    assert read_rgb_u8(result.contact_sheet).std() > 10


def test_stride_and_drawn_lengths(tmp_path: Path) -> None:
    frames = moving(60)
    source = write_frames(tmp_path / "walk", frames)
    run(source, tmp_path / "overlap", window_stride=3, average=(5, 5))
    first = [record["first_index"] for record in records(tmp_path / "overlap")]
    assert first == list(range(0, 56, 3))
    blur = outputs(tmp_path / "overlap")
    assert np.array_equal(blur["walk/000002"], average_frames(frames[6:11]))
    run(source, tmp_path / "drawn", average=(3, 9))
    made = records(tmp_path / "drawn")
    lengths = [record["num_frames"] for record in made]
    assert set(lengths) <= {3, 5, 7, 9} and len(set(lengths)) > 1
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    assert [record["first_index"] for record in made] == starts, "without a stride, windows join"


def test_scenes_never_share_a_window(tmp_path: Path) -> None:
    write_frames(tmp_path / "in" / "day" / "one", moving(10))
    write_frames(tmp_path / "in" / "day" / "two", moving(13, photo=data.astronaut))
    write_video(tmp_path / "in" / "three.avi", moving(9), "MJPG")
    result = run(tmp_path / "in", tmp_path / "out")
    assert list(outputs(tmp_path / "out")) == ["day_one/000000", "day_two/000000", "three/000000"]
    assert result.num_pairs == 3
    refs = find_source(tmp_path / "out", split="train").pairs()
    assert {ref.scene for ref in refs} == {"day_one", "day_two", "three"}


def test_noise_compression_and_size(tmp_path: Path) -> None:
    source = write_frames(tmp_path / "walk", moving(7, height=100, width=200))
    run(source, tmp_path / "plain", max_side_px=128)
    run(source, tmp_path / "rough", max_side_px=128, max_noise=0.05, min_jpeg_quality=30)
    plain, rough = (outputs(tmp_path / name)["walk/000000"] for name in ("plain", "rough"))
    assert plain.shape == rough.shape == (64, 128, 3)
    assert np.abs(plain.astype(int) - rough).mean() > 1
    assert records(tmp_path / "rough")[0]["jpeg_quality"] >= 30
    sides = [outputs(tmp_path / name, "sharp")["walk/000000"] for name in ("plain", "rough")]
    assert np.array_equal(*sides), "the sharp side is left alone"


@pytest.mark.parametrize(
    ("codec", "suffix"), [("FFV1", "mkv"), ("mp4v", "mp4"), ("MJPG", "avi"), ("VP80", "webm")]
)
def test_video_of_every_codec(tmp_path: Path, codec: str, suffix: str, capfd: Any) -> None:
    frames = moving(15)
    video = write_video(tmp_path / f"pan.{suffix}", frames, codec)
    capfd.readouterr()
    result = run(video, tmp_path / "out")
    assert result.notes == ("pan: 15 frames of 96×80 at 240 fps",)
    blur, sharp = outputs(tmp_path / "out"), outputs(tmp_path / "out", "sharp")
    assert list(blur) == ["pan/000000", "pan/000001"]
    for number, key in enumerate(blur):
        # Colours in order and the right frames: codecs change little, a frame beside it is 2 px off.
        assert cv2.PSNR(blur[key], average_frames(frames[7 * number : 7 * number + 7])) > 25
        right, beside = (cv2.PSNR(sharp[key], frames[7 * number + 3 + step]) for step in (0, 1))
        assert right > 28 and right > beside + 3
    if codec == "FFV1":
        assert np.array_equal(sharp["pan/000001"], frames[10]), "lossless"
    assert not capfd.readouterr().err, "FFmpeg's own remarks are kept off stderr"


def test_window_of_a_video_over_the_end_of_another_overlap(tmp_path: Path) -> None:
    frames = moving(20)
    video = write_video(tmp_path / "pan.mkv", frames, "FFV1")
    for name, source in (("video", video), ("files", write_frames(tmp_path / "pan", frames))):
        run(source, tmp_path / name, average=(3, 9), window_stride=2)
    assert same(outputs(tmp_path / "video"), outputs(tmp_path / "files"))
    assert len(outputs(tmp_path / "video")) >= 6


def test_truncated_video_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    video = write_video(tmp_path / "pan.avi", moving(30), "MJPG")
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    result = run(video, tmp_path / "out", average=(3, 3))
    assert 2 <= result.num_pairs < 10
    assert "cut short or damaged" in result.notes[1] and "of 30 frames" in result.notes[1]


def test_what_is_no_video(tmp_path: Path) -> None:
    for name, content in (
        ("empty.mp4", b""),
        ("words.mp4", b"no video at all " * 99),
        ("words.txt", b"words"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"a video that OpenCV cannot read: .*{name}"):
            run(tmp_path / name, tmp_path / "out")
    video = write_video(tmp_path / "pan.mp4", moving(9), "mp4v")
    video.write_bytes(video.read_bytes()[:2000])  # its index stands at the end
    with pytest.raises(InputError, match="cannot read.*ffmpeg"):
        run(video, tmp_path / "out")


def test_cut_in_a_sequence(tmp_path: Path) -> None:
    frames = moving(10) + moving(11, photo=data.rocket)
    result = run(write_frames(tmp_path / "film", frames), tmp_path / "out")
    assert list(outputs(tmp_path / "out")) == ["film/000000", "film/000002"]
    assert len(result.refused) == 1
    assert "film: no pair of 7.png to 13.png: the picture jumps at 10.png" in result.refused[0]


def test_missing_and_damaged_frames(tmp_path: Path) -> None:
    source = write_frames(tmp_path / "film", moving(35))
    (source / "9.png").unlink()
    (source / "24.png").write_bytes((source / "24.png").read_bytes()[:400])
    result = run(source, tmp_path / "out")
    assert [key[-1] for key in outputs(tmp_path / "out")] == ["0", "2"]
    assert "frames are missing before 10.png" in result.refused[0]
    assert "damaged or truncated" in result.refused[1] and "24.png" in result.refused[1]


def test_numbers_that_step_by_more_than_one(tmp_path: Path) -> None:
    source = tmp_path / "film"
    for number, frame in enumerate(moving(14)):
        write_frames(source, [frame], name=f"shot-{5 * number:04d}.png")
    assert run(source, tmp_path / "out").num_pairs == 2


def test_still_and_stuttering_sequences_are_remarked_on(tmp_path: Path) -> None:
    still = run(write_frames(tmp_path / "still", moving(1) * 9), tmp_path / "1")
    assert "still: next to nothing moves" in still.notes[1] and still.num_pairs == 1
    doubled = [frame for frame in moving(12) for _ in range(2)][:-1]
    # Half of the differences are 0, so that the median stays above.
    result = run(write_frames(tmp_path / "slow", doubled + moving(24)[12:]), tmp_path / "2")
    assert "frames repeat the one before" in result.notes[1]


def test_one_bad_sequence_among_good_ones(tmp_path: Path) -> None:
    write_frames(tmp_path / "in" / "good", moving(7))
    write_frames(tmp_path / "in" / "short", moving(6))
    write_frames(tmp_path / "in" / "mixed", [*moving(4), *moving(4, height=90)])
    result = run(tmp_path / "in", tmp_path / "out")
    assert list(outputs(tmp_path / "out")) == ["good/000000"]
    assert len(result.refused) == 2
    assert "several sizes" in result.refused[0] and "expected 96×80" in result.refused[0]
    assert "96×90 in 4.png" in result.refused[0]
    assert "fewer frames than a window" in result.refused[1] and "got 6" in result.refused[1]


def test_sources_that_are_no_sequences(tmp_path: Path) -> None:
    photos = [data.astronaut, data.chelsea, data.coffee, data.rocket]
    crops = [moving(1, photo=photo)[0] for photo in photos]
    with pytest.raises(InputError, match="not consecutive frames.*without --average"):
        run(write_frames(tmp_path / "photos", crops), tmp_path / "out", average=(3, 3))
    with pytest.raises(InputError, match="a single image is no sequence"):
        run(tmp_path / "photos" / "0.png", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no frames and no videos"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="frames too small"):
        run(write_frames(tmp_path / "small", moving(7, height=60)), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"average": (8, 8)}, "odd numbers"),
        ({"average": (7, 12)}, "got 7:12"),
        ({"average": (9, 7)}, "odd numbers"),
        ({"average": (1, 1)}, "odd numbers"),
        ({"kinds": ("gaussian",)}, "kinds: for photos, not for frames"),
        ({"variants": 2, "max_size_px": 9.0}, "variants, max_size_px: for photos"),
        ({"window_stride": 0}, "stride must be at least 1"),
        ({"average": None, "window_stride": 7}, "a window stride is for frames"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    source = write_frames(tmp_path / "walk", moving(7))
    with pytest.raises(InputError, match=line):
        run(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_video_without_average(tmp_path: Path) -> None:
    video = write_video(tmp_path / "pan.avi", moving(3), "MJPG")
    with pytest.raises(InputError, match=r"a video, not a photo.*--average 7"):
        run(video, tmp_path / "out", average=None)


def test_only_the_rest_is_made(tmp_path: Path) -> None:
    source = write_frames(tmp_path / "walk", moving(21))
    run(source, tmp_path / "out")
    before, lines = outputs(tmp_path / "out"), (tmp_path / "out" / "degradations.jsonl").read_bytes()
    blur = tmp_path / "out" / "blur" / "walk"
    (blur / "000001.png").unlink()
    kept = (blur / "000002.png").stat().st_mtime_ns
    again = run(source, tmp_path / "out")
    assert (again.num_pairs, again.num_kept) == (3, 2)
    assert same(outputs(tmp_path / "out"), before)
    assert (tmp_path / "out" / "degradations.jsonl").read_bytes() == lines
    assert (blur / "000002.png").stat().st_mtime_ns == kept, "not touched"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_threads_and_ray_write_the_same_bytes(tmp_path: Path) -> None:
    write_frames(tmp_path / "in" / "walk", moving(21))
    write_video(tmp_path / "in" / "pan.mkv", moving(14), "FFV1")
    config = SynthConfig(sharp=[tmp_path / "in"], out=tmp_path / "threads", average=(3, 7), max_noise=0.02)
    synth.run(replace(config, use_ray=False))
    synth.run(replace(config, out=tmp_path / "ray", use_ray=True))
    files = sorted(path.relative_to(tmp_path / "ray") for path in (tmp_path / "ray").rglob("*.*"))
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "ray" / file).read_bytes() == (tmp_path / "threads" / file).read_bytes(), file
