"""`nafnet compress report`: one table of models, their scores, times and memory."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nafnet_core import CapabilityError, InputError, NAFNetConfig, load_model, save_model
from nafnet_core.tiling import restore_image
from pipelines import compress, evaluate, turns
from pipelines.compress import measuring, report
from pipelines.compress.contenders import find_contenders
from pipelines.export import formats
from pipelines.models import BUNDLED, open_model
from pipelines.scoring.pairs import Pairs
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import lively_network, photo
from tests.pipelines.conftest import Run
from tests.pipelines.pairs import make_store, write_pairs

_SHAPE = NAFNetConfig(width=8, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,))
_PATCH_PX = 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pairs")
    return str(make_store(write_pairs(root / "pairs", ["a/1", "b/1"]), root / "store", crop_px=None).root)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two networks, of which the second has lost channels."""
    folder = tmp_path_factory.mktemp("models")
    narrow = replace(_SHAPE, dw_channels=(4, 8, 4), ffn_channels=(4, 8, 4))
    for name, config in (("whole", _SHAPE), ("narrow", narrow)):
        metadata = {"train_patch_px": _PATCH_PX, "name": name}
        save_model(lively_network(config), folder / f"{name}.safetensors", metadata=metadata)
    return folder / "whole.safetensors", folder / "narrow.safetensors"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images, and memory without processes."""
    monkeypatch.setattr(measuring, "SIZES_PX", ((16, 24), (32, 40)))
    monkeypatch.setattr(report, "SIZES_PX", ((16, 24), (32, 40)))
    monkeypatch.setattr(report, "peak_memory_mib", lambda contender: 12.0)


def _found(*specs: Path | str, **options: Any) -> list[compress.Contender]:
    return find_contenders([str(spec) for spec in specs], Workspace(Path("nowhere")), **options)


def test_weights_come_in_each_precision(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["whole.safetensors", "narrow.safetensors"]
    for has_bf16, precisions in ((True, ["fp32", "bf16"]), (False, ["fp32"])):
        monkeypatch.setattr(compress.contenders, "computes_in_bf16", lambda device, has=has_bf16: has)
        told = [(each.name, each.precision) for each in _found(*models)]
        assert told == [(name, precision) for name in names for precision in precisions]
    (asked,) = _found(models[0], precisions=("bf16",))
    assert (asked.precision, asked.backend) == ("bf16", "torch")
    network = asked.opener(1)
    assert {each.dtype for each in network.parameters()} == {torch.bfloat16, torch.float32}


def test_a_contender_says_what_it_is(models: tuple[Path, Path]) -> None:
    whole, narrow = _found(*models, precisions=("fp32",))
    for each, path in zip((whole, narrow), models, strict=True):
        network, _ = load_model(path)
        assert each.num_parameters == network.num_parameters
        assert each.file_mib == path.stat().st_size / 2**20
        assert each.preset is None and each.train_patch_px == _PATCH_PX
        assert each.config == network.config
    assert whole.macs_share == 1 and 0.4 < narrow.macs_share < 0.8
    (bundled,) = _found("mobile-v1", precisions=("fp32",))
    assert (bundled.name, bundled.preset, bundled.files) == ("mobile-v1", "compact", (BUNDLED,))
    (global_,) = _found(models[0], precisions=("fp32",), train_patch_px=0)
    assert global_.train_patch_px is None


def test_files_of_one_name_are_told_apart(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / models[0].name
    other.write_bytes(models[0].read_bytes())
    assert [each.name for each in _found(models[0], other, precisions=("fp32",))] == [
        str(models[0]),
        str(other),
    ]


def test_what_cannot_be_compared_is_refused(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"named twice.*whole\.safetensors"):
        _found(models[0], models[1], models[0])
    with pytest.raises(InputError, match="expected fp32, bf16, got int4"):
        _found(models[0], precisions=("int4",))
    with pytest.raises(InputError, match="no such model"):
        _found(tmp_path / "none.safetensors")
    gray = tmp_path / "gray.safetensors"
    save_model(lively_network(replace(_SHAPE, img_channel=1)), gray, metadata={})
    with pytest.raises(InputError, match="does not restore RGB"):
        _found(gray)
    exported = tmp_path / "model.onnx"
    exported.write_bytes(b"graph")
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"model\.onnx.*needs onnxruntime.*nafnet-ray\[export\]"):
        _found(models[0], exported)


@pytest.mark.usefixtures("quick")
def test_scores_are_those_of_evaluate(models: tuple[Path, Path], store: str, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    contenders = _found(*models, precisions=("fp32", "bf16"))
    table = compress.measure(contenders, Pairs(store), runs=2, on_step=lambda *step: steps.append(step))
    # 4 models: 2 images each, memory once, and 3 rounds at 2 sizes.
    assert [done for done, _, _ in steps] == list(range(4 * (2 + 1 + 2 * 3) + 1))
    assert {total for _, total, _ in steps} == {36}
    workspace = Workspace(tmp_path / "workspace").make()
    for row, path in ((table.rows[0], models[0]), (table.rows[2], models[1])):
        scored = evaluate.run(open_model(str(path), workspace), Pairs(store), workspace).report
        assert (row.psnr_db, row.ssim) == (scored.psnr_restored_db, scored.ssim_restored)
        assert (table.psnr_blurred_db, table.ssim_blurred) == (scored.psnr_blurred_db, scored.ssim_blurred)
    fp32, bf16, narrow, _ = table.rows
    assert fp32.loss_db == 0 and narrow.loss_db == fp32.psnr_db - narrow.psnr_db
    assert bf16.psnr_db != fp32.psnr_db and abs(bf16.loss_db or 0) < 0.2
    assert fp32.speedup_256 == fp32.speedup_720p == 1
    assert all(row.latency_256_ms > 0 and row.latency_720p_ms > 0 for row in table.rows)
    assert all(row.peak_memory_mib == 12 for row in table.rows)
    assert fp32.gmacs == _SHAPE.num_macs(720, 1280) / 1e9


@pytest.mark.usefixtures("quick")
def test_without_pairs_there_are_sizes_and_times(models: tuple[Path, Path], tmp_path: Path) -> None:
    table = compress.measure(_found(*models, precisions=("fp32",)), None, runs=1)
    assert [(row.psnr_db, row.loss_db, row.ssim) for row in table.rows] == [(None, None, None)] * 2
    assert table.gain_db is None and table.warning() is None
    (tmp_path / "report.png").write_bytes(b"of an earlier one")
    (tmp_path / "report.csv").touch()
    files = compress.write(tmp_path, [table])
    assert [file.name for file in files] == ["report.md", "report.csv"]
    assert not (tmp_path / "report.png").exists() and "report.png" not in files[0].read_text()
    assert "| – | – | – |" in files[0].read_text()


def test_what_is_timed_is_what_restores(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The image goes whole through the contender's own network, with its local statistics."""
    image = photo(48, 72)
    seen = []
    monkeypatch.setattr(measuring, "_image", lambda size: image)
    monkeypatch.setattr(
        measuring, "restore_image", lambda *args, **options: seen.append(restore_image(*args, **options))
    )
    measuring.latencies(_found(*models, precisions=("fp32",)), (48, 72), runs=1)
    expected = [
        restore_image(load_model(path)[0], image, train_patch_px=_PATCH_PX, tile_px=None) for path in models
    ]
    assert len(seen) == 4 and not np.array_equal(expected[0], expected[1])
    for got, wanted in zip(seen, expected * 2, strict=True):
        assert np.array_equal(got, wanted)


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    now = 0.0

    def call(name: str, seconds: float) -> None:
        nonlocal now
        calls.append(name)
        now += seconds * len(calls)  # the machine becomes slower all the time

    monkeypatch.setattr(turns, "perf_counter", lambda: now)
    seconds = turns.times_in_turns([lambda: call("a", 1.0), lambda: call("b", 2.0)], runs=3)
    assert calls == ["a", "b"] * 4
    assert seconds == [[3.0, 5.0, 7.0], [8.0, 12.0, 16.0]]  # the first round is not among them
    # Ratios are taken within rounds: 3/8, 5/12, 7/16.
    assert measuring.speedups(seconds) == [1.0, 5 / 12]


def test_memory_is_that_of_a_fresh_process(models: tuple[Path, Path]) -> None:
    (tiny,) = _found(models[0], precisions=("fp32",))
    ballast = np.ones(2**27, np.uint8)  # 128 MiB of this process, which must not count
    mib = compress.report.peak_memory_mib(tiny)
    # At least two maps of eight channels in fp32, 28 MiB each; strips keep all else small.
    assert 50 < mib < 400
    del ballast


def test_a_killed_process_is_one_line(models: tuple[Path, Path]) -> None:
    (tiny,) = _found(models[0], precisions=("fp32",))
    with pytest.raises(CapabilityError, match=r"killed.*whole\.safetensors, torch fp32"):
        measuring.peak_memory_mib(replace(tiny, opener=_die))


def _die(num_threads: int) -> Any:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_the_command(
    models: tuple[Path, Path], store: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Real processes and the command as it is; only images are small.
    for module in (measuring, report):
        monkeypatch.setattr(module, "SIZES_PX", ((16, 24), (32, 40)))
    out = tmp_path / "out"
    words = ("compress", "report", *models, "--on", store, "--out", out, "--runs", 1, "--precision", "fp32")
    code, shown, told = run(*words)
    assert code == 0, told
    assert "Reference: whole.safetensors, torch fp32. Times: 1 round on 1 thread." in shown
    assert "2 images" in shown and "narrow" in shown and "Losses in dB say little here" in shown
    assert sorted(file.name for file in out.iterdir()) == ["report.csv", "report.md", "report.png"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.md").read_text()
    assert "Losses in dB say little here" in page and "![PSNR against latency" in page
    first, second = csv.DictReader(io.StringIO((out / "report.csv").read_text()))
    assert (first["model"], second["model"]) == ("whole.safetensors", "narrow.safetensors")
    assert float(second["macs_share"]) < 1 == float(first["macs_share"])

    code, told_json, told = run(*words, "--json")
    assert code == 0, told
    content = json.loads(told_json)
    assert [row["model"] for row in content["rows"]] == [first["model"], second["model"]]
    assert content["rows"][1]["psnr_db"] == float(second["psnr_db"]) and content["warning"]
    assert content["files"][0] == str(out / "report.md")

    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "report.md").write_text("# of an evaluation\n")
    code, _, told = run(*words[:-6], "--out", evaluation)
    assert code == 2 and "this report is of something else" in told
    code, _, told = run("compress", "report", models[0], "--on", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in told


@pytest.mark.slow
def test_exported_files_stand_beside_their_weights(
    models: tuple[Path, Path], store: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "openvino"):
        code, _, told = run("export", models[0], "--to", name, "--on", store)
        assert code == 0, told
    for module in (measuring, report):
        monkeypatch.setattr(module, "SIZES_PX", ((16, 24), (32, 40)))
    words = (
        "whole.onnx",
        "whole.xml",
        "--on",
        store,
        "--runs",
        1,
        "--precision",
        "fp32",
        "--train-patch",
        32,
    )
    code, told, error = run("compress", "report", models[0], *words, "--json")
    assert code == 0, error
    rows = json.loads(told)["rows"]
    assert [(row["model"], row["backend"]) for row in rows] == [
        ("whole.safetensors", "torch"),
        ("whole.onnx", "onnxruntime"),
        ("whole.xml", "openvino"),
    ]
    beside = (tmp_path / "whole.xml").stat().st_size + (tmp_path / "whole.bin").stat().st_size
    assert rows[2]["file_mib"] == beside / 2**20
    assert len({row["parameters"] for row in rows}) == len({row["gmacs"] for row in rows}) == 1
    assert all(abs(row["loss_db"]) < 0.005 and row["peak_memory_mib"] > 0 for row in rows)
