"""bf16 against fp32 with weights that have learnt something: on a fresh network there is nothing to lose."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nafnet_core import PRESETS, NAFNet, randomize_residual_scales, restore_image
from nafnet_core.blur import Degradation, degrade, sample_rng
from nafnet_core.losses import psnr_loss
from nafnet_core.metrics import psnr
from tests.nafnet_core.networks import photo

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
_PATCH_PX = 128


def gopro_pair() -> Pair:
    """A real pair, of the images that NAFNET_DATA names."""
    folder = Path(os.environ.get("NAFNET_DATA", "")) / "gopro/GOPRO_Large/train/GOPR0372_07_00"
    if "NAFNET_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("NAFNET_DATA names no GoPro pairs")
    name = sorted(path.name for path in (folder / "blur").iterdir())[0]
    lq, gt = (cv2.imread(str(folder / side / name))[..., ::-1].copy() for side in ("blur", "sharp"))
    return lq, gt


def made_pair() -> Pair:
    gt = photo(512, 512)
    degradation = Degradation(kind="shake", size_px=9.0, shot_noise=0.0, read_noise=0.001, highlight_gain=1.0)
    return degrade(gt, degradation, sample_rng(0, 1)), gt


def trained_on(pair: Pair, *, steps: int) -> NAFNet:
    """`mobile`, fitted to patches of one pair: that it would be of no use on another does not matter here."""
    torch.manual_seed(0)
    model = NAFNet(PRESETS["mobile"]).train()
    randomize_residual_scales(model, seed=0, scale=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.9), fused=True)
    lq, gt = (torch.from_numpy(image).permute(2, 0, 1) / 255 for image in pair)
    rng = np.random.default_rng(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        corners = rng.integers(0, np.array(lq.shape[1:]) - _PATCH_PX + 1, (4, 2))
        restored = model(_patches(lq, corners))
        psnr_loss(restored, _patches(gt, corners)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _patches(image: Tensor, corners: NDArray[np.int64]) -> Tensor:
    return torch.stack([image[:, y : y + _PATCH_PX, x : x + _PATCH_PX] for y, x in corners.tolist()])


def psnr_db(image: NDArray[np.uint8], gt: NDArray[np.uint8]) -> float:
    batches = (torch.from_numpy(each).permute(2, 0, 1)[None] for each in (image, gt))
    return float(psnr(*batches, data_range=255))


@pytest.mark.slow
@pytest.mark.parametrize("make_pair", [gopro_pair, made_pair])
def test_bf16_scores_as_fp32_does(make_pair: Callable[[], Pair]) -> None:
    lq, gt = make_pair()
    model = trained_on((lq, gt), steps=300)
    for tile_px in (None, 384):
        fp32, bf16 = (
            restore_image(model, lq, train_patch_px=_PATCH_PX, tile_px=tile_px, autocast=autocast)
            for autocast in (False, True)
        )
        assert psnr_db(fp32, gt) > psnr_db(lq, gt) + 0.3
        assert psnr_db(bf16, gt) == pytest.approx(psnr_db(fp32, gt), abs=0.02)
        assert not np.array_equal(fp32, bf16)
