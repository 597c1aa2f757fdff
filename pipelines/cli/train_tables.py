"""What `nafnet train` and its `--dry-run` end with: tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import console
from pipelines.cli.shared import print_lines
from pipelines.counting import counted
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.config.sections import ScalingSection
    from pipelines.train import DryRun, TrainResult
    from pipelines.train.summary import Summary

_MIB_A_GIB = 1024


def print_result(settings: RunConfig, place: Workspace, result: TrainResult) -> None:
    """The figures of a finished run, and where to go from there."""
    from pipelines.store import read_manifest
    from pipelines.tracking import tracking_uri

    summary, best, val = result.summary, result.summary.best, settings.data.val
    attempts = f" in {summary.attempts} attempts" if summary.attempts > 1 else ""
    rows: list[tuple[str, str]] = [
        ("samples", f"{summary.samples}, {summary.epochs:.3g} epochs"),
        ("minutes", f"{summary.minutes:.1f}{attempts}"),
        ("samples/s", f"{summary.samples_per_s:.1f} by {counted(summary.num_workers, 'worker')}"),
        ("waiting for data", f"{summary.data_wait:.1%}"),
        ("skipped steps", f"{summary.skipped_steps}"),
    ]
    if best is not None and summary.last is not None and val is not None:
        rows += [
            ("best PSNR", f"{best.psnr_db:.2f} dB at {best.samples} of {summary.samples} samples"),
            ("its gain over the blurred input", f"{best.gain_db or 0:+.2f} dB"),
            ("its SSIM", "–" if best.ssim is None else f"{best.ssim:.4f}"),
            ("last PSNR", f"{summary.last.psnr_db:.2f} dB at {summary.last.samples}"),
            (
                "validation images",
                f"{result.num_val_images} of {read_manifest(val).num_pairs}, evenly spread",
            ),
        ]
    rows.append(("MLflow run", result.mlflow_run_id))
    console.table(f"Run {settings.name}", ["", ""], rows, values_left=True)
    if best is not None and (best.gain_db or 0) <= 0:
        print_lines("That is no gain yet: train longer, with a larger budget and another --name.")
    uri = public(tracking_uri(place, settings.tracking.uri))
    print_lines(
        f"Weights{' of the best PSNR' if best else ''}: {result.weights}",
        *(f"{_said_of(picture, summary)}: {picture}" for picture in result.pictures),
        f"Look at it: {f'mlflow ui --backend-store-uri {uri}' if uri.startswith('sqlite:') else uri}",
        f"Next: nafnet evaluate {settings.name} {val or 'TEST_STORE'}",
    )


def _said_of(picture: Path, summary: Summary) -> str:
    if picture.stem == "curves" or summary.best is None:
        return "Curves"
    return f"A photo, by the weights at {summary.best.samples} samples"


def print_dry_run(recipe: str, settings: RunConfig, trial: DryRun) -> None:
    """What a run would do, and what was tried of it here."""
    from pipelines.train.trial import RATE_SHARES

    model, scaling = settings.model, settings.scaling
    optim = settings.optim
    num_values = f"{trial.num_parameters / 1e6:.2f} M parameters, {trial.macs / 1e9:.1f} G MACs at 256×256"
    gpus = ", with a GPU" + (" each" if scaling.most_workers > 1 else "") if scaling.use_gpu else ""
    shares = f"  at {', '.join(f'{share * 100:g}' for share in RATE_SHARES)} %"
    rows = [
        ("network", f"{model.preset or f'width {model.width}'}: {num_values}"),
        ("budget", _budget(settings, trial)),
        ("loss", " + ".join(f"{weight:g} × {name}" for name, weight in settings.loss.items())),
        (
            "optimiser",
            f"AdamW, betas {optim.betas[0]:g} and {optim.betas[1]:g}, weight decay {optim.weight_decay:g}, "
            f"{f'norm clipped at {optim.clip_norm:g}' if optim.clip_norm else 'no clipping'}",
        ),
        ("average of weights", f"decay {optim.ema_decay:g}" if optim.ema_decay else "none"),
        ("learning rate", _schedule(settings)),
        *([] if trial.rates is None else [(shares, ", ".join(f"{rate:.3g}" for rate in trial.rates))]),
        ("precision", settings.precision),
        ("workers", f"{_workers(scaling)}{gpus}"),
        (
            "a checkpoint",
            f"{trial.checkpoint_mib:.0f} MiB, every {settings.checkpoint.every_minutes:g} minutes",
        ),
    ]
    if settings.validation.shares:
        times, images = len(settings.validation.shares), settings.validation.max_images
        rows.append(("validation", f"{times} times, on up to {counted(images, 'image')}"))
    if trial.init is not None:
        rows.insert(1, ("begins with", trial.init.line().removeprefix("initial weights: ")))
    console.table(f"Dry run of {recipe}, on the {trial.device}", ["", ""], rows, values_left=True)
    console.table(
        "Stages",
        ["", "patch", "batch", "workers × passes × samples", "optimiser steps", "GiB a worker"],
        [
            [
                f"{stage.share * 100:.3g} %",
                stage.patch_px,
                stage.batch,
                f"{stage.num_workers} × {stage.accumulation} × {stage.micro_batch}",
                stage.num_steps,
                f"{stage.memory_mib / _MIB_A_GIB:.1f}",
            ]
            for stage in trial.stages
        ],
    )
    console.table(
        f"Tried here, in {trial.seconds:.0f} s",
        ["", "patch", "batch", "losses"],
        [
            [
                f"{stage.share * 100:.3g} %",
                _shrunk(stage.patch_px, stage.tried_patch_px),
                _shrunk(stage.batch, stage.tried_batch),
                " → ".join(f"{loss:.4g}" for loss in stage.losses),
            ]
            for stage in trial.stages
        ],
    )
    print_lines("A checkpoint was written and read back.", *_remarks(settings, trial))


def _workers(scaling: ScalingSection) -> str:
    least, most = scaling.least_workers, scaling.most_workers
    return f"{most}" if least == most else f"{least} to {most}"


def _budget(settings: RunConfig, trial: DryRun) -> str:
    budget = settings.budget
    if budget.minutes is not None:
        return f"{budget.minutes:g} minutes, turned into samples by timing the first steps"
    samples = "" if trial.samples is None else f"{trial.samples:,} samples"
    epochs = "" if trial.epochs is None else f"{trial.epochs:.4g} epochs"
    return " = ".join(filter(None, (samples, epochs)))


def _schedule(settings: RunConfig) -> str:
    schedule, base = settings.schedule, settings.optim.lr
    begin = f"{schedule.warmup_share:.0%} of warm-up, " if schedule.warmup_share else ""
    match schedule.kind:
        case "constant":
            return f"{begin}{base:g} throughout"
        case "step":
            every = (
                f"every {schedule.step_epochs:g} epochs"
                if schedule.step_epochs
                else f"every {schedule.step_samples:,} samples"
                if schedule.step_samples
                else f"at {', '.join(f'{share:.0%}' for share in schedule.milestones)}"
            )
            return f"{begin}{base:g}, × {schedule.decay:g} {every}"
    return f"{begin}{schedule.kind} from {base:g} to {schedule.final_lr:g}"


def _shrunk(wanted: int, tried: int) -> str:
    return f"{tried}" if wanted == tried else f"{tried} of {wanted}"


def _remarks(settings: RunConfig, trial: DryRun) -> list[str]:
    """What the trial was not, a line each."""
    scaling = settings.scaling
    lines = []
    if any((s.patch_px, s.batch) != (s.tried_patch_px, s.tried_batch) for s in trial.stages):
        lines.append("Patches and batches were made smaller here; everything else is the run's.")
    if scaling.use_gpu and trial.device == "CPU":
        lines.append(f"There is no GPU here: the run asks for {_workers(scaling)}.")
    if scaling.most_workers > 1:
        lines.append(f"One process stood for the run's {_workers(scaling)} workers.")
    if scaling.micro_batch is None:
        lines.append("Where a worker's samples do not fit into one pass, the run takes more of them.")
    if scaling.compile:
        lines.append("The network was not compiled here, which takes minutes.")
    if trial.has_data:
        lines.append("The stores were checked: whole, and large enough for the patches.")
    else:
        lines.append(
            "No data were given: with --data STORE they are checked, and the budget is told in both units."
        )
    return lines
