"""Channels leave a network: see `nafnet_core.pruning`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from nafnet_core import InputError, NAFNet, save_model
from nafnet_core.losses import psnr_loss
from nafnet_core.pruning import Gates, gather, keep_share, keep_within_macs, magnitudes, prune
from pipelines.calibration import Calibration
from pipelines.config import find_recipe
from pipelines.files import make_folder, written_aside
from pipelines.models import LoadedModel

_RECIPE = "finetune"
_HEAD = "# Fine-tuning of the pruned"
_FRAME_PX = (720, 1280)


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What leaves. Raises `InputError` where that cannot be."""

    out: Path
    """Weights file to write, `.safetensors`; the recipe of its fine-tuning goes beside it, `.yaml`."""
    ratio: float | None = None
    """Share of the channels behind each gate that leaves. Else:"""
    macs: float | None = None
    """Share of the multiply-accumulates that stays; channels leave where that costs least, in any block."""
    importance: Literal["auto", "magnitude", "taylor"] = "auto"
    """`auto` is `taylor` where there are pairs."""
    on: str | None = None
    """Store of pairs, a folder or URL, to judge channels on, and to fit what stays."""
    multiple: int = 8
    """Channels that stay are a multiple of this."""
    num_patches: int = 64
    """To judge and to fit, of two thirds of the pairs; half as many of the others are to score on."""
    patch_px: int = 128

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.macs is None):
            raise InputError("how much to prune", expected="--ratio or --macs, one of them")
        for name, share in (("--ratio", self.ratio), ("--macs", self.macs)):
            if share is not None and not 0 < share < 1:
                raise InputError(name, expected="more than 0 and less than 1", got=share)
        if self.importance not in ("auto", "magnitude", "taylor"):
            raise InputError("unknown importance", expected="auto, magnitude, taylor", got=self.importance)
        if self.importance == "taylor" and self.on is None:
            raise InputError(
                "Taylor importance is measured on pairs", expected="a store", fix="Name one with --on"
            )
        if self.out.suffix != ".safetensors":
            raise InputError("not a weights file to write", file=self.out, expected="NAME.safetensors")

    @property
    def criterion(self) -> str:
        """`magnitude` or `taylor`."""
        if self.importance != "auto":
            return self.importance
        return "magnitude" if self.on is None else "taylor"


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What left, and what that costs before any fine-tuning."""

    weights: Path
    recipe: Path
    importance: str
    dw_channels: tuple[int, ...]
    ffn_channels: tuple[int, ...]
    parameters: tuple[int, int]
    """Before and after, as below."""
    gmacs: tuple[float, float]
    """At 1280×720."""
    psnr_db: tuple[float, float] | None
    """Mean over patches of pairs that the fit was not shown; None of fewer than three pairs."""
    psnr_blurred_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def run_prune(
    config: PruneConfig,
    loaded: LoadedModel,
    *,
    on_patch: Callable[[int, int], None] = lambda done, total: None,
) -> PruneResult:
    """Prune a model, and write it with the recipe of its fine-tuning.

    Args:
        config: what leaves.
        loaded: the model.
        on_patch: called with the patches looked at, and their number.

    Raises:
        InputError: no such store, or a budget that cannot be met.
    """
    make_folder(config.out.absolute().parent)
    loaded.check_rgb()
    recipe = _place_of_recipe(config.out, loaded)
    model, evidence, held_out = loaded.model, None, None
    if config.on is not None:
        drawn = Calibration.on(config.on, num_patches=config.num_patches, patch_px=config.patch_px)
        seen, others = drawn.split()
        evidence = gather(model, _counted(list(seen.patches()), on_patch), psnr_loss)
        held_out = others and list(others.patches())
    scores = evidence.taylor if evidence and config.criterion == "taylor" else magnitudes(model)
    kept = _chosen(config, model, scores)
    pruned = prune(model, kept, evidence)
    metadata = {name: value for name, value in loaded.metadata.items() if name != "config"}
    metadata["pruned"] = {"from": loaded.label, "digest": loaded.digest, **_told(config)}
    with written_aside(config.out) as temporary:
        save_model(pruned, temporary, metadata=metadata)
    with written_aside(recipe) as temporary:
        temporary.write_text(_recipe(config.out, pruned))
    return PruneResult(
        weights=config.out,
        recipe=recipe,
        importance=config.criterion,
        dw_channels=tuple(len(stays) for stays in kept[::2]),
        ffn_channels=tuple(len(stays) for stays in kept[1::2]),
        parameters=(model.num_parameters, pruned.num_parameters),
        gmacs=(_gmacs(model), _gmacs(pruned)),
        psnr_db=held_out and (_psnr_db(model, held_out), _psnr_db(pruned, held_out)),
        psnr_blurred_db=held_out and _psnr_db(lambda lq: lq, held_out),
    )


def _place_of_recipe(out: Path, loaded: LoadedModel) -> Path:
    """Where the recipe goes. Raises `InputError` where it or the weights would replace what is not ours."""
    if out.exists() and out.samefile(loaded.weights):
        raise InputError("the pruned model would replace the whole one", file=out, fix="Give another --out")
    recipe = out.with_suffix(".yaml")
    if recipe.exists() and not recipe.read_text().startswith(_HEAD):
        raise InputError(
            "a recipe of this name is there, and not of pruning", file=recipe, fix="Give another --out"
        )
    return recipe


def _chosen(config: PruneConfig, model: NAFNet, scores: Gates) -> Gates:
    if config.ratio is not None:
        kept = keep_share(scores, 1 - config.ratio, multiple=config.multiple)
        if all(len(stays) == len(gate) for stays, gate in zip(kept, scores, strict=True)):
            raise InputError(
                "nothing leaves", expected="gates of more channels", got=f"multiples of {config.multiple}",
                fix="Give a larger --ratio or a smaller --multiple",
            )  # fmt: skip
        return kept
    assert config.macs is not None
    try:
        return keep_within_macs(model.config, scores, config.macs, multiple=config.multiple)
    except ValueError as error:
        raise InputError("a budget too small", got=error, fix="Give a larger --macs") from error


def _told(config: PruneConfig) -> dict[str, Any]:
    """What the weights file keeps of how it came about."""
    asked = {"ratio": config.ratio} if config.ratio is not None else {"macs": config.macs}
    return {**asked, "importance": config.criterion, "fitted": config.on is not None}


def _recipe(weights: Path, pruned: NAFNet) -> str:
    """The shipped recipe of fine-tuning, for this network."""
    content = yaml.safe_load(find_recipe(_RECIPE).read_text())
    content["model"] = {**pruned.config.to_dict(), "init": str(weights.absolute())}
    for expansion in ("dw_expand", "ffn_expand", "img_channel"):
        del content["model"][expansion]
    head = f"{_HEAD} {weights.name}: the recipe `{_RECIPE}`, with the channels that are left.\n"
    command = f"#   nafnet train --config {weights.with_suffix('.yaml').name} --data STORE --val TEST_STORE\n"
    return head + command + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)


def _gmacs(model: NAFNet) -> float:
    return model.config.num_macs(*_FRAME_PX) / 1e9


@torch.inference_mode()
def _psnr_db(restore: Callable[[Tensor], Tensor], pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean PSNR of what is restored."""
    scores = [-float(psnr_loss(restore(lq).clamp(0, 1), gt)) for lq, gt in pairs]
    return sum(scores) / len(scores)


def _counted(
    pairs: list[tuple[Tensor, Tensor]], on_patch: Callable[[int, int], None]
) -> Iterable[tuple[Tensor, Tensor]]:
    for number, pair in enumerate(pairs):
        on_patch(number, len(pairs))
        yield pair
