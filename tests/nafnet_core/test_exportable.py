from __future__ import annotations

import pytest
import torch

from nafnet_core import NAFNetConfig
from nafnet_core.exportable import Exportable
from nafnet_core.local_stats import local_statistics
from nafnet_core.pruning import keep_share, magnitudes, prune
from nafnet_core.tiling import restore_image
from tests.nafnet_core.networks import (
    DEEP,
    HOLLOW,
    SMALL,
    assert_network_acts,
    lively_network,
    photo,
    photo_nchw,
)

_SIZES = [(64, 48), (37, 53), (1, 1), (5, 130), (200, 17)]


@pytest.mark.parametrize("config", [SMALL, DEEP, HOLLOW], ids=["small", "deep", "hollow"])
@pytest.mark.parametrize("train_patch_px", [None, 16, 33, 400])
def test_the_graph_computes_what_the_network_does(config: NAFNetConfig, train_patch_px: int | None) -> None:
    model = lively_network(config)
    form = Exportable(model, train_patch_px=train_patch_px)
    assert_network_acts(model, photo_nchw(64, 48))
    for size in _SIZES:
        lq = photo_nchw(*size)
        of_one_size = Exportable(model, train_patch_px=train_patch_px, size_px=size)
        with torch.no_grad(), local_statistics(model, train_patch_px):
            expected = model(lq)
            torch.testing.assert_close(form(lq), expected, atol=5e-6, rtol=0)
            torch.testing.assert_close(of_one_size(lq), expected, atol=5e-6, rtol=0)


def test_local_statistics_are_not_the_global_ones() -> None:
    model, lq = lively_network(SMALL), photo_nchw(96, 96)
    with torch.no_grad():
        local, plain = (Exportable(model, train_patch_px=patch)(lq) for patch in (16, None))
    assert (local - plain).abs().max() > 1e-2


def test_a_pruned_network_too() -> None:
    model = lively_network(SMALL)
    pruned = prune(model, keep_share(magnitudes(model), 0.6, multiple=1))
    lq = photo_nchw(41, 66)
    with torch.no_grad():
        torch.testing.assert_close(Exportable(pruned, train_patch_px=None)(lq), pruned(lq), atol=5e-6, rtol=0)


@pytest.mark.parametrize("size", [(64, 48), (37, 53), (1, 1), (9, 130)])
def test_bytes_are_restored_as_images_are(size: tuple[int, int]) -> None:
    model = lively_network(SMALL)
    image = photo(*size)
    with torch.no_grad():
        restored = Exportable(model, train_patch_px=32, takes_bytes=True)(torch.from_numpy(image)[None])
    expected = torch.from_numpy(restore_image(model, image, train_patch_px=32, tile_px=None))
    assert restored.dtype == torch.uint8
    # A value close to a half may be rounded to either side.
    assert (restored[0].int() - expected.int()).abs().max() <= 1
    assert (restored[0] != expected).float().mean() < 1e-3


def test_weights_are_copies() -> None:
    model, lq = lively_network(SMALL), photo_nchw(32, 32)
    form = Exportable(model, train_patch_px=None)
    with torch.no_grad():
        before = form(lq)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(form(lq), before)
