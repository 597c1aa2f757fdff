from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from nafnet_core import PRESETS, InputError, NAFNet, NAFNetConfig, save_model, save_official
from nafnet_core.metrics import psnr
from pipelines.checkpoint import CheckpointLedger, Snapshot
from pipelines.images import read_rgb_u8
from pipelines.inspect import InspectConfig, InspectResult, run
from pipelines.inspect.drawing import draw_histograms, draw_pairs
from pipelines.inspect.sampling import Sample, psnr_db, sharpness, spread
from pipelines.png import encode_png
from pipelines.shards import Pair
from pipelines.sources import FolderPairs
from pipelines.store import PairStore
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import lively_network
from tests.pipelines.conftest import Run
from tests.pipelines.conftest import run as nafnet  # noqa: F401 - a fixture
from tests.pipelines.pairs import blurred, make_store, piece, write_pairs

_TINY = NAFNetConfig(width=4, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,))


@contextmanager
def silent(*words: str) -> Iterator[Callable[..., None]]:
    yield lambda done, total, note="": None


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., InspectResult]:
    def call(what: object, **options: Any) -> InspectResult:
        config = InspectConfig(what=str(what), workspace=Workspace(tmp_path / "workspace"), **options)
        return run(config, show=silent)

    return call


Look = Callable[..., InspectResult]


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


# Stores


@pytest.mark.parametrize(("format", "codec"), [("parquet", "png"), ("lmdb", "png"), ("lmdb", "raw")])
def test_a_whole_store(pairs: FolderPairs, tmp_path: Path, look: Look, format: str, codec: str) -> None:
    store = make_store(pairs, tmp_path / "store", format=format, codec=codec)
    found = look(store.root, deep=True)
    assert found.kind == "store" and found.problems == () and found.notes == ()
    assert found.facts["pairs"] == 45 and found.facts["shards"] == 3 and found.facts["crop_px"] == 32
    assert found.facts["bytes"] == sum(path.stat().st_size for path in store.root.glob("shard-*"))
    assert found.verification is not None and found.statistics is not None
    assert found.verification["hashed_bytes"] == found.facts["bytes"]
    assert found.verification["digest_of_pixels"] == store.digest
    assert found.statistics["num_sampled"] == 45 and found.statistics["num_scenes"] == 3
    # The sharp side is the sharper one, as a Gaussian blurred the other.
    assert found.statistics["sharpness_sharp"]["median"] > 2 * found.statistics["sharpness_blurred"]["median"]
    if format == "parquet":  # LMDB would refuse a second opening in this process
        levels = [psnr_db(pair.lq, pair.gt) for pair in map(store.pair, range(45))]
        assert found.statistics["psnr_db"]["median"] == pytest.approx(np.median(levels))
    assert [path.name for path in found.pictures] == ["pairs.png", "histograms.png"]
    assert all(path.parent == tmp_path / "workspace" / "inspect" / "store" for path in found.pictures)
    assert read_rgb_u8(found.pictures[0]).shape[1] == 1320


def test_each_kind_of_damage_is_one_line(own_store: Path, look: Look) -> None:
    flip_byte(own_store / "shard-00000.parquet", 2000)
    shard = own_store / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])
    (own_store / "shard-00002.parquet").unlink()
    (own_store / "shard-00003.parquet").write_bytes(b"not ours")
    (own_store / "scenes.txt").write_text("a\n")
    found = look(own_store)
    listed = PairStore(own_store).manifest.shards
    damaged, cut, missing = found.problems
    assert "shard-00000.parquet" in damaged and listed[0].sha256 in damaged and "Copy it anew" in damaged
    assert f"shard-00001.parquet' (expected {listed[1].bytes} bytes, got {listed[1].bytes - 7})" in cut
    assert "a missing shard" in missing and "shard-00002.parquet" in missing
    assert found.notes == ("Files that the store does not list: shard-00003.parquet",)
    assert found.verification is not None and found.verification["bad_shards"] == [0, 1, 2]
    # Nothing is read from a damaged shard, so there is nothing to draw.
    assert found.pictures == () and found.statistics is not None
    assert found.statistics["num_sampled"] == 0 and found.statistics["psnr_db"] is None


def test_pairs_of_whole_shards_are_still_shown(own_store: Path, look: Look) -> None:
    flip_byte(own_store / "shard-00001.parquet", 2000)
    found = look(own_store, deep=True)
    assert len(found.problems) == 1 and found.verification is not None and found.statistics is not None
    assert found.verification["digest_of_pixels"] is None
    assert found.statistics["num_sampled"] == 27 and len(found.pictures) == 2


def test_only_deep_sees_other_pixels_under_right_checksums(own_store: Path, look: Look) -> None:
    path = own_store / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "digest": "0" * 64}))
    assert look(own_store).problems == ()
    (problem,) = look(own_store, deep=True).problems
    assert "the pixels are not those of the manifest" in problem and manifest["digest"] in problem
    manifest["shards"][1]["pairs"] += 1
    path.write_text(json.dumps(manifest))
    assert "contradicts itself" in look(own_store).problems[0]
    path.write_text(json.dumps({**manifest, "num_pairs": 46}))
    assert look(own_store, deep=True).problems


def test_without_verifying_nothing_is_hashed(own_store: Path, look: Look) -> None:
    (own_store / "shard-00002.parquet").write_bytes(b"")
    found = look(own_store, verify=False)
    assert found.verification is None and found.statistics is not None
    assert found.statistics["num_unreadable"] == 9 and "shard-00002" in found.problems[0]


def test_a_sample_is_the_same_each_time_and_never_more(store: PairStore, look: Look) -> None:
    first, second = (look(store.root, num_samples=10).statistics for _ in range(2))
    assert first == second and first is not None and first["num_sampled"] == 10
    assert first["psnr_db"] != look(store.root, num_samples=11).statistics["psnr_db"]  # type: ignore[index]


def test_a_store_that_cannot_be_written(own_store: Path, look: Look) -> None:
    os.chmod(own_store, 0o555)
    before = sorted(path.name for path in own_store.iterdir())
    found = look(own_store)
    assert found.problems == () and len(found.pictures) == 2
    assert sorted(path.name for path in own_store.iterdir()) == before
    os.chmod(own_store, 0o755)


def test_an_unfinished_store(own_store: Path, look: Look) -> None:
    (own_store / "manifest.json").unlink()
    (own_store / ".progress").mkdir()
    (own_store / ".progress" / "job.json").write_text("{}")
    with pytest.raises(InputError, match="an unfinished store"):
        look(own_store)


# Sources


def test_pairs_before_they_are_prepared(pairs: FolderPairs, tmp_path: Path, look: Look) -> None:
    found = look(pairs.lq_dir.parent, out=tmp_path / "pictures")
    assert found.kind == "source" and found.facts["adapter"] == "folders"
    assert found.facts["pairs"] == {"train": 5} and found.facts["scenes"] == {"train": 3}
    assert found.pictures[0] == tmp_path / "pictures" / "pairs.png" and found.pictures[1].is_file()


def test_splits_of_a_source(tmp_path: Path, look: Look) -> None:
    for split, number in (("train", 3), ("test", 2)):
        for side in ("blur", "sharp"):
            folder = tmp_path / "gopro" / split / f"GOPR_{split}" / side
            folder.mkdir(parents=True)
            for index in range(number):
                (folder / f"{index}.png").write_bytes(encode_png(piece(index)))
    found = look(tmp_path / "gopro")
    assert found.facts["adapter"] == "gopro" and found.facts["pairs"] == {"train": 3, "test": 2}
    assert "Statistics and pictures are of split train." in found.notes
    # Both sides are the same image here, which has no PSNR.
    assert any("3 of 3 pairs are equal" in note for note in found.notes)
    assert found.statistics is not None and found.statistics["psnr_db"] is None
    assert len(found.pictures) == 2


def test_a_damaged_image_of_a_source_is_told(tmp_path: Path, look: Look) -> None:
    write_pairs(tmp_path / "pairs", ["1", "2", "3"])
    path = tmp_path / "pairs" / "blur" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    found = look(tmp_path / "pairs")
    assert found.statistics is not None and found.statistics["num_sampled"] == 2
    assert found.statistics["num_unreadable"] == 1 and found.problems == ()
    assert "unreadable" in found.notes[0] and "2.png" in found.notes[0]
    (tmp_path / "pairs" / "sharp" / "3.png").unlink()
    with pytest.raises(InputError, match="without a partner"):
        look(tmp_path / "pairs")


# Models


def test_a_trained_model(tmp_path: Path, look: Look) -> None:
    model = lively_network(_TINY, seed=1)
    save_model(model, tmp_path / "m.safetensors", metadata={"train_patch_px": 64})
    found = look(tmp_path / "m.safetensors")
    assert (
        found.kind == "model" and found.problems == () and found.facts["metadata"] == {"train_patch_px": 64}
    )
    assert found.facts["width"] == 4 and found.facts["parameters"] == model.num_parameters
    assert found.facts["gmacs_1280x720"] == model.config.num_macs(720, 1280) / 1e9
    assert found.facts["dtype"] == ["float32"] and found.facts["fresh"] is False
    assert "trained: largest" in found.notes[0]


def test_a_fresh_model_says_so(tmp_path: Path, look: Look) -> None:
    save_official(NAFNet(PRESETS["mobile"]), tmp_path / "m.pth")
    found = look(tmp_path / "m.pth")
    assert found.facts["preset"] == "mobile" and found.facts["fresh"] is True
    assert "every beta and gamma is zero" in found.notes[0]


def test_weights_that_are_no_numbers(tmp_path: Path, look: Look) -> None:
    model = lively_network(_TINY, seed=1)
    with torch.no_grad():
        model.intro.weight[0, 0, 0, 0] = torch.nan
        model.ending.bias[0] = torch.inf
    save_model(model, tmp_path / "m.safetensors", metadata={})
    found = look(tmp_path / "m.safetensors")
    (problem,) = found.problems
    assert "intro.weight" in problem and "ending.bias" in problem and not found.facts["finite"]


# Runs


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints and a journal."""
    folder = tmp_path / "workspace" / "runs" / "mine"
    ledger = CheckpointLedger(folder)
    model = lively_network(_TINY, seed=1)
    for samples, level in ((64, 25.5), (128, 25.25)):
        snapshot = Snapshot(samples=samples, model=model, ema=None, optimizer={}, state={}, metadata={})
        ledger.save(snapshot, level)
    rows = [
        {"time": 1.0 * n, "samples": 16 * n, "metrics": {"train/psnr_db": 24 + n / 8, "train/lr": 1e-3}}
        for n in range(1, 9)
    ]
    rows.append({"time": 9.0, "samples": 128, "metrics": {"val/psnr_db": 25.25, "val/gain_db": 1.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"name": "mine", "model": {"preset": "mobile"}}))
    (folder / "tracking.json").write_text(json.dumps({"run_id": "abc"}))
    return folder


def test_a_run_by_its_name(run_dir: Path, look: Look) -> None:
    for what in ("mine", run_dir):
        found = look(what)
        assert found.kind == "run" and found.name == "mine" and found.problems == ()
    assert [c["samples"] for c in found.checkpoints] == [64, 128] and all(
        c["whole"] for c in found.checkpoints
    )
    assert found.facts["best"] == "0000000064" and found.facts["samples"] == 128
    assert found.facts["mlflow_run_id"] == "abc" and found.facts["finished"] is False
    assert (
        found.facts["last_metrics"]["val/gain_db"] == 1.0
        and found.facts["last_metrics"]["train/psnr_db"] == 25
    )
    assert [path.name for path in found.pictures] == ["curves.png"]


def test_a_damaged_checkpoint(run_dir: Path, look: Look) -> None:
    flip_byte(run_dir / "checkpoints" / "0000000128" / "model.safetensors", 900)
    (run_dir / "checkpoints" / "0000000064" / "optim.safetensors").unlink()
    first, second = look("mine").problems
    assert "0000000064" in first and "optim.safetensors is missing" in first
    assert "0000000128" in second and "model.safetensors has another digest" in second
    assert look("mine", verify=False).problems == ()


def test_a_run_that_has_only_begun(run_dir: Path, look: Look) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "metrics.jsonl").unlink()
    found = look("mine")
    assert found.notes == ("No checkpoint has been written yet",) and found.pictures == ()
    (run_dir / "metrics.jsonl").write_text("{damaged\n")
    assert "a damaged journal" in look("mine").problems[0]


# What is measured and drawn


def test_sharpness_and_psnr_are_the_references(pairs: FolderPairs) -> None:
    lq, gt = pairs.pairs()[0].read()
    batch = [torch.tensor(image.transpose(2, 0, 1))[None] for image in (lq, gt)]
    assert psnr_db(lq, gt) == pytest.approx(psnr(*batch, data_range=255).item(), abs=1e-9)
    assert psnr_db(gt, gt) == float("inf")
    gray = cv2.cvtColor(gt, cv2.COLOR_RGB2GRAY).astype(float)
    padded = np.pad(gray, 1, mode="reflect")
    kernel = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * gray
    assert sharpness(gt) == pytest.approx(kernel.var(), rel=1e-6)
    assert sharpness(np.full((8, 8, 3), 7, np.uint8)) == 0


def test_numbers_are_spread_over_what_is_whole() -> None:
    assert spread([range(0, 100)], 4) == [12, 37, 62, 87]
    assert spread([range(0, 2), range(8, 10)], 8) == [0, 1, 8, 9]
    assert spread([], 8) == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_grid_shows_the_pixels(tmp_path: Path, number: int) -> None:
    # A key that a formula would be made of, one of characters that the font lacks, a long one.
    keys = ["$a$_\\frac", "写真/一", "x" * 300]
    sharp = np.full((30, 40, 3), (200, 30, 90), np.uint8)
    pairs = [Pair(key=keys[k], scene="", lq=sharp // 2, gt=sharp) for k in range(number)]
    picture = read_rgb_u8(draw_pairs(tmp_path / "p.png", pairs, title="a $title$"))
    for color in ((200, 30, 90), (100, 15, 45)):
        # 40×30 is shown seven times as large in a box of 300×225.
        assert (picture == color).all(axis=2).sum() == number * 280 * 210


@pytest.mark.parametrize("case", ["one", "flat", "many sizes", "many scenes", "all equal"])
def test_histograms_of_odd_samples(tmp_path: Path, case: str) -> None:
    number = 1 if case == "one" else 40
    sample = Sample(
        num_pairs=number,
        sizes=[(64 + (n if case == "many sizes" else 0), 48) for n in range(number)],
        scenes=[
            f"${n}$ {'long name ' * 9}" if case == "many scenes" else f"s{n % 3}$x_" for n in range(number)
        ],
        sharpness_blurred=[0.0 if case == "flat" else 5.0 + n for n in range(number)],
        sharpness_sharp=[0.0 if case == "flat" else 50.0 + n for n in range(number)],
        psnr_db=[float("inf") if case == "all equal" else 20 + n / 9 for n in range(number)],
    )
    picture = read_rgb_u8(draw_histograms(tmp_path / "h.png", sample, title="$ a"))
    assert picture.shape == (540, 1800, 3) and picture.min() < 100


# The command


def test_the_command(nafnet: Run, own_store: Path, tmp_path: Path) -> None:  # noqa: F811
    code, out, _ = nafnet("inspect", own_store, "--samples", 9, "--json")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "store" and found["verification"]["ok"]
    assert all(Path(picture).is_file() for picture in found["pictures"])
    flip_byte(own_store / "shard-00000.parquet", 2000)
    code, out, errors = nafnet("inspect", own_store)
    assert code == 2 and "damaged: a damaged shard" in errors and "damage was found" in out
    code, out, errors = nafnet("inspect", own_store, "--no-verify")
    assert "verify" not in errors


def test_what_cannot_be_looked_at(nafnet: Run, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "photo.png").write_bytes(encode_png(blurred(piece(0))))
    (tmp_path / "empty").mkdir()
    for what, words in (
        ("nothing", "no such thing"),
        ("photo.png", "nothing that can be looked at"),
        ("empty", "no pairs found in this folder"),
        ("missing.safetensors", "no such model"),
    ):
        code, out, errors = nafnet("inspect", what)
        assert code == 2 and out == "" and words in errors and "Traceback" not in errors
