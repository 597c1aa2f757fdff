"""Validation of a training run: whole images, the evaluation protocol, exact whoever shares in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nafnet_core.metrics import RunningMean
from nafnet_core.model import NAFNet
from nafnet_core.tiling import restore_image
from pipelines.pictures import before_after, scored_panels
from pipelines.scoring import ImageScore, score_image
from pipelines.store import PairStore


def chosen_images(num_pairs: int, max_images: int) -> list[int]:
    """Which images of a store are scored: up to `max_images`, spread evenly over it."""
    return sorted({int(index) for index in np.linspace(0, num_pairs - 1, min(max_images, num_pairs))})


def score_images(
    model: NAFNet,
    store: PairStore,
    indices: Sequence[int],
    *,
    train_patch_px: int,
    autocast: bool,
    picture: Path | None,
) -> list[ImageScore]:
    """Score `model` on some images of a store; the first is drawn before and after into `picture`."""
    was_training = model.training
    model.eval()
    scores = []
    for index in indices:
        pair = store.pair(index)
        restored = restore_image(
            model, pair.lq, train_patch_px=train_patch_px, autocast=autocast, tile_px=None
        )
        assert restored.dtype == np.uint8
        scores.append(score_image(pair.key, pair.scene, pair.lq, restored, pair.gt))
        if picture is not None and index == indices[0]:
            before_after(picture, scored_panels(scores[-1], pair, restored))
    model.train(was_training)
    return scores


def mean_scores(scores: Iterable[ImageScore], *, across_workers: bool) -> dict[str, float]:
    """`val/psnr_db`, `val/ssim` and `val/gain_db` (over the blurred input), means over images.

    Args:
        scores: of this process' images.
        across_workers: whether every process of the group has a share; all get the same means.
    """
    means = {name: RunningMean() for name in ("val/psnr_db", "val/ssim", "val/gain_db")}
    for score in scores:
        means["val/psnr_db"].update([score.psnr_restored_db])
        means["val/gain_db"].update([score.psnr_restored_db - score.psnr_blurred_db])
        if score.ssim_restored is not None:
            means["val/ssim"].update([score.ssim_restored])
    return {name: (mean.across_workers() if across_workers else mean).value for name, mean in means.items()}
