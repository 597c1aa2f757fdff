from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nafnet_core import InputError
from pipelines.models import LoadedModel
from pipelines.png import encode_png
from pipelines.restore import RECORD
from tests.nafnet_core.networks import photo
from tests.pipelines.restore.conftest import RestoreFiles

pytestmark = pytest.mark.ray


def many_photos(folder: Path, number: int, times: int = 1) -> Path:
    folder.mkdir()
    for index in range(number):
        height, width = (40, 64) if index % 3 else (70, 30)
        (folder / f"{index:03}.png").write_bytes(
            encode_png(photo(times * (height + index % 2), times * width))
        )
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


@pytest.mark.parametrize("tile_batch", [1, 3])
def test_a_job_of_many_workers_writes_the_same_bytes(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path, ray_session: None, tile_batch: int
) -> None:
    inputs = many_photos(tmp_path / "in", 40)
    (inputs / "broken.png").write_text("no image")
    pinned = {"tile_px": 192, "tile_batch": tile_batch}
    restore_files(inputs, loaded, tmp_path / "one", **pinned)
    result = restore_files(inputs, loaded, tmp_path / "many", use_ray=True, num_workers=4, **pinned)
    assert result.count("restored") == 40 and result.count("failed") == 1
    assert [Path(file.input).name for file in result.files] == sorted(path.name for path in inputs.iterdir())
    assert len(contents(tmp_path / "one")) == 40
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "many").iterdir() if path.suffix != ".png") == [RECORD]
    again = restore_files(inputs, loaded, tmp_path / "many", use_ray=True, num_workers=2, **pinned)
    assert again.count("skipped") == 40 and again.count("failed") == 1


def test_stop_at_the_first_bad_photo(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path, ray_session: None
) -> None:
    inputs = many_photos(tmp_path / "in", 4)
    (inputs / "001.png").write_text("no image")
    with pytest.raises(InputError, match=r"not an image.*001\.png"):
        restore_files(inputs, loaded, tmp_path / "out", use_ray=True, num_workers=2, stop_on_error=True)


@pytest.mark.slow
def test_killed_workers_lose_nothing(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path, ray_session: None
) -> None:
    import psutil

    inputs = many_photos(tmp_path / "in", 60, times=6)
    restore_files(inputs, loaded, tmp_path / "one", ensemble=True)
    stop, killed = threading.Event(), []

    def kill() -> None:
        while not stop.is_set() and len(killed) < 3:
            time.sleep(1.0)
            workers = [
                process
                for process in psutil.process_iter(["cmdline"])
                if any("MapWorker" in part for part in process.info["cmdline"] or [])
            ]
            if workers and (tmp_path / "many" / RECORD).exists():
                os.kill(workers[0].pid, signal.SIGKILL)
                killed.append(workers[0].pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = restore_files(inputs, loaded, tmp_path / "many", use_ray=True, num_workers=2, ensemble=True)
    finally:
        stop.set()
        killer.join()
    assert killed, "nobody was killed, which tests nothing"
    assert result.count("restored") == 60
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
