"""Validation inside a training run: whole images, the evaluation protocol, shared by the workers, exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.distributed as dist

from nafnet_core.model import NAFNet
from nafnet_core.tiling import restore_image
from pipelines.pictures import before_after, scored_panels
from pipelines.scoring import ImageScore, score_image
from pipelines.store import PairStore


def validate(
    model: NAFNet,
    store_root: Path,
    *,
    train_patch_px: int,
    autocast: bool,
    max_images: int,
    rank: int,
    world_size: int,
    picture: Path | None,
) -> dict[str, float]:
    """Score `model` on up to `max_images`, spread evenly over the store; every rank gets the same means.

    Rank 0 draws the first image before and after into `picture`, if that is given.

    Returns:
        `val/psnr_db`, `val/ssim` and `val/gain_db` (over the blurred input), means over images.
    """
    store = PairStore(store_root)
    indices = np.unique(np.linspace(0, len(store) - 1, min(max_images, len(store))).astype(int))
    was_training = model.training
    model.eval()
    scores: list[ImageScore] = []
    for index in indices[rank::world_size]:
        pair = store.pair(int(index))
        restored = restore_image(
            model, pair.lq, train_patch_px=train_patch_px, autocast=autocast, tile_px=None
        )
        assert restored.dtype == np.uint8
        scores.append(score_image(pair.key, pair.scene, pair.lq, restored, pair.gt))
        if picture is not None and rank == 0 and index == indices[0]:
            before_after(picture, scored_panels(scores[-1], pair, restored))
    model.train(was_training)
    shares: list[list[ImageScore] | None] = [None] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, scores)
    else:
        shares = [scores]
    # Summed in the order of keys: the mean is the same to the last bit for any number of workers.
    every = sorted((score for share in shares for score in share or []), key=lambda score: score.key)
    ssims = [score.ssim_restored for score in every if score.ssim_restored is not None]
    return {
        "val/psnr_db": float(np.mean([score.psnr_restored_db for score in every])),
        "val/ssim": float(np.mean(ssims)) if ssims else float("nan"),
        "val/gain_db": float(np.mean([score.psnr_restored_db - score.psnr_blurred_db for score in every])),
    }
