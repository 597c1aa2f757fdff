"""Channels leave a network: see `nafnet_core.pruning`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nafnet_core import InputError, NAFNet, save_model
from nafnet_core.losses import psnr_loss
from nafnet_core.pruning import Gates, gather, keep_share, keep_within_macs, magnitudes, prune
from pipelines.calibration import Calibration
from pipelines.compress.recipe import check_out, mean_psnr_db, place_of_recipe, write_recipe
from pipelines.files import make_folder, written_aside
from pipelines.models import LoadedModel

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
        check_out(self.out)

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
    if loaded.model.config.int8_layers:
        raise InputError(
            "a quantised model is not pruned", file=loaded.weights, fix="Prune first, then quantise"
        )
    recipe = place_of_recipe(config.out, loaded)
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
    write_recipe(recipe, config.out, pruned, changed={})
    return PruneResult(
        weights=config.out,
        recipe=recipe,
        importance=config.criterion,
        dw_channels=tuple(len(stays) for stays in kept[::2]),
        ffn_channels=tuple(len(stays) for stays in kept[1::2]),
        parameters=(model.num_parameters, pruned.num_parameters),
        gmacs=(_gmacs(model), _gmacs(pruned)),
        psnr_db=held_out and (mean_psnr_db(model, held_out), mean_psnr_db(pruned, held_out)),
        psnr_blurred_db=held_out and mean_psnr_db(None, held_out),
    )


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


def _gmacs(model: NAFNet) -> float:
    return model.config.num_macs(*_FRAME_PX) / 1e9


def _counted(
    pairs: list[tuple[Tensor, Tensor]], on_patch: Callable[[int, int], None]
) -> Iterable[tuple[Tensor, Tensor]]:
    for number, pair in enumerate(pairs):
        on_patch(number, len(pairs))
        yield pair
