from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from nafnet_core import restore_image
from pipelines.models import LoadedModel
from tests.nafnet_core.networks import photo
from tests.pipelines.restore.conftest import RestoreFiles
from tests.pipelines.restore.results import files_of, record_of

SIZE, FPS, NUM_FRAMES = (96, 64), 12.5, 9


def frames() -> list[np.ndarray]:
    return [np.roll(photo(SIZE[1], SIZE[0]), 3 * number, axis=1) for number in range(NUM_FRAMES)]


def write_video(path: Path, codec: str = "mp4v") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), FPS, SIZE)
    assert writer.isOpened()
    for frame in frames():
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def read_video(path: Path) -> tuple[float, list[np.ndarray]]:
    capture = cv2.VideoCapture(str(path))
    found, fps = [], capture.get(cv2.CAP_PROP_FPS)
    while True:
        is_read, frame = capture.read()
        if not is_read:
            return fps, found
        found.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"), ("a.mov", "mp4v"), ("a.webm", "VP80")],
)
def test_rate_size_and_frames_are_kept(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path, name: str, codec: str
) -> None:
    video = write_video(tmp_path / name, codec)
    notes: list[str] = []
    result = restore_files(
        video, loaded, tmp_path / "out", on_progress=lambda done, total, note: notes.append(note)
    )
    (entry,) = result.files
    assert (entry.status, entry.num_frames, entry.width_px, entry.height_px) == (
        "restored",
        NUM_FRAMES,
        *SIZE,
    )
    assert "sound is left out, if there was any" in entry.notes
    fps, restored = read_video(tmp_path / "out" / name)
    assert fps == pytest.approx(FPS, abs=0.05) and len(restored) == NUM_FRAMES
    assert any(note.startswith(f"{name} frame 9") for note in notes)
    _, source = read_video(video)
    for before, after in zip(source, restored, strict=True):
        expected = restore_image(loaded.model, before, train_patch_px=64).astype(int)
        # What the encoder loses is far less than what the network changes.
        assert np.abs(after - expected).mean() < 0.5 * np.abs(before - expected).mean()
    assert result.images_per_s > 0


def test_a_video_among_photos_is_done_once(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    write_video(photos / "sub" / "clip.mp4")
    out = tmp_path / "out"
    assert restore_files(photos, loaded, out).count("restored") == 4
    assert files_of(out) == ["a.png", "restore.jsonl", "sub/b.png", "sub/clip.mp4", "sub/deep/c.png"]
    assert restore_files(photos, loaded, out).count("skipped") == 4
    (out / "sub" / "clip.mp4").write_bytes(b"damaged later")
    assert restore_files(photos, loaded, out).count("restored") == 1


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_bad_video_is_told(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path, damage: str
) -> None:
    video = write_video(tmp_path / "a.mp4")
    content = {"empty": b"", "text": b"no video" * 99, "cut": video.read_bytes()[: video.stat().st_size // 3]}
    video.write_bytes(content[damage])
    (entry,) = restore_files(video, loaded, tmp_path / "out").files
    assert entry.status == "failed" and "a.mp4" in (entry.error or "")
    assert "\n" not in (entry.error or "")
    assert files_of(tmp_path / "out") == ["restore.jsonl"]
    assert record_of(tmp_path / "out")[0]["error"] == entry.error


def test_frames_that_cannot_be_read_are_told(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path
) -> None:
    video = write_video(tmp_path / "a.avi", "MJPG")
    content = bytearray(video.read_bytes())
    middle = content.find(b"\xff\xd8", len(content) // 2)
    content[middle:] = bytes(len(content) - middle)
    video.write_bytes(bytes(content))
    (entry,) = restore_files(video, loaded, tmp_path / "out").files
    assert entry.num_frames is not None and 0 < entry.num_frames < NUM_FRAMES
    assert f"{entry.num_frames} of {NUM_FRAMES} frames could be read" in entry.notes
