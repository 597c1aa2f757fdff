"""Validation on cores or GPUs that training leaves free: it does not stand still for its scores.

Rank 0 puts a copy of the averaged weights into Ray's object store and has tasks score their share of the
images; means are exact, so they are those that the workers would have found.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from nafnet_core.model import NAFNet
from pipelines.config import RunConfig
from pipelines.scoring import ImageScore
from pipelines.store import PairStore
from pipelines.train.validation import chosen_images, mean_scores, score_images

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SpareRoom:
    """What validation may take of the cluster."""

    num_tasks: int
    num_cpus: float
    """Of each task."""
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class _Running:
    samples: int
    tasks: list[ray.ObjectRef[tuple[list[ImageScore], bytes | None]]]


class BesideValidation:
    """Scores of weights, taken by Ray tasks; see `trainer.Beside`."""

    def __init__(self, config: RunConfig, room: SpareRoom, run_dir: Path) -> None:
        assert config.data.val is not None
        self._room, self._pictures = room, run_dir / "pictures"
        self._options: dict[str, Any] = {
            "root": config.data.val,
            "train_patch_px": max(stage.patch_px for stage in config.stages),
            "autocast": config.precision == "bf16",
            "cache_gib": config.data.cache_gib,
        }
        self._indices = chosen_images(len(PairStore(config.data.val)), config.validation.max_images)
        self._task = ray.remote(num_cpus=room.num_cpus, num_gpus=room.num_gpus)(_score)
        self._running: list[_Running] = []

    def start(self, samples: int, weights: NAFNet) -> None:
        reference = ray.put(copy.deepcopy(weights).cpu())
        count = min(self._room.num_tasks, len(self._indices))
        tasks = [
            self._task.remote(reference, self._indices[part::count], draw=part == 0, **self._options)
            for part in range(count)
        ]
        self._running.append(_Running(samples=samples, tasks=tasks))

    def finished(self, *, wait: bool) -> list[tuple[int, dict[str, float] | None]]:
        done = []
        while self._running:
            first = self._running[0]
            ready, _ = ray.wait(first.tasks, num_returns=len(first.tasks), timeout=None if wait else 0)
            if len(ready) < len(first.tasks):
                break
            done.append((first.samples, self._collected(self._running.pop(0))))
        return done

    def _collected(self, running: _Running) -> dict[str, float] | None:
        try:
            parts = ray.get(running.tasks)
        except RayError as error:
            # Ray has tried again where a node was lost: what comes here is not worth a run.
            log.warning("no score at sample %d: %s", running.samples, str(error).strip().splitlines()[-1])
            return None
        picture = parts[0][1]
        if picture is not None:
            self._pictures.mkdir(exist_ok=True)
            (self._pictures / f"{running.samples:010d}.png").write_bytes(picture)
        return mean_scores((score for part, _ in parts for score in part), across_workers=False)


def _score(
    weights: NAFNet,
    indices: list[int],
    *,
    root: str,
    train_patch_px: int,
    autocast: bool,
    cache_gib: float,
    draw: bool,
) -> tuple[list[ImageScore], bytes | None]:
    """Scores of some images, and the picture of the first; a Ray task."""
    has_gpu = bool(ray.get_gpu_ids())
    if not has_gpu:
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    model = weights.to("cuda") if has_gpu else weights
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "first.png" if draw else None
        scores = score_images(
            model,
            PairStore(root, cache_gib=cache_gib),
            indices,
            train_patch_px=train_patch_px,
            autocast=autocast,
            picture=picture,
        )
        return scores, picture.read_bytes() if picture is not None else None
