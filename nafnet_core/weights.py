"""Weights in and out: `.safetensors` (ours) and the official `.pth`; the keys tell the configuration."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nafnet_core.errors import InputError
from nafnet_core.model import NAFNet, NAFNetConfig

StateDict = Mapping[str, Tensor]
METADATA_KEY = "nafnet"
# Where official and BasicSR-like checkpoints keep the weights, best first.
_WRAPPERS = ("params_ema", "params", "state_dict", "model")
_PTH_MAGIC = (b"PK\x03\x04", b"\x80")  # a zip, since torch 1.6; a bare pickle before
_GRIDS = ".int8.ranges"
_SHOWN_KEYS = 3


def load_model(path: str | Path) -> tuple[NAFNet, dict[str, Any]]:
    """Build the network that a weights file holds.

    Args:
        path: `.safetensors`, or an official `.pth` (`params_ema`, `params` or a bare dict; a `module.`
            prefix is dropped).

    Returns:
        The network in fp32 and eval mode, on the CPU, and the file's metadata (empty for `.pth`), among it
        `train_patch_px`, which local statistics need.

    Raises:
        InputError: the file is missing, damaged, no NAFNet, or needs pickled code to load.
    """
    path = Path(path)
    state, metadata = read_state(path)
    config = infer_config(state, file=path)
    try:
        model = NAFNet(config)
    except ValueError as error:
        raise InputError("not a NAFNet checkpoint", file=path, got=str(error)) from error
    load_state(model, state, file=path)
    return model.eval(), metadata


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a weights file, without saying what network they are.

    Raises:
        InputError: the file is missing, damaged, of another kind, or needs pickled code to load.
    """
    if not path.is_file():
        raise InputError("no such weights file", file=path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return _read_pth(path), {}
    raise InputError("not a weights file", file=path, expected=".safetensors or .pth", got=path.suffix)


def save_model(model: NAFNet, path: str | Path, *, metadata: Mapping[str, Any]) -> None:
    """Write weights with their configuration and `metadata` (JSON values) as safetensors.

    The caller makes the write atomic.
    """
    header = {**metadata, "config": model.config.to_dict()}
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    # Not `save_file`, whose files nobody else may read.
    Path(path).write_bytes(save(_plain_state(model), metadata=metadata))


def save_official(model: NAFNet, path: str | Path) -> None:
    """Write weights as the official code does, a `.pth` with `params`, for other tools to load.

    It holds no metadata: who restores with it has to know the training patch. The caller makes the write
    atomic.
    """
    torch.save({"params": _plain_state(model)}, path)


def _plain_state(model: NAFNet) -> dict[str, Tensor]:
    """Weights on the CPU, in the usual strides."""
    return {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}


def load_state(model: nn.Module, state: StateDict, *, file: str | Path) -> None:
    """Load `state` into `model`, strictly.

    Raises:
        InputError: keys are missing, unexpected or misshapen; the first few are named.
    """
    own = model.state_dict()
    faults = [f"missing {key}" for key in own if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in own]
    common = {key: state[key] for key in own if key in state}
    faults += [
        f"{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in common.items()
        if value.shape != own[key].shape
    ]
    faults += [
        f"{key} is {value.dtype} {value.layout}, not dense floating point"
        for key, value in common.items()
        if not value.is_floating_point() or value.layout != torch.strided
    ]
    if faults:
        raise InputError("the weights do not fit the network", file=file, got=_first(faults))
    model.load_state_dict(dict(state))


def infer_config(state: StateDict, *, file: str | Path) -> NAFNetConfig:
    """Read width, blocks and expansions off the keys and shapes of a state dict.

    Raises:
        InputError: the keys are not a NAFNet's.
    """
    needed = ("intro.weight", "ending.weight")
    missing = [key for key in needed if key not in state]
    if missing or state["intro.weight"].dim() != 4:
        got = _first(sorted(state)) if state else "an empty file"
        raise InputError(
            "not a NAFNet checkpoint", file=file, expected="keys intro.*, encoders.*, ending.*", got=got
        )

    def count(pattern: str) -> int:
        found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
        number = max(found, default=-1) + 1
        # One stray `middle_blks.999999999.x` must not make us build a billion blocks.
        if number > len(state):
            got = f"block {number - 1} among {len(state)} keys"
            raise InputError("not a NAFNet checkpoint", file=file, got=got)
        return number

    width, img_channel = state["intro.weight"].shape[:2]
    num_stages = count(r"downs\.(\d+)\.")
    encoders, decoders = (
        tuple(count(rf"{part}\.{stage}\.(\d+)\.") for stage in range(num_stages))
        for part in ("encoders", "decoders")
    )
    middle = count(r"middle_blks\.(\d+)\.")
    names = [f"encoders.{stage}.{i}" for stage, number in enumerate(encoders) for i in range(number)]
    names += [f"middle_blks.{i}" for i in range(middle)]
    names += [f"decoders.{stage}.{i}" for stage, number in enumerate(decoders) for i in range(number)]
    try:
        return NAFNetConfig(
            width=width,
            img_channel=img_channel,
            enc_blk_nums=encoders,
            middle_blk_num=middle,
            dec_blk_nums=decoders,
            **_gates(state, names, "conv1", "dw", file=file),
            **_gates(state, names, "conv4", "ffn", file=file),
            int8_layers=tuple(key.removesuffix(_GRIDS) for key in state if key.endswith(_GRIDS)) or None,
        )
    except ValueError as error:
        raise InputError("not a NAFNet checkpoint", file=file, got=str(error)) from error


def _gates(state: StateDict, blocks: list[str], layer: str, name: str, *, file: str | Path) -> dict[str, Any]:
    """The expansion before one of the gates; where blocks differ in it, the channels behind that gate too."""
    shapes = [
        value.shape
        for block in blocks
        if (value := state.get(f"{block}.{layer}.weight")) is not None and value.dim() == 4
    ]
    if not shapes or any(0 in shape for shape in shapes):
        expected = f"at least one block, with {layer}"
        raise InputError("not a NAFNet checkpoint", file=file, expected=expected)
    expansion = shapes[0][0] // shapes[0][1]
    if all(wide == expansion * narrow for wide, narrow, *_ in shapes):
        return {f"{name}_expand": expansion}
    return {f"{name}_channels": tuple(shape[0] // 2 for shape in shapes)}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError("damaged weights file", file=path, got=str(error)) from error
    if not isinstance(metadata, dict):
        raise InputError("damaged weights file", file=path, expected="a table of metadata", got=metadata)
    return state, metadata


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            if not file.read(4).startswith(_PTH_MAGIC):
                raise ValueError("a file that torch.save did not write")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            "this checkpoint would run code on loading, which is refused",
            file=path,
            expected="tensors only",
            fix="Ask its author for a state dict, or convert it on a machine you can lose",
        ) from error
    except Exception as error:
        # On a damaged pickle `torch.load` raises whatever comes: KeyError, IndexError, AssertionError, …
        raise InputError("damaged weights file", file=path, got=str(error)[:120]) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise InputError("not a weights file", file=path, expected="a dict of tensors")
    return {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in content.items()
    }


def _first(items: list[str]) -> str:
    rest = len(items) - _SHOWN_KEYS
    return ", ".join(items[:_SHOWN_KEYS]) + (f" and {rest} more" if rest > 0 else "")
