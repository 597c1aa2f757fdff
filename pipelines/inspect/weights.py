"""A model: its configuration, its metadata, and whether its weights are sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nafnet_core import PRESETS, InputError
from nafnet_core.weights import StateDict, read_state
from pipelines.inspect.result import InspectConfig, InspectResult, Show
from pipelines.models import open_model

_FRAME_PX = (720, 1280)
_PROBE_PX = 64
_SHOWN = 3


def inspect_model(config: InspectConfig, show: Show) -> InspectResult:
    """Load a model and look at its weights; see `pipelines.models.open_model` for what names one.

    Raises:
        InputError: there is no such model, it is damaged, or it is no NAFNet.
    """
    loaded = open_model(config.what, config.workspace)
    state, _ = read_state(loaded.weights)
    shape = loaded.model.config
    preset = next((name for name, preset in PRESETS.items() if preset == shape), None)
    broken = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    fresh, remark = _scales(state)
    notes = [remark]
    if fresh and not broken:
        difference = _largest_change(loaded.model)
        notes.append(
            "The network is the identity: it returns its input"
            if difference == 0
            else f"On noise it changes no value by more than {difference:.2g} of the range"
        )
    problems = []
    if broken:
        named = ", ".join(broken[:_SHOWN]) + (
            f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        )
        error = InputError(
            "weights that are no numbers",
            file=loaded.weights,
            expected="finite values",
            got=f"NaN or infinity in {named}",
            fix="Take an earlier checkpoint",
        )
        problems.append(str(error))
    return InspectResult(
        kind="model",
        name=loaded.label,
        facts={
            "file": str(loaded.weights),
            "bytes": loaded.weights.stat().st_size,
            "sha256": loaded.digest,
            "preset": preset,
            **shape.to_dict(),
            "parameters": loaded.model.num_parameters,
            "gmacs_1280x720": loaded.model.config.num_macs(*_FRAME_PX) / 1e9,
            "dtype": sorted({str(value.dtype).removeprefix("torch.") for value in state.values()}),
            "finite": not broken,
            "fresh": fresh,
            "metadata": {key: value for key, value in loaded.metadata.items() if key != "config"},
        },
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _scales(state: StateDict) -> tuple[bool, str]:
    """Whether every block's `beta` and `gamma` are zero, as at the start of training, and a remark."""
    scales = [value for key, value in state.items() if key.rsplit(".", 1)[-1] in ("beta", "gamma")]
    num_zero = sum(not bool(value.any()) for value in scales)
    if scales and num_zero == len(scales):
        return True, "Fresh: every beta and gamma is zero, so each block passes its input on"
    largest = max((float(value.abs().max()) for value in scales), default=0.0)
    zero = f", {num_zero} of {len(scales)} all zero" if num_zero else ""
    return False, f"Residual scales beta and gamma are trained: largest {largest:.3g}{zero}"


@torch.inference_mode()
def _largest_change(model: Any) -> float:
    noise: Tensor = torch.rand(1, model.config.img_channel, _PROBE_PX, _PROBE_PX)
    return float((model(noise) - noise).abs().max())
