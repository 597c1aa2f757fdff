from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nafnet_core import restore_image, strips
from nafnet_core.local_stats import local_statistics
from nafnet_core.strips import convolutions_in_bf16, forward_in_strips
from nafnet_core.tiling import TileOptions, restore_images
from tests.nafnet_core.networks import SMALL, lively_network, photo, photo_nchw


def test_images_are_restored_in_order_with_equal_tiles_of_neighbours_in_a_batch() -> None:
    model = lively_network(SMALL)
    sizes = [(60, 80), (60, 80), (60, 80), (90, 40), (60, 80), (150, 200)]
    images = [np.roll(photo(*size), 7 * index, axis=1) for index, size in enumerate(sizes)]
    alone = [restore_image(model, image, train_patch_px=16, tile_px=96, overlap_px=16) for image in images]
    batches: list[tuple[int, ...]] = []
    model.intro.register_forward_pre_hook(lambda _, args: batches.append(tuple(args[0].shape[::2])))
    options = TileOptions(train_patch_px=16, tile_px=96, overlap_px=16, tile_batch=4)
    results = list(restore_images(model, images, options))
    assert [number for number, _ in batches[:3]] == [3, 1, 1]  # three of one size, one turned, one
    assert sum(number for number, _ in batches) == sum(result.num_tiles for result in results)
    for result, expected in zip(results, alone, strict=True):
        assert np.abs(result.restored.astype(int) - expected).max() <= 1
    assert [result.tile_px for result in results[:5]] == [None] * 5 and results[5].tile_px is not None


def test_one_image_at_a_time_is_asked_for() -> None:
    model = lively_network(SMALL)
    asked = []

    def images() -> Iterator[NDArray[np.uint8]]:
        for number in range(3):
            asked.append(number)
            yield photo(32, 32)

    results = restore_images(model, images(), TileOptions(train_patch_px=None))
    assert asked == []
    next(results)
    assert asked == [0]
    assert len(list(results)) == 2


def test_ensemble_is_the_mean_over_the_symmetries_of_the_square() -> None:
    model = lively_network(SMALL)
    image = photo(48, 80)
    options = TileOptions(train_patch_px=16, ensemble=True)
    (result,) = restore_images(model, [image], options)
    lq = photo_nchw(48, 80)
    total = torch.zeros_like(lq)
    with torch.inference_mode(), local_statistics(model, 16):
        for turned, back in (
            (lambda x: x, lambda x: x),
            (lambda x: x.flip(2), lambda x: x.flip(2)),
            (lambda x: x.flip(3), lambda x: x.flip(3)),
            (lambda x: x.flip(2, 3), lambda x: x.flip(2, 3)),
            (lambda x: x.mT, lambda x: x.mT),
            (lambda x: x.mT.flip(2), lambda x: x.flip(2).mT),
            (lambda x: x.mT.flip(3), lambda x: x.flip(3).mT),
            (lambda x: x.mT.flip(2, 3), lambda x: x.flip(2, 3).mT),
        ):
            total += back(model(turned(lq).contiguous()))
    expected = (total / 8).clamp(0, 1).mul(255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(result.restored - expected).max() <= 1
    assert np.abs(result.restored - restore_image(model, image, train_patch_px=16).astype(int)).mean() > 0.5


@pytest.mark.parametrize("is_packed", [True, False])
def test_bf16_on_a_cpu_is_what_autocast_computes(monkeypatch: pytest.MonkeyPatch, is_packed: bool) -> None:
    can_be_packed = strips._PackedPointwise.is_supported()
    monkeypatch.setattr(strips._PackedPointwise, "is_supported", lambda: is_packed and can_be_packed)
    model = lively_network(SMALL)
    lq = photo_nchw(64, 72)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = forward_in_strips(model, lq)
    restored = forward_in_strips(convolutions_in_bf16(model), lq)
    assert torch.equal(restored, expected)
    assert not torch.equal(restored, forward_in_strips(model, lq))
    assert model.intro.weight.dtype == torch.float32, "the network itself is left as it is"
