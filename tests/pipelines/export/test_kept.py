"""Exports that are kept: found by the network, checked when they are taken, chosen among by their times."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nafnet_core import CapabilityError, GateError, InputError, load_model, save_model
from nafnet_core.foreign import ForeignNetwork
from nafnet_core.tiling import TileOptions, restore_image, restore_images
from pipelines import export
from pipelines.export import choosing, formats, parity, timing
from pipelines.export.kept import NOTE, read_kept
from pipelines.models import LoadedModel, open_model
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import photo
from tests.pipelines.conftest import Run
from tests.pipelines.export.conftest import PATCH_PX
from tests.pipelines.pairs import write_pairs


@pytest.fixture
def loaded(weights: Path, workspace: Workspace) -> LoadedModel:
    return open_model(str(weights), workspace)


@pytest.fixture
def folder(workspace: Workspace) -> Path:
    """Where the one export is kept."""
    (note,) = workspace.exports.glob(f"*/*/{NOTE}")
    return note.parent


@pytest.fixture
def times(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Have forms take so many seconds, by the first word of their names; returns what was measured."""

    def set_to(**seconds: float) -> list[list[str]]:
        measured: list[list[str]] = []

        def measure(forms: dict[str, Any], *, num_threads: int) -> dict[str, float]:
            measured.append(sorted(name.partition("-")[0] for name in forms))
            return {name: seconds[name.partition("-")[0]] for name in forms}

        monkeypatch.setattr(choosing, "measure", measure)
        return measured

    return set_to


def _fails(*_: object, **__: object) -> Any:
    raise AssertionError("this takes seconds")


def test_a_kept_export_says_what_it_is(folder: Path, loaded: LoadedModel) -> None:
    kept = read_kept(folder)
    assert folder.name == f"onnxruntime-fp32-patch{PATCH_PX}"
    assert (kept.runtime, kept.precision, kept.train_patch_px) == ("onnxruntime", "fp32", PATCH_PX)
    assert sorted(file.name for file in folder.iterdir()) == [NOTE, "model.onnx"]
    opened = kept.open(loaded, num_threads=1)
    assert opened.label == "lively.safetensors, in onnxruntime, fp32"
    assert opened.weights_digest == loaded.digest != opened.digest
    image = photo(70, 90)
    ours, theirs = (
        restore_image(each.model, image, train_patch_px=PATCH_PX, tile_px=None) for each in (loaded, opened)
    )
    assert np.abs(ours.astype(int) - image).max() > 8 and np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_tile_that_it_breaks_is_done_again_in_torch(folder: Path, loaded: LoadedModel) -> None:
    opened = read_kept(folder).open(loaded, num_threads=1)
    foreign, image = opened.model, photo(64, 96)
    assert isinstance(foreign, ForeignNetwork)
    foreign._run = lambda lq: np.full_like(lq, 1e4)
    (result,) = restore_images(foreign, [image], TileOptions(train_patch_px=PATCH_PX, guard=True))
    assert (result.num_redone, result.num_kept) == (1, 0)
    assert np.array_equal(result.restored, restore_image(loaded.model, image, train_patch_px=None))
    foreign.in_torch = None
    (result,) = restore_images(foreign, [image], TileOptions(train_patch_px=PATCH_PX, guard=True))
    assert (result.num_redone, result.num_kept) == (0, 1) and np.array_equal(result.restored, image)


def test_it_is_found_by_the_network_and_its_statistics(
    weights: Path, workspace: Workspace, tmp_path: Path
) -> None:
    model, metadata = load_model(weights)
    save_model(model, tmp_path / "another.safetensors", metadata={**metadata, "name": "another"})
    copy = open_model(str(tmp_path / "another.safetensors"), workspace)
    chosen = export.choose(copy, workspace, backend="onnxruntime", precision="fp32")
    assert chosen.backend == "onnxruntime" and chosen.weights_digest == copy.digest
    other = open_model(str(weights), workspace, train_patch_px=64)
    with pytest.raises(InputError, match=r"no export for onnxruntime is kept.*--to onnx --keep") as raised:
        export.choose(other, workspace, backend="onnxruntime")
    assert raised.value.exit_code == 2
    with pytest.raises(InputError, match=r"expected bf16.*--to openvino --precision bf16 --keep"):
        export.choose(copy, workspace, backend="openvino", precision="bf16")


def test_without_a_kept_export_auto_is_torch_at_once(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "measure", _fails)
    monkeypatch.setattr(choosing, "network_digest", _fails)
    workspace = Workspace(tmp_path / "new")
    model = open_model(str(weights), workspace)
    assert export.choose(model, workspace, backend="auto") is model
    assert not workspace.root.exists()


def test_auto_takes_the_fastest_and_remembers_it(
    loaded: LoadedModel, workspace: Workspace, times: Callable[..., list[list[str]]]
) -> None:
    measured = times(torch=2.0, onnxruntime=1.0)
    for _ in range(2):
        assert export.choose(loaded, workspace, backend="auto").backend == "onnxruntime"
    assert measured == [["onnxruntime", "torch"]]
    # Other threads are another machine.
    times(torch=1.0, onnxruntime=2.0)
    assert export.choose(loaded, workspace, backend="auto", num_threads=7) is loaded
    assert export.choose(loaded, workspace, backend="auto").backend == "onnxruntime"
    # A damaged memory is no memory.
    (file,) = workspace.exports.glob(f"*/{timing.TIMES}")
    file.write_text("[]")
    assert export.choose(loaded, workspace, backend="auto") is loaded


def test_times_are_of_this_machine(loaded: LoadedModel, workspace: Workspace) -> None:
    chosen = export.choose(loaded, workspace, backend="auto", precision="fp32")
    (file,) = workspace.exports.glob(f"*/{timing.TIMES}")
    (entry,) = json.loads(file.read_text())["entries"]
    assert set(entry["machine"]["versions"]) == {"torch", "onnxruntime"} and entry["machine"]["threads"] == 1
    assert len(entry["seconds"]) == 2 and all(0 < each < 60 for each in entry["seconds"].values())
    fastest = min(entry["seconds"], key=entry["seconds"].__getitem__)
    assert chosen.backend == fastest.partition("-")[0]


def test_auto_with_a_gpu_is_torch(
    loaded: LoadedModel, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert export.choose(loaded, workspace, backend="auto") is loaded


def _truncate(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:5000])


def _without_note(folder: Path) -> None:
    (folder / NOTE).unlink()


def _note(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        note = json.loads((folder / NOTE).read_text())
        (folder / NOTE).write_text(json.dumps({**note, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "model.onnx has changed"),
        (lambda folder: (folder / "model.onnx").unlink(), "no model.onnx"),
        (_without_note, "no kept.json"),
        (lambda folder: (folder / NOTE).write_text("{"), "Expecting"),
        (_note(schema_version=2), "another version's"),
        (_note(network="0" * 64), "of another network"),
        (_note(difference=0.01), "did not pass the gate"),
        (_note(files={"../../model.onnx": "0"}), "files"),
        (_note(precision="fp64"), "another kind"),
        (_note(format="caffe"), "caffe"),
    ],
)
def test_what_is_damaged_is_passed_over_or_told(
    loaded: LoadedModel, workspace: Workspace, folder: Path, caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None], words: str,
) -> None:  # fmt: skip
    damage(folder)
    with caplog.at_level(logging.WARNING):
        assert export.choose(loaded, workspace, backend="auto") is loaded
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("passed over: a kept export that cannot be used") and words in line
    with pytest.raises(InputError, match="a kept export that cannot be used.*Export the model anew"):
        export.choose(loaded, workspace, backend="onnxruntime")


def test_a_runtime_that_is_missing(
    loaded: LoadedModel, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert export.choose(loaded, workspace, backend="auto") is loaded
    with pytest.raises(CapabilityError, match=r"--backend onnxruntime needs onnxruntime.*pip install"):
        export.choose(loaded, workspace, backend="onnxruntime")


@pytest.mark.usefixtures("quick_openvino")
def test_of_several_precisions_the_fastest(
    loaded: LoadedModel, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("fp32", "bf16"):
        config = export.ExportConfig(to="openvino", out=workspace.exports / "model.xml", precision=precision)  # type: ignore[arg-type]
        result = export.keep(config, loaded, workspace)
        assert [file.name for file in result.files] == ["model.xml", "model.bin"]
        assert all(file.is_file() for file in result.files)
    seconds = {"openvino-bf16": 1.0, "openvino-fp32": 2.0, "onnxruntime-fp32": 0.5, "torch-fp32": 3.0}

    def measure(forms: dict[str, Any], *, num_threads: int) -> dict[str, float]:
        return {name: seconds[name.partition("-patch")[0]] for name in forms}

    monkeypatch.setattr(choosing, "measure", measure)

    def chosen(backend: str, precision: str) -> tuple[str, str | None]:
        found = export.choose(loaded, workspace, backend=backend, precision=precision)
        return found.backend, found.fixed_precision

    assert chosen("openvino", "auto") == ("openvino", "bf16")
    assert chosen("openvino", "fp32") == ("openvino", "fp32")
    assert chosen("auto", "fp32") == ("onnxruntime", "fp32")
    seconds["onnxruntime-fp32"] = 5.0
    next(workspace.exports.glob(f"*/{timing.TIMES}")).unlink()
    assert chosen("auto", "fp32") == ("openvino", "fp32")


@pytest.mark.usefixtures("quick_openvino")
def test_what_does_not_pass_the_gate_is_not_kept(
    loaded: LoadedModel, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = replace(parity.TOLERANCES["fp32"], difference=0.0)
    monkeypatch.setitem(parity.TOLERANCES, "fp32", strict)
    before = sorted(workspace.exports.rglob("*"))
    config = export.ExportConfig(to="openvino", out=workspace.exports / "model.xml")
    with pytest.raises(GateError, match="something else than torch"):
        export.keep(config, loaded, workspace)
    assert sorted(workspace.exports.rglob("*")) == before


# The commands


def test_export_keep(
    run: Run, weights: Path, workspace: Workspace, quick_openvino: None, tmp_path: Path
) -> None:
    code, out, errors = run("export", weights, "--to", "openvino", "--keep")
    assert code == 0, errors
    assert "With --backend auto" in out
    assert len(list(workspace.exports.glob("*/openvino-fp32-*/model.bin"))) == 1
    for options, words in (
        (("--to", "onnx", "--out", "x.onnx"), "lies in the workspace"),
        (("--to", "onnx", "--bytes"), "lies in the workspace"),
        (("--to", "torch"), "no command runs this format"),
        (("--to", "caffe"), "unknown format"),
    ):
        code, _, errors = run("export", weights, "--keep", *options)
        assert code == 2 and words in errors and errors.count("\n") == 1, errors


def test_restore_in_each_back_end(
    run: Run, weights: Path, workspace: Workspace, onnx_file: Path, tmp_path: Path,
    times: Callable[..., list[list[str]]],
) -> None:  # fmt: skip
    times(torch=2.0, onnxruntime=1.0)
    Image.fromarray(photo(96, 120)).save(tmp_path / "photo.png")
    command = ("restore", tmp_path / "photo.png", "--model", weights)
    pixels, backends = {}, {}
    for backend in ("auto", "torch", "onnxruntime"):
        code, told, errors = run(
            *command, "--backend", backend, "--precision", "fp32", "--out", backend, "--json"
        )
        assert code == 0, errors
        pixels[backend] = np.asarray(Image.open(tmp_path / backend / "photo.png")).astype(int)
        backends[backend] = json.loads(told)["backend"]
    assert backends == {"auto": "onnxruntime", "torch": "torch", "onnxruntime": "onnxruntime"}
    assert np.array_equal(pixels["auto"], pixels["onnxruntime"])
    assert np.abs(pixels["auto"] - pixels["torch"]).max() <= 1
    _, out, _ = run(*command, "--out", "again")
    assert "1 restored" in out and "by onnxruntime" in out
    for options, words in (
        (("--backend", "openvino"), "no export for openvino is kept"),
        (("--backend", "caffe"), "expected auto, torch, onnxruntime, openvino"),
        (("--backend", "onnxruntime", "--workers", 1), "runs in this process alone"),
        (("--backend", "onnxruntime", "--train-patch", 64), "no export for onnxruntime is kept"),
        (("--backend", "onnxruntime", "--precision", "bf16"), "--to onnx --precision bf16 --keep"),
        (("--model", onnx_file, "--backend", "torch"), "a back end of its own"),
        (("--model", onnx_file, "--precision", "bf16"), "the precision of an exported model is fixed"),
    ):
        code, _, errors = run(*command, *options)
        assert code == 2 and words in errors and errors.count("\n") == 1, errors


def test_evaluate_is_pinned(run: Run, weights: Path, workspace: Workspace, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", ["a", "b"])
    protocols, scores = {}, {}
    for backend in (None, "onnxruntime"):
        option = () if backend is None else ("--backend", backend)
        code, told, errors = run("evaluate", weights, tmp_path / "pairs", "--json", *option)
        assert code == 0, errors
        report = json.loads(told)
        protocols[backend], scores[backend] = report["protocol"], report["psnr_restored_db"]
    assert protocols[None]["backend"] == "torch"
    assert protocols["onnxruntime"] == {**protocols[None], "backend": "onnxruntime"}
    assert scores[None] == pytest.approx(scores["onnxruntime"], abs=5e-3)
    assert len(list(workspace.reports.iterdir())) == 2
    for options, words in (
        (("--precision", "bf16"), "scores in torch are of fp32"),
        (("--backend", "onnxruntime", "--precision", "fp16"), "--precision fp16 --keep"),
    ):
        code, _, errors = run("evaluate", weights, tmp_path / "pairs", *options)
        assert code == 2 and words in errors
    shutil.rmtree(workspace.exports)
    code, _, errors = run("evaluate", weights, tmp_path / "pairs", "--backend", "onnxruntime")
    assert code == 2 and "no export for onnxruntime is kept" in errors
