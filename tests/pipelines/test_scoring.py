from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nafnet_core.metrics import SSIM_WINDOW_PX
from pipelines.scoring import ImageScore, Protocol, score_image
from tests.pipelines.pairs import blurred, piece


def score(lq: NDArray[np.uint8], restored: NDArray[np.uint8], gt: NDArray[np.uint8]) -> ImageScore:
    return score_image("key", "scene", lq, restored, gt)


def ssim_of_skimage(image: NDArray[np.uint8], gt: NDArray[np.uint8]) -> float:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, full = structural_similarity(gt, image, data_range=255, channel_axis=2, full=True, **options)
    # Averaged where the window fits, as in Wang 2004.
    edge = SSIM_WINDOW_PX // 2
    return float(full[edge:-edge, edge:-edge].mean())


@pytest.mark.parametrize(("height", "width"), [(72, 96), (96, 72), (11, 11), (13, 40)])
def test_scores_are_those_of_skimage(height: int, width: int) -> None:
    gt = piece(0, height, width)
    lq = blurred(gt)
    restored = np.clip(gt.astype(int) + np.random.default_rng(0).integers(-4, 5, gt.shape), 0, 255)
    restored = restored.astype(np.uint8)
    result = score(lq, restored, gt)
    assert result.psnr_blurred_db == pytest.approx(peak_signal_noise_ratio(gt, lq, data_range=255), abs=1e-4)
    assert result.psnr_restored_db == pytest.approx(
        peak_signal_noise_ratio(gt, restored, data_range=255), abs=1e-4
    )
    assert result.psnr_restored_db > result.psnr_blurred_db
    assert result.ssim_blurred == pytest.approx(ssim_of_skimage(lq, gt), abs=1e-4)
    assert result.ssim_restored == pytest.approx(ssim_of_skimage(restored, gt), abs=1e-4)
    assert (result.key, result.scene) == ("key", "scene")
    assert (result.height_px, result.width_px) == (height, width)


def test_equal_images_count_as_120_db() -> None:
    # Infinity would make the mean over a store infinite, and is no JSON.
    gt = piece(0)
    result = score(blurred(gt), gt, gt)
    assert result.psnr_restored_db == 120.0
    assert result.ssim_restored == pytest.approx(1)
    assert result.psnr_blurred_db < 60
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["psnr_restored_db"] == 120.0


def test_the_worst_is_0_db() -> None:
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert score(black, black, white).psnr_restored_db == pytest.approx(0, abs=1e-6)


def test_one_level_in_one_value() -> None:
    gt = piece(0, 72, 96)
    restored = gt.copy()
    restored[0, 0, 0] ^= 1
    expected = 10 * np.log10(255**2 * gt.size)
    assert score(gt, restored, gt).psnr_restored_db == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (1, 1)])
def test_image_smaller_than_the_window_has_no_ssim(height: int, width: int) -> None:
    gt = piece(0, height, width)
    result = score(255 - gt, gt, gt)
    assert result.ssim_blurred is None and result.ssim_restored is None
    assert result.psnr_restored_db == 120.0


def test_views_are_scored_as_their_copies() -> None:
    # A flipped image is a view with negative strides, which torch refuses.
    gt, lq = piece(0), blurred(piece(0))
    views = [image[:, ::-1] for image in (lq, lq, gt)]
    assert score(*views) == score(*(np.ascontiguousarray(view) for view in views))


def test_protocols_compare() -> None:
    protocol = Protocol()
    assert protocol.difference(Protocol()) is None
    assert Protocol(tile_px=512).difference(protocol) == "tile_px 512 ≠ None"
    assert protocol.difference(Protocol(precision="bf16", version=9)) == f"version {protocol.version} ≠ 9"
    # A report of another version may know more: that is no report of ours.
    with pytest.raises(ValidationError):
        Protocol.model_validate({**protocol.model_dump(), "unknown": 1})
    assert Protocol.model_validate(json.loads(protocol.model_dump_json())) == protocol
