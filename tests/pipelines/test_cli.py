"""What a person does wrong: one line each, naming what and where, and the right exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

from nafnet_core import NAFNet, NAFNetConfig, randomize_residual_scales, save_model, save_official
from tests.nafnet_core.networks import SMALL, lively_network
from tests.pipelines.conftest import Run

_TINY = NAFNetConfig(width=4, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two pairs in blur/ and sharp/."""
    for side in ("blur", "sharp"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for number, top in enumerate((0, 64)):
            crop = Image.fromarray(data.astronaut()[top : top + 64, :80])
            crop.save(tmp_path / "pairs" / side / f"{number}.png")
    return tmp_path / "pairs"


@pytest.mark.parametrize(("remainder", "crops"), [(None, 12), (15, 12), (16, 8)])
def test_prepare_leaves_out_what_remains(
    run: Run, pairs: Path, tmp_path: Path, remainder: int | None, crops: int
) -> None:
    # Two pairs of 80×64: 16 px remain beyond the second crop of a row.
    options = [] if remainder is None else ["--min-remainder", remainder]
    arguments = ["prepare", pairs, "--out", tmp_path / "store", "--crop", 32, "--stride", 32, "--json"]
    code, out, _ = run(*arguments, *options)
    assert code == 0 and json.loads(out)["num_pairs"] == crops


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = NAFNet(_TINY)
    randomize_residual_scales(model, seed=0)
    save_model(model, tmp_path / "tiny.safetensors", metadata={"train_patch_px": 32})
    return tmp_path / "tiny.safetensors"


def _refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    got, out, errors = result
    assert got == code, errors
    lines = [line for line in errors.splitlines() if line.startswith("nafnet: ")]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    for word in words:
        assert word in lines[0]
    assert out == ""


@pytest.mark.parametrize("command", ["demo", "synth", "prepare", "train", "evaluate", "restore"])
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and f"nafnet {command}" in out and "Example" in out


def test_a_missing_folder(run: Run) -> None:
    _refused(run("prepare", "nowhere", "--out", "store"), 2, "no such folder", "nowhere")
    _refused(run("synth", "nowhere", "--out", "pairs"), 2, "no such folder", "nowhere")
    _refused(run("restore", "nowhere"), 2, "nowhere")


def test_a_folder_with_no_pairs(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _refused(run("prepare", "empty", "--out", "store"), 2, "no pairs", "blur and sharp")
    _refused(run("synth", "empty", "--out", "pairs"), 2, "no photos")


def test_an_unpaired_image_is_named(run: Run, pairs: Path) -> None:
    (pairs / "blur" / "1.png").unlink()
    _refused(run("prepare", pairs, "--out", "store"), 2, "without a partner", "sharp/1.png")


def test_different_sizes_and_truncated_files_are_quarantined(run: Run, pairs: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(pairs / "blur" / "1.png")
    code, out, _ = run("prepare", pairs, "--out", "store", "--crop", 32)
    assert code == 0 and "1 refused" in out and "80×64" in out and "64×64" in out
    file = pairs / "blur" / "0.png"
    file.write_bytes(file.read_bytes()[:900])
    _refused(run("prepare", pairs, "--out", "again", "--crop", 32), 2, "no usable pair", "truncated")
    _refused(run("prepare", pairs, "--out", "strict", "--crop", 32, "--strict"), 2, "0.png", "truncated")
    assert not (tmp_path / "again" / "manifest.json").exists()


def test_an_unknown_key_names_the_nearest(run: Run) -> None:
    _refused(run("train", "--config", "mobile", "--set", "optim.learning_rte=1"), 2, "optim.learning_rte")
    _refused(run("train", "--config", "mobile", "--set", "shedule.kind=step"), 2, "'schedule'")


def test_an_unknown_recipe_option_and_command(run: Run) -> None:
    _refused(run("train", "--config", "huge"), 2, "no such recipe", "mobile")
    _refused(run("synth", "x", "--varants", 2), 2, "--varants")
    _refused(run("trian"), 2, "trian")


def test_a_checkpoint_that_is_no_nafnet(run: Run, pairs: Path, tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    _refused(
        run("restore", pairs / "blur", "--model", "other.pth"), 2, "not a NAFNet checkpoint", "layer.weight"
    )
    (tmp_path / "text.pth").write_text("hello")
    _refused(run("evaluate", "text.pth", pairs / "blur", pairs / "sharp"), 2, "damaged")


def test_without_a_champion_the_bundled_model_is_taken_and_named(run: Run, pairs: Path) -> None:
    code, out, errors = run("restore", pairs / "blur")
    assert code == 0 and "Model: mobile-v1, which comes with this package" in errors, errors
    code, out, errors = run("evaluate", pairs / "blur", pairs / "sharp")
    assert code == 0 and "Model: mobile-v1, which comes with this package" in errors, errors
    assert "registry register" not in out, "advice is for models of one's own"
    code, again, errors = run("evaluate", "mobile-v1", pairs / "blur", pairs / "sharp")
    assert code == 0 and "dB" in again, errors


def test_the_demo_without_training_takes_no_training_options(run: Run) -> None:
    _refused(run("demo", "--pretrained", "--minutes", 1), 2, "--pretrained trains nothing")


def test_an_output_folder_that_cannot_be_written(run: Run, pairs: Path, weights: Path) -> None:
    # Root writes anywhere but here.
    _refused(run("restore", pairs / "blur", "--model", weights, "--out", "/proc/nafnet"), 2, "cannot write")
    _refused(run("synth", pairs / "sharp", "--out", "/proc/nafnet"), 2, "cannot write")
    _refused(run("prepare", pairs, "--out", "/proc/nafnet"), 2, "cannot write")


def test_impossible_training_is_refused_before_any_time_is_spent(run: Run, pairs: Path) -> None:
    assert run("prepare", pairs, "--out", "store", "--crop", 64)[0] == 0
    train = ("train", "--config", "mobile", "--data", "store")
    _refused(run("train", "--config", "mobile"), 2, "no training data")
    _refused(run("train", "--config", "mobile", "--data", "nowhere"), 2, "no such store")
    _refused(run(*train, "--set", "stages.0.patch_px=128"), 2, "patches are larger", "64 px", "128 px")
    _refused(run(*train, "--set", "stages=[{patch_px: 60}]"), 2, "multiple of 8")
    _refused(run(*train, "--set", "stages=[{patch_px: 64, batch: 1}]"), 2, "batch of 1", "2 workers")
    _refused(run(*train, "--set", "budget.samples=0"), 2, "budget.samples")
    _refused(run(*train, "--set", "optim.lr=0"), 2, "optim.lr")


def test_a_dry_run_needs_no_data_and_makes_no_workspace(run: Run, weights: Path, tmp_path: Path) -> None:
    tiny = ("train", "--config", "guide_l1", "--dry-run", "--set", "stages=[{patch_px: 32, batch: 16}]")
    network = "model={width: 4, enc_blk_nums: [1], middle_blk_num: 1, dec_blk_nums: [1]}"
    code, out, errors = run(*tiny, "--set", network, "--init", weights)
    assert code == 0 and "1 × 4 × 4" in out and "61 of 61 tensors from tiny.safetensors" in out, errors
    assert "3000 epochs" in out and "No data were given" in out and "written and read back" in out
    if not torch.cuda.is_available():
        assert "There is no GPU here: the run asks for 1." in out
    code, out, errors = run(*tiny, "--set", network, "--json")
    told = json.loads(out)
    assert code == 0 and told["stages"][0]["accumulation"] == 4 and len(told["rates"]) == 5
    assert told["recipe"]["loss"] == {"l1": 1.0}
    assert not (tmp_path / "workspace").exists()
    _refused(run(*tiny, "--init", weights), 2, "nothing of this model fits the network")
    _refused(run(*tiny, "--data", "nowhere"), 2, "no such store")
    _refused(run("train", "--config", tmp_path, "--dry-run"), 2, "no such recipe")


def test_options_that_exclude_each_other_and_splits_that_do_not_exist(run: Run, pairs: Path) -> None:
    both = run("prepare", pairs, "--lq", pairs / "blur", "--gt", pairs / "sharp", "--out", "store")
    _refused(both, 2, "exclude each other")
    _refused(run("prepare", "--lq", pairs / "blur", "--out", "store"), 2, "both --lq and --gt")
    _refused(run("prepare", pairs, "--sharp", "--out", "store"), 2, "blurred images", "pairs (folders)")
    for other in (("--blur", "J"), ("--lq-name", "{}_b"), ("--gt", pairs / "sharp")):
        _refused(run("prepare", pairs / "sharp", "--sharp", *other, "--out", "store"), 2, "nothing blurred")
    _refused(run("prepare", "--sharp", "--out", "store"), 2, "Give SOURCE")
    _refused(run("prepare", pairs, "--split", "tset", "--out", "store"), 2, "unknown --split", "tset")


def test_a_missing_part_of_gopro_is_named(run: Run, pairs: Path) -> None:
    sequence = pairs.parent / "GOPRO_Large" / "train" / "GOPR0000_00_00"
    sequence.parent.mkdir(parents=True)
    pairs.rename(sequence)
    root = sequence.parent.parent
    _refused(run("prepare", root, "--split", "test", "--out", "s"), 2, "--split test", "sequences in train")
    assert run("prepare", root, "--crop", 64, "--out", "s")[0] == 0


def test_a_folder_of_pairs_is_evaluated_and_a_half_of_one_is_explained(
    run: Run, pairs: Path, weights: Path
) -> None:
    code, out, errors = run("evaluate", weights, pairs)
    assert code == 0 and "2 images" in out, errors
    _refused(run("evaluate", weights, pairs / "blur"), 2, "evaluate MODEL BLURRED SHARP")


def test_local_statistics_of_an_official_file(run: Run, pairs: Path, tmp_path: Path) -> None:
    save_official(lively_network(SMALL), tmp_path / "official.pth")
    restore = ("restore", pairs / "blur", "--model", "official.pth", "--precision", "fp32")
    code, _, errors = run(*restore, "--out", "out")
    assert code == 0 and "--train-patch" in errors
    plain = (tmp_path / "out" / "0.png").read_bytes()
    # Another window is another result: nothing is skipped, and a second time everything.
    _, out, errors = run(*restore, "--out", "out", "--train-patch", 16)
    assert "2 restored" in out and "--train-patch" not in errors
    assert (tmp_path / "out" / "0.png").read_bytes() != plain
    assert "2 skipped" in run(*restore, "--out", "out", "--train-patch", 16)[1]

    scores = set()
    for patch, told in ((16, "on, patch 16 px"), (0, "off")):
        code, out, errors = run("evaluate", "official.pth", pairs, "--train-patch", patch)
        assert code == 0 and f"Local statistics: {told}" in out, errors
        scores.add(
            json.loads(run("evaluate", "official.pth", pairs, "--train-patch", patch, "--json")[1])[
                "psnr_restored_db"
            ]
        )
    assert len(scores) == 2
    reports = sorted(
        path.parent.name.rpartition("-")[2]
        for path in (tmp_path / "workspace" / "reports").glob("*/report.json")
    )
    assert reports == ["global", "patch16"]


def test_next_step_of_a_store_to_evaluate_on_is_not_training(run: Run, pairs: Path) -> None:
    code, out, _ = run("prepare", pairs, "--out", "test", "--crop", 0, "--split", "test")
    assert code == 0 and "nafnet evaluate" in out and "nafnet train" not in out


def test_synth_into_the_folder_of_the_photos(run: Run, pairs: Path) -> None:
    _refused(run("synth", pairs / "sharp", "--out", pairs), 2, "lie in the output folder", "another --out")


def test_faults_in_plain_words(run: Run) -> None:
    train = ("train", "--config", "mobile")
    _refused(run(*train, "--set", "optim.lr=fast"), 2, "--set optim.lr=fast", "expected a number")
    _refused(run(*train, "--name", "bad name"), 2, "--name bad name", "letters, digits")
    _refused(run(*train, "--set", "scaling.num_workers=64"), 2, "a batch of 8 cannot be shared by 64 workers")


def test_no_command_shows_the_help(run: Run) -> None:
    code, out, errors = run()
    assert code == 2 and "restore" in out + errors and "nafnet: " not in errors


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("nafnet-ray")


def test_one_bad_photo_does_not_stop_the_others(run: Run, pairs: Path, weights: Path) -> None:
    (pairs / "blur" / "bad.jpg").write_text("not a picture")
    code, out, errors = run("restore", pairs / "blur", "--model", weights, "--out", "out")
    assert code == 2 and "2 restored, 0 skipped, 1 failed" in out
    assert "bad.jpg" in errors
