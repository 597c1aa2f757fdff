from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.images import read_photo
from pipelines.models import LoadedModel
from pipelines.png import encode_png
from pipelines.restore import RECORD
from tests.nafnet_core.networks import photo
from tests.pipelines.conftest import Run
from tests.pipelines.restore.conftest import RestoreFiles

_ROOT = Path(__file__).resolve().parents[3]


def environment() -> dict[str, str]:
    # As many threads as here: with another number a last bit may differ, and so one level in some 500,000.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return {**os.environ, **threads, "PYTHONPATH": str(_ROOT), "NAFNET_WORKSPACE": "/nonexistent"}


def test_what_is_said(run: Run, photos: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_text("no image")
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    Image.fromarray(photo(40, 40)).convert("RGBA").save(photos / "layer.png")
    options = ("--out", tmp_path / "out", "--model", loaded.weights, "--format", "JPG", "--precision", "fp32")
    code, out, err = run("restore", photos, *options)
    assert code == 2, "one of them failed"
    assert "4 restored, 0 skipped, 1 failed" in out and "images/s" in out and RECORD in out
    assert "failed: not an image" in err and "broken.jpg" in err
    assert "alpha is left out, in 1 file" in err
    assert "colours moved by more than 2 levels in 4 files" in err and "--keep-colour" in err
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.jpg")) == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
        "layer.jpg",
    ]
    (photos / "broken.jpg").unlink()
    code, out, err = run("restore", photos, *options, "--json")
    told = json.loads(out)
    assert code == 0 and (told["restored"], told["skipped"], told["failed"]) == (0, 4, 0)
    assert told["record"].endswith(RECORD) and told["images_per_s"] == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--tile", "100"), "tiles too small"),
        (("--precision", "int8"), "unknown precision"),
        (("--on-error", "cry"), "unknown --on-error"),
        (("--format", "heic"), "unknown format"),
        (("--scale", "2"), "--scale"),
        (("--quality", "0"), "--quality"),
        (("--tile-batch", "0"), "--tile-batch"),
    ],
)
def test_options_that_cannot_be(
    run: Run, photos: Path, loaded: LoadedModel, options: tuple[str, ...], line: str
) -> None:
    code, out, err = run("restore", photos, "--model", loaded.weights, *options)
    assert code == 2 and line in err and out == ""
    assert not Path("restored").exists()


def test_settings_reach_the_network(
    run: Run, restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    settings = {"precision": "fp32", "scale": 0.5, "ensemble": True, "keep_colour": True}
    restore_files(photos / "a.png", loaded, tmp_path / "expected", **settings)
    options = ("--precision", "fp32", "--scale", "0.5", "--tta", "--keep-colour")
    code, _, _ = run("restore", photos / "a.png", "--out", "out", "--model", loaded.weights, *options)
    assert code == 0
    assert Path("out/a.png").read_bytes() == (tmp_path / "expected" / "a.png").read_bytes()
    plain = restore_files(photos / "a.png", loaded, tmp_path / "plain")
    assert plain.count("restored") == 1
    assert (tmp_path / "plain" / "a.png").read_bytes() != Path("out/a.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path, sign: signal.Signals
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.png").write_bytes(encode_png(np.roll(photo(400, 500), number, axis=0)))
    arguments = ["restore", folder, "--out", out, "--model", loaded.weights, "--precision", "fp32", "--tta"]
    command = [sys.executable, "-m", "pipelines", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    record = out / RECORD
    while not record.exists() or len(record.read_text().splitlines()) < 3:
        assert process.poll() is None, "it was over before it could be stopped"
        time.sleep(0.02)
    process.send_signal(sign)
    _, told = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sign]
    assert "Traceback" not in told
    assert sign == signal.SIGKILL or "The same command goes on" in told
    done = len(record.read_text().splitlines())
    assert 3 <= done < 30
    for path in out.glob("*.png"):
        read_photo(path)  # raises where it is not whole
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert f"{done} skipped" in again.stdout or f"{done + 1} skipped" in again.stdout
    restore_files(folder, loaded, tmp_path / "at once", ensemble=True)
    names = sorted(path.name for path in folder.iterdir())
    assert [path.name for path in sorted(out.glob("*.png"))] == names
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()
