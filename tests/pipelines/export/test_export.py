"""`nafnet export`: what is written runs in its runtime as in torch, and what does not is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nafnet_core import CapabilityError, GateError, InputError, load_model, save_model
from nafnet_core.exportable import Exportable
from nafnet_core.local_stats import local_statistics
from nafnet_core.quantization import calibrate, quantize
from nafnet_core.tiling import restore_image
from pipelines import console, export, inspect
from pipelines.export import formats, onnx_format
from pipelines.export.parity import SIZES_PX, compare, crops
from pipelines.models import EXPORTED_SUFFIXES, open_model
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import lively_network, photo, photo_nchw
from tests.pipelines.conftest import Run
from tests.pipelines.export.conftest import PATCH_PX, SHAPE, export_weights
from tests.pipelines.pairs import write_pairs


@pytest.mark.parametrize("size", [(8, 300), (129, 75), (3, 3)])
def test_an_onnx_file_restores_what_its_weights_restore(
    weights: Path, onnx_file: Path, size: tuple[int, int]
) -> None:
    model, _ = load_model(weights)
    opened = export.open_exported(onnx_file)
    image = photo(*size)
    ours, theirs = (
        restore_image(network, image, train_patch_px=PATCH_PX, tile_px=None)
        for network in (model, opened.model)
    )
    assert np.abs(ours.astype(int) - image).max() > 8
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (ours != theirs).mean() < 1e-3


def test_tiles_and_batches_go_through_a_runtime_too(weights: Path, onnx_file: Path) -> None:
    model, _ = load_model(weights)
    image = photo(300, 420)
    ours, theirs = (
        restore_image(network, image, train_patch_px=PATCH_PX, tile_px=192, tile_batch=2)
        for network in (model, export.open_exported(onnx_file).model)
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_the_file_says_what_it_is(weights: Path, onnx_file: Path) -> None:
    import onnx

    opened = export.open_exported(onnx_file)
    made = opened.metadata["export"]
    assert opened.train_patch_px == PATCH_PX and opened.metadata["name"] == "lively"
    assert made["weights_sha256"] == open_model(str(weights), Workspace(onnx_file.parent)).digest
    assert made["parity"]["difference"] < 1e-5 and made["parity"]["num_crops"] == 3 * len(SIZES_PX) + 1
    graph = onnx.load(onnx_file).graph
    names = [node.op_type for node in graph.node]
    # Two norms a block, of an operator of their own; and nothing that pools with a fixed window.
    assert names.count("LayerNormalization") == 2 * SHAPE.num_blocks
    assert not {"AveragePool", "If", "Loop"} & set(names)
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (graph.input[0], graph.output[0])
    ]
    assert shapes == [["batch", 3, "height", "width"]] * 2


@pytest.mark.slow
def test_bytes_in_and_bytes_out(weights: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "bytes.onnx"
    export_weights(weights, out, to="onnx", takes_bytes=True)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    model, _ = load_model(weights)
    for size in ((50, 70), (7, 9)):
        image = photo(*size)
        (restored,) = session.run(None, {"lq": np.stack([image, image[::-1]])})
        expected = restore_image(model, image, train_patch_px=PATCH_PX, tile_px=None)
        assert restored.dtype == np.uint8
        assert np.abs(restored[0].astype(int) - expected).max() <= 1
    with pytest.raises(InputError, match="images in bytes"):
        export.open_exported(out)


@pytest.mark.slow
def test_half_precision_keeps_its_norms(weights: Path, tmp_path: Path) -> None:
    import onnx

    result = export_weights(weights, tmp_path / "half.onnx", to="onnx", precision="fp16")
    assert 1e-6 < result.parity.difference < 2e-3  # 0.04 where means go through fp16
    kept = {value.name: value.data_type for value in onnx.load(result.files[0]).graph.initializer}
    in_half = [name for name, kind in kept.items() if kind == onnx.TensorProto.FLOAT16]
    assert "intro.weight" in in_half and not any(".norm" in name for name in in_half)


@pytest.mark.slow
def test_values_that_half_precision_cannot_hold_are_found(weights: Path, tmp_path: Path) -> None:
    model, metadata = load_model(weights)
    with torch.no_grad():
        # The same network in fp32, but what the gate multiplies is a million times larger.
        block = model.blocks[0]
        block.conv4.weight.mul_(1e5)
        block.conv4.bias.mul_(1e5)
        block.conv5.weight.mul_(1e-10)
    save_model(model, tmp_path / "large.safetensors", metadata=metadata)
    out = tmp_path / "large.onnx"
    with pytest.raises(GateError, match=r"nothing was written.*large\.onnx.*got"):
        export_weights(tmp_path / "large.safetensors", out, to="onnx", precision="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.safetensors"]
    export_weights(tmp_path / "large.safetensors", out, to="onnx")


def test_another_network_does_not_pass_the_gate(onnx_file: Path) -> None:
    runner = onnx_format.open(onnx_file, "fp32", num_threads=1)
    pairs = [(photo(300, 400), photo(300, 400)[::-1])]
    settings = {"train_patch_px": PATCH_PX, "takes_bytes": False, "data": "a photo"}
    compare(lively_network(SHAPE), runner, pairs, **settings).check("fp32", takes_bytes=False, file="x")  # type: ignore[arg-type]
    for other in (
        compare(lively_network(SHAPE, seed=1), runner, pairs, **settings),  # type: ignore[arg-type]
        compare(lively_network(SHAPE), runner, pairs, **{**settings, "train_patch_px": None}),  # type: ignore[arg-type]
    ):
        with pytest.raises(GateError, match="computes something else than torch") as raised:
            other.check("fp32", takes_bytes=False, file="x")
        assert raised.value.exit_code == 3


def test_openvino_in_bf16(weights: Path, tmp_path: Path) -> None:
    result = export_weights(weights, tmp_path / "lively.xml", to="openvino", precision="bf16")
    assert [file.name for file in result.files] == ["lively.xml", "lively.bin"]
    opened = export.open_exported(tmp_path / "lively.xml")
    assert opened.metadata["export"]["precision"] == "bf16" and "openvino, bf16" in opened.label
    model, _ = load_model(weights)
    image = photo(64, 1800)
    ours, theirs = (
        restore_image(network, image, train_patch_px=PATCH_PX, tile_px=None)
        for network in (model, opened.model)
    )
    # Sums over the map would be lost in bf16 from some hundred pixels on.
    for part in (slice(0, 300), slice(1500, 1800)):
        assert np.abs(ours[:, part].astype(int) - theirs[:, part]).mean() < 1
    assert (
        inspect.run(
            inspect.InspectConfig(what=str(tmp_path / "lively.xml"), workspace=Workspace(tmp_path)),
            show=console.progress,
        ).facts["precision"]
        == "bf16"
    )


@pytest.mark.slow
def test_a_program_of_torch(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "lively.pt2"
    export_weights(weights, out, to="torch")
    extra = {"nafnet.json": ""}
    program = torch.export.load(out, extra_files=extra)
    assert json.loads(extra["nafnet.json"])["export"]["format"] == "torch"
    lq = torch.rand(2, 3, 50, 33)
    form = Exportable(load_model(weights)[0], train_patch_px=PATCH_PX)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(lq), form(lq), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="not an exported model"):
        export.open_exported(out)  # a stranger's would be unpickled


# The commands


def test_the_command_and_restore(run: Run, weights: Path, tmp_path: Path, onnx_file: Path) -> None:
    Image.fromarray(photo(96, 120)).save(tmp_path / "photo.png")
    restored = {}
    for name, model in (("torch", weights), ("onnx", onnx_file)):
        arguments = ("restore", tmp_path / "photo.png", "--out", tmp_path / name, "--model", model)
        code, told, errors = run(*arguments, "--json", "--precision", "fp32")
        assert code == 0, errors
        restored[name] = np.asarray(Image.open(tmp_path / name / "photo.png")).astype(int)
    assert "in onnxruntime, fp32" in json.loads(told)["model"]
    assert np.abs(restored["torch"] - restored["onnx"]).max() <= 1
    # What is fixed in the file cannot be asked for otherwise.
    for option, words in (
        (("--train-patch", 64), "local statistics of an exported model are fixed"),
        (("--precision", "bf16"), "the precision of an exported model is fixed"),
        (("--workers", 1), "runs in this process alone"),
    ):
        code, _, errors = run(*arguments, *option)
        assert code == 2 and words in errors


def test_a_report_says_in_what_a_model_was_scored(
    run: Run, weights: Path, tmp_path: Path, onnx_file: Path
) -> None:
    write_pairs(tmp_path / "pairs", ["a", "b"])
    workspace = ("--workspace", tmp_path / "workspace")
    reports = {}
    for model in (weights, onnx_file):
        code, told, errors = run("evaluate", model, tmp_path / "pairs", "--json", *workspace)
        assert code == 0, errors
        reports[model] = json.loads(told)
    ours, theirs = reports[weights], reports[onnx_file]
    assert (theirs["protocol"]["backend"], theirs["protocol"]["precision"]) == ("onnxruntime", "fp32")
    assert theirs["psnr_restored_db"] == pytest.approx(ours["psnr_restored_db"], abs=5e-3)
    assert theirs["psnr_restored_db"] != theirs["psnr_blurred_db"]
    # Scores of two back ends are not held against each other.
    code, _, errors = run("evaluate", weights, onnx_file, tmp_path / "pairs", *workspace)
    assert code == 2 and "backend torch ≠ onnxruntime" in errors
    code, _, errors = run("evaluate", onnx_file, tmp_path / "pairs", "--workers", 1, *workspace)
    assert code == 2 and "runs in this process alone" in errors


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "caffe"], 2, "onnx, openvino, tensorrt, torch"),
        (["--to", "onnx", "--precision", "bf16"], 2, "no such precision of onnx"),
        (["--to", "onnx", "--out", "x.xml"], 2, "NAME.onnx"),
        (["--to", "onnx", "--on", "nowhere"], 2, "nowhere"),
    ],
)
def test_what_cannot_be(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], code: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    got, out, errors = run("export", weights, *arguments)
    assert got == code and words in errors and out == ""
    assert not list(tmp_path.iterdir())


def test_a_missing_runtime_is_said(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(CapabilityError, match=r"openvino.*pip install 'nafnet-ray\[export\]'") as raised:
        export_weights(weights, tmp_path / "x.xml", to="openvino")
    assert raised.value.exit_code == 4


@pytest.mark.slow
def test_without_a_gpu_the_graph_of_an_engine_is_written(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CapabilityError, match=r"an engine is built.*trtexec --onnx=.*--stronglyTyped"
    ) as raised:
        export_weights(weights, tmp_path / "lively.engine", to="tensorrt")
    assert raised.value.exit_code == 4 and "--maxShapes=lq:4x3x1440x2560" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lively.engine.onnx"]
    made = export.open_exported(tmp_path / "lively.engine.onnx").metadata["export"]
    assert made["precision"] == "fp16"  # with norms in fp32, which a strongly typed engine keeps


def test_files_of_others(tmp_path: Path, onnx_file: Path) -> None:
    import onnx

    with pytest.raises(InputError, match="no such model"):
        export.open_exported(tmp_path / "nowhere.onnx")
    (tmp_path / "damaged.onnx").write_bytes(onnx_file.read_bytes()[:5000])
    with pytest.raises(InputError, match="damaged ONNX file"):
        export.open_exported(tmp_path / "damaged.onnx")
    (tmp_path / "damaged.xml").write_text("<net>")
    (tmp_path / "damaged.bin").write_bytes(b"")
    with pytest.raises(InputError, match="damaged OpenVINO file"):
        export.open_exported(tmp_path / "damaged.xml")
    for metadata in (None, "hello", "[]", '{"export": {}}', '{"export": {"schema_version": 2}}'):
        plain = onnx.load(onnx_file)
        del plain.metadata_props[:]
        if metadata is not None:
            onnx.helper.set_model_props(plain, {"nafnet": metadata})
        onnx.save(plain, tmp_path / "plain.onnx")
        with pytest.raises(InputError, match="not exported by this version of `nafnet export`"):
            export.open_exported(tmp_path / "plain.onnx")


def test_files_of_something_else_stay(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_bytes(b"weights of another program")
    with pytest.raises(InputError, match=r"something else's.*other\.bin"):
        export_weights(weights, tmp_path / "other.xml", to="openvino")
    assert (tmp_path / "other.bin").read_bytes() == b"weights of another program"


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text("<net>")
    with pytest.raises(InputError, match=r"a part is missing.*x\.bin"):
        export.open_exported(tmp_path / "x.xml")


def test_the_suffixes_are_known_where_a_model_is_named() -> None:
    ran = tuple(form.suffix for form in export.FORMATS.values() if form.runtime is not None)
    assert ran == EXPORTED_SUFFIXES


def test_pairs_too_small_to_compare_on() -> None:
    small = photo(40, 60)
    with pytest.raises(InputError, match="too small to compare on"):
        crops([(small, small)])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_model_in_int8_is_exported_as_that(tmp_path: Path, to: str) -> None:
    model = lively_network(SHAPE)
    ranges = calibrate(model, [photo_nchw(256, 256)])
    del ranges["ending"]
    save_model(quantize(model, ranges), tmp_path / "int8.safetensors", metadata={"train_patch_px": PATCH_PX})
    out = (tmp_path / "int8").with_suffix(formats.FORMATS[to].suffix)
    result = export_weights(tmp_path / "int8.safetensors", out, to=to)
    assert result.precision == "int8"
    opened = export.open_exported(out)
    assert opened.fixed_precision == "int8" and len(opened.model.config.int8_layers or ()) == len(ranges)
    whole, rounded = model, load_model(tmp_path / "int8.safetensors")[0]
    lq = photo_nchw(130, 90)
    with torch.no_grad(), local_statistics(whole, PATCH_PX), local_statistics(rounded, PATCH_PX):
        expected, theirs = rounded(lq), opened.model(lq)
        loss = (whole(lq) - expected).abs().mean()
    assert (theirs - expected).abs().mean() < 0.5 * loss  # what int8 does, and not the whole network
    if to == "onnx":
        import onnx

        weights = [
            each for each in onnx.load(out).graph.initializer if each.data_type == onnx.TensorProto.INT8
        ]
        assert sum(len(each.dims) == 4 for each in weights) == len(ranges)


def test_a_program_for_executorch(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    from pipelines.export import executorch_format

    result = export_weights(weights, tmp_path / "lively.pte", to="executorch", size_px=(72, 64))
    program, said = result.files
    assert result.parity.difference < 1e-5 and result.parity.sizes_px == ((72, 64),)
    model, _ = load_model(weights)
    run = executorch_format.open(program, "fp32", num_threads=1)
    lq = photo_nchw(72, 64)
    made, _ = run(lq.numpy()), run(np.zeros_like(lq.numpy()))
    with torch.no_grad(), local_statistics(model, PATCH_PX):
        expected = model(lq)
    assert np.abs(made - expected.numpy()).max() < 1e-5 < np.abs(expected.numpy() - lq.numpy()).max()
    made = json.loads(said.read_text())["export"]
    assert made["size_px"] == [72, 64] and made["versions"]["executorch"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "tvm", "size_px": (63, 64)}, "sides of 64 px"),
        ({"to": "tvm", "target": "{}"}, r"NAME\.tar"),
        ({"to": "tvm", "target": "phone", "out": "x.tar"}, "knows no such target.*mtriple.*phone"),
        ({"to": "onnx", "size_px": (64, 64), "out": "x.onnx"}, "--size.*executorch, tvm"),
        ({"to": "executorch", "target": "{}", "out": "x.tar"}, "--target.*tvm"),
        ({"to": "onnx", "num_trials": 1, "out": "x.onnx"}, "--trials.*tvm"),
    ],
)
def test_what_tvm_cannot_be_asked(weights: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    pytest.importorskip("tvm")
    asked = {"out": "x.so", **options}
    with pytest.raises(InputError, match=words):
        export_weights(weights, tmp_path / asked.pop("out"), **asked)
    assert not list(tmp_path.iterdir())
