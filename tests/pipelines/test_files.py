from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from nafnet_core import InputError
from pipelines import files
from pipelines.files import make_folder, replaced_folder, sha256, write_json, written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Written aside


def test_file_takes_its_name_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with written_aside(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == path.parent, "a rename across file systems is no rename"
        # Whoever lists the folder meanwhile takes no half-written file for a whole one.
        assert temporary.name.startswith(".") and temporary.suffix == ".tmp"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file.bin"]


def test_folder_takes_its_name_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with written_aside(path) as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "a").write_text("a")
        (temporary / "deep" / "b").write_text("b")
        assert not path.exists()
    assert names(tmp_path) == ["folder", "folder/a", "folder/deep", "folder/deep/b"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_file_leaves_nothing_and_the_old_one(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(kind), written_aside(path) as temporary:
        temporary.write_bytes(b"half")
        raise kind
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), written_aside(tmp_path / "folder") as temporary:
        (temporary / "deep" / "deeper").mkdir(parents=True)
        (temporary / "deep" / "a").write_text("a")
        raise ValueError("stop")
    assert names(tmp_path) == []


def test_failure_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), written_aside(tmp_path / "file"):
        raise ValueError("stop")
    assert names(tmp_path) == []


def test_forgetting_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


def test_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    with pytest.raises(OSError, match="not empty"), written_aside(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert names(tmp_path) == ["folder", "folder/precious"]


def test_contents_reach_the_disk_before_the_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After a power cut a file with its name and without its content would pass for a finished one.
    order: list[str] = []
    replace, sync = os.replace, files._sync

    def record_sync(path: Path) -> None:
        order.append(f"sync {path.name}")
        sync(path)

    def record_replace(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(files, "_sync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    folder = tmp_path / "folder"
    with written_aside(folder) as temporary:
        temporary.mkdir()
        (temporary / "a").touch()
        (temporary / "b").touch()
    assert order == ["sync a", "sync b", "rename", f"sync {tmp_path.name}"]


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "a": "göpro"})
    write_json(tmp_path / "b.json", {"a": "göpro", "b": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": "göpro", "b": [1, 2.5, None]}
    assert text.endswith("}\n")
    # The same content is the same bytes: digests of JSON files can be compared.
    assert text == (tmp_path / "b.json").read_text()
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == text
    assert names(tmp_path) == ["a.json", "b.json"]


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1])
def test_sha256_of_a_file(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


# Folders


def test_folder_is_made_with_its_parents_and_may_exist(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert make_folder(folder) == folder
    (folder / "kept").touch()
    assert make_folder(folder) == folder
    assert names(tmp_path) == ["a", "a/b", "a/b/kept"]


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_folder_where_a_file_is(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("precious")
    path = tmp_path / "file" / below
    with pytest.raises(InputError, match="cannot write into this folder") as caught:
        make_folder(path)
    assert repr(str(path)) in str(caught.value)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("place", ["/proc/nafnet", "/sys/nafnet", "/proc"])
def test_folder_that_cannot_be_written(place: str) -> None:
    # Even root cannot write there.
    with pytest.raises(InputError, match=f"cannot write into this folder: '{place}'.*--out or --workspace"):
        make_folder(Path(place))


def test_a_folder_takes_the_place_of_another_only_when_whole(tmp_path: Path) -> None:
    place = tmp_path / "report"
    for number in range(2):
        with replaced_folder(place) as folder:
            (folder / "pictures").mkdir()
            (folder / "pictures" / str(number)).write_text("new")
            assert not place.exists() or (place / "pictures" / "0").is_file()
        assert [path.name for path in (place / "pictures").iterdir()] == [str(number)]
    with pytest.raises(ZeroDivisionError), replaced_folder(place) as folder:
        (folder / "half").touch()
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.rglob("*")] == ["report", "pictures", "1"]


def test_of_two_folders_at_once_one_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "report"
    with replaced_folder(place) as first:
        (first / "a").write_text("a")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            with replaced_folder(place) as second:
                (second / "b").write_text("b")
    assert [path.name for path in place.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
