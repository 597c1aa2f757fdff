from __future__ import annotations

import os
from pathlib import Path

import pytest

from nafnet_core import InputError
from pipelines.restore.finding import Item, find_items


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def outputs(*inputs: object, out: Path | str = "out", suffix: str | None = None) -> list[str]:
    return [item.output for item in find_items([str(name) for name in inputs], str(out), suffix=suffix)]


def test_photos_and_videos_of_a_folder(tmp_path: Path) -> None:
    folder = touched(
        tmp_path / "in", "b.JPG", "a/c.webp", "clip.MP4", "notes.txt", ".hidden.png", ".git/x.png"
    )
    items = find_items([str(folder)], str(tmp_path / "out"))
    assert [(item.output, item.is_video) for item in items] == [
        ("a/c.webp", False),
        ("b.JPG", False),
        ("clip.MP4", True),
    ]
    assert items[0] == Item(source=folder / "a" / "c.webp", output="a/c.webp")


def test_results_of_several_folders_have_names_of_their_own(tmp_path: Path) -> None:
    one, two = touched(tmp_path / "one", "a.png", "b.png"), touched(tmp_path / "two", "a.png")
    first, second, third = outputs(one, two)
    assert (first, second) == ("a.png", "b.png")
    assert third.startswith("a~") and third.endswith(".png")
    # The same again, so that a second run finds what the first has done.
    assert outputs(one, two) == [first, second, third]
    assert outputs(two, one)[0] == "a.png"


def test_another_format(tmp_path: Path) -> None:
    folder = touched(tmp_path / "in", "a.jpg", "a.png", "a.tif", "clip.mp4")
    names = outputs(folder, suffix=".png")
    assert len(set(names)) == 4 and names[0] == "a.png" and "clip.mp4" in names
    assert all(name.endswith((".png", ".mp4")) for name in names)


def test_a_file_of_no_known_kind_becomes_a_png(tmp_path: Path) -> None:
    touched(tmp_path, "scan", "scan.heic")
    assert outputs(tmp_path / "scan", tmp_path / "scan.heic") == ["scan.png", "scan.heic.png"]


def test_globs_keep_what_lies_below_their_fixed_part(tmp_path: Path) -> None:
    touched(tmp_path, "in/x/a.png", "in/y/a.png", "in/y/clip.mov", "in/y/notes.txt")
    assert outputs(tmp_path / "in" / "*" / "a.png") == ["x/a.png", "y/a.png"]
    assert outputs(tmp_path / "in" / "**" / "*") == ["x/a.png", "y/a.png", "y/clip.mov"]


def test_links(tmp_path: Path) -> None:
    touched(tmp_path / "elsewhere", "a.png")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "back").symlink_to(folder)
    assert outputs(folder) == ["a.png", "gone.png", "loop.png"]
    assert outputs(folder / "gone.png") == ["gone.png"]
    # What links into the output folder would be overwritten.
    with pytest.raises(InputError, match="lie in the output folder"):
        outputs(folder / "a.png", out=tmp_path / "elsewhere")


def test_ten_thousand_names_are_all_different(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(20):
        (folder / f"{number:02}").mkdir(parents=True)
        for name in range(500):
            os.close(os.open(folder / f"{number:02}" / f"{name:03}.jpg", os.O_CREAT))
    assert len(set(outputs(folder))) == 10_000
