from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nafnet_core import InputError, NAFNet, NAFNetConfig, load_model, save_model, save_official
from nafnet_core.weights import load_state, read_state
from tests.nafnet_core.networks import SMALL, assert_network_acts, lively_network, photo_nchw
from tests.reference import ReferenceNAFNet

METADATA = {"train_patch_px": 256, "name": "göpro", "psnr_db": 33.5, "history": [1, 2]}


@pytest.fixture
def model() -> NAFNet:
    return lively_network(SMALL)


def assert_same_network(loaded: NAFNet, model: NAFNet) -> None:
    lq = photo_nchw(24, 32)
    assert_network_acts(model, lq)
    assert loaded.config == model.config
    assert not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(loaded(lq), model(lq))


def refused(path: Path) -> str:
    """The one line that the user reads."""
    with pytest.raises(InputError) as caught:
        load_model(path)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line
    return line


# Round trips


def test_safetensors_round_trip(model: NAFNet, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path, metadata=METADATA)
    loaded, metadata = load_model(path)
    assert_same_network(loaded, model)
    assert metadata == {**METADATA, "config": SMALL.to_dict()}


def test_official_layout_goes_out_and_comes_back(model: NAFNet, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_official(model, path)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"params"} and all(tensor.is_contiguous() for tensor in content["params"].values())
    other = ReferenceNAFNet(**SMALL.to_dict()).eval()  # type: ignore[arg-type]
    other.load_state_dict(content["params"])
    with torch.no_grad():
        torch.testing.assert_close(other(photo_nchw(24, 32)), model(photo_nchw(24, 32)), rtol=0, atol=1e-5)
    loaded, metadata = load_model(path)
    assert_same_network(loaded, model)
    assert metadata == {}


def test_path_may_be_a_string(model: NAFNet, tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    save_model(model, path, metadata={})
    assert_same_network(load_model(path)[0], model)


def test_same_model_gives_the_same_bytes(model: NAFNet, tmp_path: Path) -> None:
    # Digests name checkpoints: the order in which metadata was put together must not show.
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_model(model, first, metadata={"a": 1, "b": 2})
    save_model(model, second, metadata={"b": 2, "a": 1})
    assert first.read_bytes() == second.read_bytes()


def test_our_file_is_an_official_state_dict(model: NAFNet, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path, metadata={})
    reference = ReferenceNAFNet(**SMALL.to_dict())  # type: ignore[arg-type]
    reference.load_state_dict(load_file(path))
    lq = photo_nchw(24, 32)
    with torch.no_grad():
        torch.testing.assert_close(reference(lq), model(lq), rtol=0, atol=1e-5)


def test_saving_leaves_the_model_as_it_was(model: NAFNet, tmp_path: Path) -> None:
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_model(model, tmp_path / "model.safetensors", metadata={})
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_loaded_network_is_channels_last(model: NAFNet, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path, metadata={})
    loaded, _ = load_model(path)
    assert loaded.intro.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_fp32(model: NAFNet, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    expected = NAFNet(SMALL).eval()
    expected.load_state_dict({key: value.float() for key, value in state.items()})
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"params": state}, tmp_path / "model.pth")
    assert_same_network(load_model(tmp_path / "model.safetensors")[0], expected)
    assert_same_network(load_model(tmp_path / "model.pth")[0], expected)


# Official checkpoints


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize("wrapper", ["params", "params_ema", "state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_checkpoint(
    model: NAFNet, tmp_path: Path, prefix: str, wrapper: str | None, suffix: str
) -> None:
    state = {prefix + key: value for key, value in model.state_dict().items()}
    path = tmp_path / f"model{suffix}"
    torch.save(state if wrapper is None else {wrapper: state, "iter": 400_000}, path)
    loaded, metadata = load_model(path)
    assert_same_network(loaded, model)
    assert metadata == {}


def test_checkpoint_of_before_torch_1_6(model: NAFNet, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"params": model.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert_same_network(load_model(path)[0], model)


def test_averaged_weights_are_preferred(model: NAFNet, tmp_path: Path) -> None:
    # The official test code reads `params`, but where an average was kept it is the better network.
    path = tmp_path / "model.pth"
    other = lively_network(SMALL, seed=7)
    torch.save({"params": other.state_dict(), "params_ema": model.state_dict()}, path)
    assert_same_network(load_model(path)[0], model)


def test_safetensors_of_another_tool_has_no_metadata(model: NAFNet, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    loaded, metadata = load_model(path)
    assert_same_network(loaded, model)
    assert metadata == {}


# Refusals


class _RunsOnLoading:
    """What an attack looks like: unpickling it makes a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("new_format", [True, False])
def test_checkpoint_that_needs_code_is_refused_and_does_not_run(
    model: NAFNet, tmp_path: Path, new_format: bool
) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    content = {"params": model.state_dict(), "extra": _RunsOnLoading(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    line = refused(path)
    assert "run code" in line and "state dict" in line
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "no such weights file" in refused(tmp_path / name)


def test_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.mkdir()
    assert "no such weights file" in refused(path)


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"anything")
    line = refused(path)
    assert ".onnx" in line and ".safetensors or .pth" in line


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world\n",
        b"<!DOCTYPE html><title>404</title>",
        b'{"params": 1}',
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        # What a clone without git-lfs leaves in the place of a model.
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n",
    ],
    ids=["empty", "text", "html", "json", "png", "lfs"],
)
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    line = refused(path)
    assert "damaged weights file" in line
    assert "run code" not in line


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_truncated_file_is_refused(model: NAFNet, tmp_path: Path, kind: str) -> None:
    path = _written(model, tmp_path, kind)
    whole = path.read_bytes()
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        assert refused(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_damaged_bytes_never_end_in_a_traceback(model: NAFNet, tmp_path: Path, kind: str) -> None:
    # torch.load answers damage with KeyError, IndexError, AssertionError, struct.error and more.
    path = _written(model, tmp_path, kind)
    whole = path.read_bytes()
    generator = random.Random(0)
    num_refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(min(len(whole), 4000))] = generator.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            load_model(path)
        except InputError:
            num_refused += 1
    assert num_refused > 20


def _written(model: NAFNet, folder: Path, kind: str) -> Path:
    path = folder / ("model.safetensors" if kind == "safetensors" else "model.pth")
    if kind == "safetensors":
        save_model(model, path, metadata=METADATA)
    else:
        state = {"params": model.state_dict()}
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1, 2],
        torch.zeros(3),
        {"params": {"intro.weight": 1}},
        {0: torch.zeros(3)},
        {"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3), "fc.weight": torch.zeros(10, 4)},
        {"intro.weight": torch.zeros(3), "ending.weight": torch.zeros(3)},
        {"intro.weight": torch.zeros(4, 3, 3, 3), "ending.weight": torch.zeros(3, 4, 3, 3)},
    ],
    ids=["empty", "list", "tensor", "numbers", "int keys", "resnet", "flat intro", "no blocks"],
)
def test_what_is_no_nafnet_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "model.pth"
    torch.save(content, path)
    assert re.match(r"not a (NAFNet checkpoint|weights file): ", refused(path))


def test_safetensors_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"unet.conv_in.weight": torch.zeros(4, 4, 3, 3)}, path)
    line = refused(path)
    assert "not a NAFNet checkpoint" in line and "unet.conv_in.weight" in line


@pytest.mark.parametrize("text", ["not json", "[1, 2]"])
def test_metadata_that_is_no_table_is_refused(model: NAFNet, tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata={"nafnet": text})
    assert "damaged weights file" in refused(path)


@pytest.mark.parametrize("key", ["encoders.0.0.conv1.weight", "middle_blks.0.conv4.weight"])
@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(3, 0, 1, 1)], ids=["flat", "empty"])
def test_misshapen_expansion_is_refused(model: NAFNet, tmp_path: Path, key: str, value: Tensor) -> None:
    # These shapes tell the configuration: they are read before anything has been checked.
    path = tmp_path / "model.pth"
    torch.save({**model.state_dict(), key: value}, path)
    assert refused(path)


def test_missing_and_unexpected_keys_are_named(model: NAFNet, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    del state["middle_blks.0.norm1.weight"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pth")
    line = refused(tmp_path / "model.pth")
    assert "missing middle_blks.0.norm1.weight" in line
    assert "unexpected extra.weight" in line


def test_misshapen_keys_are_named_with_both_shapes(model: NAFNet, tmp_path: Path) -> None:
    state = {**model.state_dict(), "downs.0.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "model.pth")
    assert "downs.0.bias is (5,), not (16,)" in refused(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "value",
    [torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.complex64), torch.zeros(16).to_sparse()],
    ids=["int", "complex", "sparse"],
)
def test_weights_that_are_no_dense_numbers_are_named(model: NAFNet, tmp_path: Path, value: Tensor) -> None:
    torch.save({**model.state_dict(), "downs.0.bias": value}, tmp_path / "model.pth")
    line = refused(tmp_path / "model.pth")
    assert "downs.0.bias is" in line and "not dense floating point" in line


def test_long_lists_of_faults_are_cut(model: NAFNet) -> None:
    state = {f"extra.{i}": torch.zeros(1) for i in range(10)} | dict(model.state_dict())
    with pytest.raises(InputError, match="unexpected extra.2 and 7 more"):
        load_state(NAFNet(SMALL), state, file="x.pth")


def test_refused_weights_leave_the_network_as_it_was(model: NAFNet) -> None:
    target = NAFNet(SMALL)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = dict(model.state_dict())
    del state["ending.bias"]
    with pytest.raises(InputError):
        load_state(target, state, file="x.pth")
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key])


def test_absurd_block_number_is_refused_at_once(model: NAFNet, tmp_path: Path) -> None:
    # Believed, it would fill the memory with blocks.
    state = {**model.state_dict(), "middle_blks.999999999.beta": torch.zeros(1)}
    torch.save(state, tmp_path / "model.pth")
    assert "999999999" in refused(tmp_path / "model.pth")


# What others may rely on


def test_written_configuration_is_readable_without_torch(model: NAFNet, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path, metadata={"train_patch_px": np.int64(64).item()})
    with safe_open(str(path), framework="np") as file:
        header = json.loads(file.metadata()["nafnet"])
    assert NAFNetConfig(**header["config"]) == SMALL
    assert header["train_patch_px"] == 64


def test_read_state_knows_nothing_of_networks(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "any.safetensors")
    state, metadata = read_state(tmp_path / "any.safetensors")
    assert metadata == {} and list(state) == ["a"]
    assert torch.equal(state["a"], torch.ones(2))


def test_weights_are_readable_as_any_new_file_is(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_model(lively_network(SMALL), tmp_path / "model.safetensors", metadata={})
    modes = [(tmp_path / name).stat().st_mode for name in ("other", "model.safetensors")]
    assert modes[0] == modes[1]
