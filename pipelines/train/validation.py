"""Validation inside a training run: whole images, the evaluation protocol, shared by the workers, exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nafnet_core.metrics import RunningMean
from nafnet_core.model import NAFNet
from nafnet_core.tiling import restore_image
from pipelines.pictures import before_after, scored_panels
from pipelines.scoring import score_image
from pipelines.store import PairStore


def validate(
    model: NAFNet,
    store_root: Path | str,
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
    means = {name: RunningMean() for name in ("val/psnr_db", "val/ssim", "val/gain_db")}
    for index in indices[rank::world_size]:
        pair = store.pair(int(index))
        restored = restore_image(
            model, pair.lq, train_patch_px=train_patch_px, autocast=autocast, tile_px=None
        )
        assert restored.dtype == np.uint8
        score = score_image(pair.key, pair.scene, pair.lq, restored, pair.gt)
        means["val/psnr_db"].update([score.psnr_restored_db])
        means["val/gain_db"].update([score.psnr_restored_db - score.psnr_blurred_db])
        if score.ssim_restored is not None:
            means["val/ssim"].update([score.ssim_restored])
        if picture is not None and rank == 0 and index == indices[0]:
            before_after(picture, scored_panels(score, pair, restored))
    model.train(was_training)
    return {name: mean.across_workers().value for name, mean in means.items()}
