"""What a smaller model needs beside its weights: where these may go, and how to fine-tune it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from nafnet_core import InputError, NAFNet
from nafnet_core.losses import psnr_loss
from pipelines.config import find_recipe
from pipelines.files import written_aside
from pipelines.models import LoadedModel

_RECIPE = "finetune"
_HEAD = "# Fine-tuning of"
Pairs = Iterable[tuple[Tensor, Tensor]]


def check_out(out: Path) -> None:
    """Raise `InputError` where this is no name of a weights file."""
    if out.suffix != ".safetensors":
        raise InputError("not a weights file to write", file=out, expected="NAME.safetensors")


def place_of_recipe(out: Path, loaded: LoadedModel) -> Path:
    """Where the recipe goes. Raises `InputError` where it or the weights would replace what is not ours."""
    if out.exists() and out.samefile(loaded.weights):
        raise InputError(
            "the smaller model would replace the one it comes from", file=out, fix="Give another --out"
        )
    recipe = out.with_suffix(".yaml")
    if recipe.exists() and not recipe.read_text().startswith(_HEAD):
        raise InputError(
            "a recipe of this name is there, of something else", file=recipe, fix="Give another --out"
        )
    return recipe


def write_recipe(recipe: Path, weights: Path, model: NAFNet, *, changed: Mapping[str, Any]) -> None:
    """Write the shipped recipe of fine-tuning, for this network.

    Args:
        recipe: file to write.
        weights: what training begins with.
        model: the network in it.
        changed: values of `optim` other than the shipped recipe's.
    """
    content = yaml.safe_load(find_recipe(_RECIPE).read_text())
    content["model"] = {**model.config.to_dict(), "init": str(weights.absolute())}
    for expansion in ("dw_expand", "ffn_expand", "img_channel"):
        del content["model"][expansion]
    content["optim"] |= changed
    head = f"{_HEAD} {weights.name}: the recipe `{_RECIPE}`, with this network's numbers.\n"
    command = f"#   nafnet train --config {recipe.name} --data STORE --val TEST_STORE\n"
    body = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
    with written_aside(recipe) as temporary:
        temporary.write_text(head + command + body)


@torch.inference_mode()
def mean_psnr_db(model: NAFNet | None, pairs: Pairs) -> float:
    """Mean PSNR of what a network makes of blurred ones, (1, 3, P, P) in 0…1; None leaves them blurred."""
    scores = [-float(psnr_loss((lq if model is None else model(lq)).clamp(0, 1), gt)) for lq, gt in pairs]
    return sum(scores) / len(scores)
