from __future__ import annotations

import os
from pathlib import Path

import pytest

from nafnet_core import CapabilityError
from pipelines.scratch import scratch_folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"nafnet-{os.getuid()}"


def test_a_folder_goes_away_and_so_does_what_others_left(base: Path) -> None:
    with scratch_folder() as path, scratch_folder() as other:
        assert path != other and path.is_dir() and path.parent == base
        (base / "left").mkdir()
        with scratch_folder():
            assert not (base / "left").exists() and path.is_dir() and other.is_dir()
    assert [entry.name for entry in base.iterdir()] == ["lock"]


@pytest.mark.parametrize("made", ["for all", "a link"])
def test_a_folder_of_others_is_not_used(base: Path, tmp_path: Path, made: str) -> None:
    if made == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        base.symlink_to(tmp_path / "elsewhere")
    else:
        base.mkdir()
        base.chmod(0o777)
    with pytest.raises(CapabilityError, match="not a folder of this user alone.*TMPDIR"), scratch_folder():
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("content")
    base.mkdir(mode=0o700)
    (base / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(CapabilityError, match="no place for temporary files"), scratch_folder():
        pass
    assert (tmp_path / "victim").read_text() == "content"
