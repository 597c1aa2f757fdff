"""What can be known before any time is spent: a run's numbers, its data, its name, the cluster's room."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nafnet_core import CapabilityError, InputError
from pipelines.checkpoint import CheckpointLedger
from pipelines.config import RunConfig
from pipelines.ingest import check_blur, check_patches, data_digests, plan_for
from pipelines.scenes import shared_scenes
from pipelines.store import check_files, read_manifest, refuse_sharp_only
from pipelines.tracking import TRACKING, flattened
from pipelines.train.files import CONFIG, METRICS
from pipelines.train.room import cpus_a_worker
from pipelines.train.trainer import build_loss, build_model

if TYPE_CHECKING:
    from pipelines.train.beside import SpareRoom

log = logging.getLogger(__name__)

# What may change between two attempts at one run without making it another run.
FREE_SECTIONS = {"scaling", "checkpoint", "tracking"}
_INIT_SHA256 = "model.init_sha256"
_SHOWN_KEYS, _SHOWN_DIGITS = 4, 12


def check(config: RunConfig) -> None:
    """Everything that can be known before any time is spent. Raises `InputError`."""
    if not config.data.train:
        raise InputError(
            "no training data", fix="Name a store with --data STORE, or in the recipe's data.train"
        )
    check_numbers(config)
    check_data(config)


def check_numbers(config: RunConfig) -> None:
    """What a recipe says by itself: its network, its loss, its patches. Raises `InputError`."""
    model = build_model(config.model)
    loss = build_loss(config, torch.device("cpu"))
    for stage in config.stages:
        if stage.patch_px % model.config.stride_px:
            raise InputError(
                "the patch does not fit the network",
                expected=f"a multiple of {model.config.stride_px} px",
                got=f"{stage.patch_px} px",
                fix="Change stages.*.patch_px",
            )
    smallest = torch.zeros(1, 3, *[min(stage.patch_px for stage in config.stages)] * 2)
    try:
        loss(smallest, smallest)
    except ValueError as error:
        raise InputError(
            "the patch does not fit the loss", got=error, fix="Change stages.*.patch_px"
        ) from error


def check_data(config: RunConfig) -> None:
    """That the stores are whole, and have what the recipe asks of them. Raises `InputError`."""
    check_blur(config.data)
    if config.data.train:
        plan_for(config.data, seed=config.seed)  # reads measured kernels
    for stage in config.stages:
        check_patches(config.data, stage.patch_px)
    for store in config.data.train:
        check_files(store.path)
    if config.data.val is not None:
        manifest = read_manifest(config.data.val)
        fix = "Validate on pairs, as `nafnet synth` makes them"
        refuse_sharp_only(config.data.val, manifest, fix=fix)
        if not manifest.num_pairs:
            raise InputError("a validation store without pairs", file=config.data.val, fix=fix)
        check_files(config.data.val)


def check_precision(config: RunConfig, device: torch.device) -> None:
    """Raise `CapabilityError` where a GPU has not the precision: CUDA then emulates it, at a crawl."""
    if config.precision != "bf16" or device.type != "cuda":
        return
    with torch.cuda.device(device):
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise CapabilityError(
                "this GPU has no bf16", got=torch.cuda.get_device_name(device), fix="Set precision=fp32"
            )


def warn(config: RunConfig) -> None:
    """Log what is allowed, and hardly meant."""
    slices = [-(-stage.batch // config.scaling.most_workers) for stage in config.stages]
    if (config.scaling.micro_batch or 0) > max(slices):
        log.warning(
            "scaling.micro_batch=%d is more than a worker's slice of the batch, %d samples: it does nothing",
            config.scaling.micro_batch, max(slices),
        )  # fmt: skip
    if config.data.val is not None:
        _warn_of_validation(config, config.data.val)


def _warn_of_validation(config: RunConfig, place: str) -> None:
    val = read_manifest(place)
    for store in config.data.train:
        if val.digest == read_manifest(store.path).digest:
            log.warning("validation on the training data: its score says nothing of other photos")
            continue
        num_shared, first = shared_scenes(place, store.path)
        if num_shared:
            log.warning(
                "%d of the %d scenes of the validation have the names of scenes in %s (the first: %r): if "
                "they are the same, its score says little of others. Part a folder with `prepare --holdout`",
                num_shared, val.num_scenes, store.path, first,
            )  # fmt: skip
    if val.crop_px is not None:
        log.warning(
            "validation on crops of %d px: scores are usually of whole images (`prepare --crop 0`)",
            val.crop_px,
        )


def claim(config: RunConfig, run_dir: Path) -> None:
    """Refuse to go on with a run of this name that was started with other values, or on other data.

    One that never came to its first step has nothing to protect, and makes room.

    Raises:
        InputError: the first few values, or digests of the data, are named.
    """
    path = run_dir / CONFIG
    if not path.exists():
        return
    if not (run_dir / METRICS).exists():
        for leftover in (path, run_dir / TRACKING):
            leftover.unlink(missing_ok=True)
        return
    earlier = flattened(json.loads(path.read_text()))
    now = flattened(config.model_dump(mode="json"))
    if now.get(_INIT_SHA256) is None:  # filled in when the run began
        now[_INIT_SHA256] = earlier.get(_INIT_SHA256)
    changed = [
        key
        for key in sorted(now.keys() | earlier.keys())
        if key.partition(".")[0] not in FREE_SECTIONS and now.get(key) != earlier.get(key)
    ]
    if changed:
        raise differing("run", path, earlier, now, changed)
    _refuse_other_data(config, run_dir)


def differing(
    what: str, file: Path, was: Mapping[str, Any], now: Mapping[str, Any], changed: Sequence[str]
) -> InputError:
    """That a run or search of this name has other values; the first few are named."""
    shown = changed[:_SHOWN_KEYS]
    return InputError(
        f"a {what} of this name was started with other values",
        file=file,
        expected=", ".join(f"{key}={was.get(key)}" for key in shown),
        got=", ".join(f"{key}={now.get(key)}" for key in shown),
        fix=f"Give the new {what} another name with --name",
    )


def _refuse_other_data(config: RunConfig, run_dir: Path) -> None:
    """The workers would refuse as well, after all of them have been started."""
    ledger = CheckpointLedger(run_dir)
    entries = ledger.entries()
    state = ledger.folder / entries[-1].folder / "state.json" if entries else None
    if state is None or not state.is_file():
        return
    try:
        trained_on = json.loads(state.read_text())["digests"]
    except (ValueError, KeyError):  # damaged: resuming goes back to the one before, and says so
        return
    given = data_digests(config.data, plan_for(config.data, seed=config.seed))
    if trained_on != given:
        raise InputError(
            "this run was trained on other data",
            file=run_dir,
            expected=[digest[:_SHOWN_DIGITS] for digest in trained_on],
            got=[digest[:_SHOWN_DIGITS] for digest in given],
            fix="Give the same stores, or another --name for a new run",
        )


def check_resources(config: RunConfig) -> None:
    """Training workers and readers must fit together, or the readers starve and nothing ever starts."""
    import ray

    have = ray.cluster_resources()
    scaling = config.scaling
    num_workers = scaling.least_workers
    cpus = num_workers * cpus_a_worker(scaling)
    if scaling.use_gpu and num_workers > have.get("GPU", 0):
        raise CapabilityError(
            "not enough GPUs", expected=num_workers, got=int(have.get("GPU", 0)),
            fix="Set scaling.use_gpu=false, or take a machine with GPUs"
            if not have.get("GPU")
            else "Lower scaling.num_workers",
        )  # fmt: skip
    if not scaling.use_gpu and have.get("GPU"):
        log.warning("%d GPUs are here and not used: --set scaling.use_gpu=true", have["GPU"])
    log.info(
        "CPU budget: %d workers of %g and their %d readers of %g make %g of %g",
        num_workers, scaling.cpus_per_worker, num_workers * scaling.readers_per_worker,
        scaling.reader_cpus, cpus, have.get("CPU", 0),
    )  # fmt: skip
    if cpus > have.get("CPU", 0) + 1e-6:
        raise CapabilityError(
            "not enough CPUs for the training workers and their readers",
            expected=f"{cpus:g}",
            got=f"{have.get('CPU', 0):g}",
            fix="Lower scaling.num_workers, scaling.cpus_per_worker or scaling.reader_cpus",
        )


def spare_room(config: RunConfig) -> SpareRoom | None:
    """What the cluster has beyond a run's workers and readers, for validation beside it.

    Raises:
        CapabilityError: there is none, and the recipe demands it.
    """
    import ray

    from pipelines.train.beside import SpareRoom

    wanted = config.validation.beside
    if config.data.val is None or not config.validation.shares or wanted is False:
        return None
    have, scaling = ray.cluster_resources(), config.scaling
    cpus = have.get("CPU", 0) - scaling.most_workers * cpus_a_worker(scaling)
    num_tasks = int(cpus)
    if scaling.use_gpu:
        num_tasks = min(num_tasks, int(have.get("GPU", 0)) - scaling.most_workers)
    if num_tasks < 1:
        if wanted:
            raise CapabilityError(
                "no room for validation beside the training",
                expected="a GPU and a core more" if scaling.use_gpu else "a core more",
                got=f"{cpus:g} cores left over",
                fix="Lower scaling.num_workers, or leave validation.beside out",
            )
        return None
    return SpareRoom(num_tasks=num_tasks, num_cpus=1, num_gpus=1 if scaling.use_gpu else 0)
