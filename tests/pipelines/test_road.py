"""The whole road on tiny photos, through the command line, with real Ray workers, MLflow and files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from pipelines.checkpoint import CheckpointLedger

_ROOT = Path(__file__).resolve().parents[2]
_RECIPE = """
model: {width: 8, enc_blk_nums: [1, 1], middle_blk_num: 1, dec_blk_nums: [1, 1]}
budget: {samples: 1200}
stages: [{share: 0.5, patch_px: 32, batch: 8}, {share: 0.5, patch_px: 64, batch: 7}]
optim: {lr: 4.0e-3, weight_decay: 0, clip_norm: 1.0, ema_decay: 0.98, residual_scale: 0.2}
schedule: {warmup_share: 0.05, final_lr: 1.0e-5}
loss: {l1: 1.0}
scaling: {num_workers: 2, threads_per_worker: 1}
validation: {times: 2, max_images: 2}
"""


def _command(arguments: Sequence[object], cwd: Path) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "NAFNET_WORKSPACE": str(cwd / "workspace")}
    return [sys.executable, "-m", "pipelines", *map(str, arguments)], environment


def _nafnet(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command, environment = _command(arguments, cwd)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _json(*arguments: object, cwd: Path) -> dict:
    # Whatever libraries print, stdout is one JSON object.
    return json.loads(_nafnet(*arguments, "--json", cwd=cwd).stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, pairs, stores and a recipe."""
    root = tmp_path_factory.mktemp("road")
    photos = {"train": [data.chelsea(), data.coffee()], "test": [data.astronaut()[:192, 128:320]]}
    for split, images in photos.items():
        folder = root / "photos" / split
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"photo{number}.png")
        side = ("--max-side", 300) if split == "train" else ()
        made = _json(
            "synth", folder, "--out", f"pairs/{split}", "--variants", 4, "--max-size", 6, *side, cwd=root
        )
        assert made["pairs"] == 4 * len(images) and Path(root, made["contact_sheet"]).is_file()
    raw = ("--format", "lmdb", "--codec", "raw", "--pairs-per-shard", 3)
    train = _json(
        "prepare", "pairs/train", "--out", "stores/train", "--crop", 96, "--stride", 64, *raw, cwd=root
    )
    assert len(train["shards"]) == 3 and train["num_refused"] == 0
    test = _json("prepare", "pairs/test", "--out", "stores/test", "--crop", 0, "--split", "test", cwd=root)
    assert test["num_pairs"] == 4 and test["crop_px"] is None
    (root / "recipe.yaml").write_text(_RECIPE)
    return root


def _check_reading_is_told(run: Path) -> None:
    """What each worker waited for, in the journal; what Ray Data counted, in each worker's log."""
    told = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    stages = [metrics for metrics in told if "data/wait/rank0" in metrics]
    assert len(stages) == 2
    for rank in (0, 1):
        assert all(0 < metrics[f"data/first_batch_s/rank{rank}"] < 60 for metrics in stages)
        assert all(0 <= metrics[f"data/wait/rank{rank}"] < 1 for metrics in stages)
        text = (run / "logs" / f"rank{rank}.log").read_text()
        assert text.count("Ray Data's statistics") == 2 and "blocks produced" in text
    assert (
        "CPU budget: 2 workers of 0.75 and their 2 readers of 0.2"
        in (run / "logs" / "driver.log").read_text()
    )


@pytest.mark.ray
def test_from_photos_to_a_restored_photo(place: Path) -> None:
    run = ("train", "--config", "recipe.yaml", "--data", "stores/train", "--val", "stores/test")
    trained = _json(*run, "--name", "first", cwd=place)
    assert trained["num_workers"] == 2 and trained["samples"] >= 1200
    assert all(Path(picture).stat().st_size > 1000 for picture in trained["pictures"])
    assert "finished already" in _nafnet(*run, "--name", "first", cwd=place, code=2).stderr
    _check_reading_is_told(Path(trained["run"]))

    report = _json("evaluate", "first", "stores/test", cwd=place)
    assert report["num_images"] == 4
    assert report["psnr_restored_db"] > report["psnr_blurred_db"]
    folders = _json("evaluate", "first", "pairs/test/blur", "pairs/test/sharp", cwd=place)
    # The same pairs from folders: the same digest and the same scores.
    assert folders["data_digest"] == report["data_digest"]
    assert folders["psnr_restored_db"] == report["psnr_restored_db"]

    version = _json("registry", "register", "first", "--on", "stores/test", cwd=place)
    assert version["version"] == 1 and version["aliases"] == ["candidate"]
    refused = _nafnet("registry", "promote", "--on", "stores/test", "--min-gain-db", 9, cwd=place, code=3)
    assert re.search(r"PSNR .* against .*gain ≥ 9", refused.stderr)
    moved = _json("registry", "promote", "--on", "stores/test", cwd=place)
    assert moved["version"] == 1 and moved["before"] is None
    listed = _json("registry", "list", cwd=place)
    assert listed[0]["aliases"] == ["candidate", "champion"]

    done = _json("restore", "pairs/test/blur/photo0/0.png", "--precision", "fp32", cwd=place)
    assert done["restored"] == 1 and "champion" in done["model"]
    restored = np.asarray(Image.open(place / "restored" / "0.png"))
    blurred = np.asarray(Image.open(place / "pairs/test/blur/photo0/0.png"))
    assert restored.shape == blurred.shape and not np.array_equal(restored, blurred)
    assert _json("restore", "pairs/test/blur/photo0/0.png", "--precision", "fp32", cwd=place)["skipped"] == 1

    # The registry's own model, loaded by MLflow, answers with the same pixels.
    code = (
        "import sys, mlflow, numpy as np; from PIL import Image\n"
        f"mlflow.set_tracking_uri('sqlite:///{place}/workspace/mlflow.db')\n"
        "model = mlflow.pyfunc.load_model('models:/nafnet-deblur@champion')\n"
        f"image = np.asarray(Image.open('{place}/pairs/test/blur/photo0/0.png'))\n"
        f"assert np.array_equal(model.predict(image), np.asarray(Image.open('{place}/restored/0.png')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_training_blurs_sharp_photos_anew(place: Path) -> None:
    made = _json("prepare", "photos/train", "--sharp", "--out", "stores/sharp", "--crop", 0, cwd=place)
    assert made["num_pairs"] == 2 and made["sides"] == ["gt"]
    run = ("train", "--config", "recipe.yaml", "--data", "stores/sharp", "--val", "stores/test")
    blur = ("--set", "data.train.0.blur.kinds=[shake,gaussian]", "--set", "data.train.0.blur.max_size_px=6")
    short = ("--set", "budget.samples=64", "--set", "validation.times=1", "--name", "fresh")
    trained = _json(*run, *blur, *short, cwd=place)
    assert trained["samples"] >= 64 and trained["val_psnr_db"] > 15
    recorded = json.loads((place / "workspace" / "runs" / "fresh" / "config.json").read_text())
    assert recorded["data"]["train"][0]["blur"]["kinds"] == ["shake", "gaussian"]
    assert "sharp photos alone" in _nafnet("evaluate", "fresh", "stores/sharp", cwd=place, code=2).stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    # Ctrl-C goes to the whole foreground group, Ray's processes among it; a SIGTERM to the command alone.
    ("number", "send", "code"),
    [(signal.SIGINT, os.killpg, 130), (signal.SIGTERM, os.kill, 143)],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    place: Path, number: int, send: Callable[[int, int], None], code: int
) -> None:
    name = f"stopped-{code}"
    run = ("train", "--config", "recipe.yaml", "--data", "stores/train", "--name", name)
    run += ("--set", "budget.samples=6000", "--set", "tracking.log_every_s=0.2")
    run_dir = place / "workspace" / "runs" / name
    command, environment = _command(run, place)
    process = subprocess.Popen(
        command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    journal = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (journal.exists() and "train/loss" in journal.read_text()):
        time.sleep(0.2)
    send(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "all state is saved" in errors and "same command goes on" in errors
    saved = CheckpointLedger(run_dir).entries()[-1]
    assert 0 < saved.samples < 6000

    _nafnet(*run, cwd=place)
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    resumed = next(row for row in rows if row.get("event") == "resumed")
    assert resumed["samples"] == saved.samples
    assert CheckpointLedger(run_dir).entries()[-1].samples >= 6000
