"""A model on grids of 8 bits, or in half precision: see `nafnet_core.quantization`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nafnet_core import GateError, InputError, NAFNet, save_model
from nafnet_core.quantization import Ranges, calibrate, quantize
from pipelines.calibration import Calibration
from pipelines.compress.recipe import check_out, mean_psnr_db, place_of_recipe, write_recipe
from pipelines.files import make_folder, written_aside
from pipelines.models import LoadedModel

Target = Literal["int8", "fp16", "bf16"]
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_TRIED = (0, 1, 2, 4, 8, 16, 32)
"""How many of the most sensitive convolutions stay as they are, until the loss is held."""
_JUDGING = 12
"""Patches to judge single convolutions on."""
_RATE = 3e-5
"""Of fine-tuning: rounding is a small disturbance, and large steps are a larger one. `mobile-v1` lost 0.02 dB
more in 12 minutes at ten times the rate, and nothing in 8 at this one."""
OnStep = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How to quantise. Raises `InputError` where that cannot be."""

    out: Path
    """Weights file to write, `.safetensors`; of int8 the recipe of its fine-tuning goes beside it."""
    to: Target = "int8"
    on: str | None = None
    """Store of pairs, a folder or URL: to calibrate and judge int8 on; for half precision to score only."""
    max_loss_db: float = 0.1
    """What int8 may lose, in PSNR on patches of pairs that it was not calibrated on."""
    num_patches: int = 48
    """Of two thirds of the pairs; half as many of the others are to score on."""
    patch_px: int = 128

    def __post_init__(self) -> None:
        check_out(self.out)
        if self.to not in ("int8", *_HALVES):
            raise InputError("unknown precision", expected="int8, fp16, bf16", got=self.to)
        if self.to == "int8" and self.on is None:
            raise InputError(
                "int8 is calibrated on pairs", expected="a store", fix="Name one with --calibration"
            )
        if not self.max_loss_db > 0:
            raise InputError("--max-loss", expected="more than 0 dB", got=self.max_loss_db)


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What became of the model."""

    weights: Path
    to: Target
    recipe: Path | None
    """Of quantisation-aware training; None for half precision."""
    num_int8: int
    """Convolutions on grids of 8 bits."""
    kept: tuple[str, ...]
    """Those that stay as they are, most sensitive first."""
    psnr_db: tuple[float, float] | None
    """Before and after: mean over patches of pairs that were not calibrated on, where there are three."""
    psnr_blurred_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def run_quantize(
    config: QuantizeConfig, loaded: LoadedModel, *, on_step: OnStep = lambda done, total, what: None
) -> QuantizeResult:
    """Quantise a model, and write it.

    Args:
        config: how.
        loaded: the model.
        on_step: called with what is done, of how much, and what it is.

    Raises:
        GateError: int8 loses more than it may with as many convolutions left as they are as was tried.
        InputError: no such store; the model is quantised already.
    """
    make_folder(config.out.absolute().parent)
    loaded.check_rgb()
    if loaded.model.config.int8_layers:
        raise InputError(
            "this model is quantised already", file=loaded.weights, fix="Name the one it comes from"
        )
    recipe = place_of_recipe(config.out, loaded)
    seen, held_out = _pairs(config)
    model, kept = loaded.model, ()
    if config.to == "int8":
        made, kept = _in_int8(config, model, seen, held_out, on_step)
    else:
        made = deepcopy(model).to(_HALVES[config.to])
    # Measured as it will be read: in fp32, on what the file holds.
    scored = made if config.to == "int8" else deepcopy(made).float()
    psnr_db = held_out and (mean_psnr_db(model, held_out), mean_psnr_db(scored, held_out))
    metadata = {name: value for name, value in loaded.metadata.items() if name != "config"}
    metadata["quantized"] = {
        "from": loaded.label, "digest": loaded.digest, "to": config.to, "psnr_db": psnr_db,
    }  # fmt: skip
    with written_aside(config.out) as temporary:
        save_model(made, temporary, metadata=metadata)
    if config.to == "int8":
        write_recipe(recipe, config.out, made, changed={"lr": _RATE})
    return QuantizeResult(
        weights=config.out,
        to=config.to,
        recipe=recipe if config.to == "int8" else None,
        num_int8=len(made.config.int8_layers or ()),
        kept=kept,
        psnr_db=psnr_db,
        psnr_blurred_db=held_out and mean_psnr_db(None, held_out),
    )


Patches = list[tuple[Tensor, Tensor]]


def _pairs(config: QuantizeConfig) -> tuple[Patches, Patches | None]:
    """Patches to calibrate on, and to score on: the same ones of fewer than three pairs."""
    if config.on is None:
        return [], None
    drawn = Calibration.on(config.on, num_patches=config.num_patches, patch_px=config.patch_px)
    calibrating, others = drawn.split()
    seen = list(calibrating.patches())
    return seen, seen if others is None else list(others.patches())


def _in_int8(
    config: QuantizeConfig, model: NAFNet, seen: Patches, held_out: Patches | None, on_step: OnStep
) -> tuple[NAFNet, tuple[str, ...]]:
    """The network with as many convolutions in int8 as hold the loss, and those that stay as they are."""
    assert held_out is not None
    on_step(0, len(model.convolutions), "calibrating")
    ranges = calibrate(model, [lq for lq, _ in seen])
    whole_db = mean_psnr_db(model, held_out)
    sensitive: list[str] = []
    best_db = float("-inf")
    for number in _TRIED:
        if number >= len(ranges):
            break
        if number and not sensitive:
            sensitive = _most_sensitive(model, ranges, seen[:_JUDGING], on_step)
        left = sensitive[:number]
        quantized = quantize(model, {name: ranges[name] for name in ranges if name not in left})
        psnr_db = mean_psnr_db(quantized, held_out)
        if whole_db - psnr_db <= config.max_loss_db:
            return quantized, tuple(left)
        best_db = max(best_db, psnr_db)
    raise GateError(
        "int8 loses too much; nothing was written", file=config.out,
        expected=f"at most {config.max_loss_db:g} dB", got=f"{whole_db - best_db:.3f} dB",
        fix="Give a larger --max-loss and fine-tune, or take --to fp16",
    )  # fmt: skip


def _most_sensitive(model: NAFNet, ranges: Ranges, pairs: Patches, on_step: OnStep) -> list[str]:
    """Names of the convolutions, by what PSNR loses when one alone is in int8."""
    scores = {}
    for number, name in enumerate(ranges):
        on_step(number, len(ranges), name)
        scores[name] = mean_psnr_db(quantize(model, {name: ranges[name]}), pairs)
    return sorted(scores, key=lambda name: scores[name])
