from __future__ import annotations

from pathlib import Path

import pytest

from nafnet_core import InputError
from pipelines.models import LoadedModel
from pipelines.restore import RECORD
from pipelines.restore.record import Record
from pipelines.storage import folder
from tests.pipelines.buckets import Server
from tests.pipelines.restore.conftest import RestoreFiles


def test_from_a_bucket_into_another_folder_of_it(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path, s3: Server, bucket: str
) -> None:
    source = s3.upload(photos, f"{bucket}/photos")
    out = s3.url(f"{bucket}/restored")
    restore_files(photos, loaded, tmp_path / "here")
    result = restore_files([source], loaded, out)
    assert result.count("restored") == 3
    assert all("AKIA" not in file.input and "secret" not in file.input for file in result.files)
    place = folder(out)
    for name in ("a.png", "sub/b.png", "sub/deep/c.png"):
        assert place.read(name) == (tmp_path / "here" / name).read_bytes()
    assert len(place.read(RECORD).splitlines()) == 3
    assert restore_files([source], loaded, out).count("skipped") == 3
    place.delete("sub/b.png")
    assert restore_files([source], loaded, out).count("restored") == 1
    assert len(place.read(RECORD).splitlines()) == 4
    entries = Record(place).entries()
    assert entries["sub/b.png"].status == "restored"


def test_photos_in_the_output_folder_of_a_bucket(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, s3: Server, bucket: str
) -> None:
    source = s3.upload(photos, f"{bucket}/photos")
    with pytest.raises(InputError, match="lie in the output folder"):
        restore_files([source], loaded, source)


def test_no_such_folder_in_a_bucket(
    restore_files: RestoreFiles, loaded: LoadedModel, s3: Server, bucket: str
) -> None:
    with pytest.raises(InputError, match="no such file, folder or match"):
        restore_files([s3.url(f"{bucket}/nothing")], loaded, s3.url(f"{bucket}/out"))
