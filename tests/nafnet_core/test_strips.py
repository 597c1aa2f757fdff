from __future__ import annotations

import pytest
import torch

from nafnet_core import NAFNetConfig, strips
from nafnet_core.local_stats import local_statistics
from nafnet_core.strips import forward_in_strips
from tests.nafnet_core.networks import (
    DEEP,
    HOLLOW,
    SMALL,
    assert_network_acts,
    lively_network,
    photo_nchw,
    reference_of,
)

SIZES = [(64, 64), (50, 70), (127, 129), (1, 1), (9, 200), (200, 9)]


@pytest.fixture(params=[1, 20_000, strips._STRIP_BYTES], ids=["short", "middling", "whole"])
def strip_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Strips of the fewest rows, of some, and one for the whole map."""
    monkeypatch.setattr(strips, "_STRIP_BYTES", request.param)
    return request.param


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("train_patch_px", [None, 16, 32])
@pytest.mark.parametrize("config", [SMALL, DEEP, HOLLOW], ids=["small", "deep", "hollow"])
def test_strips_give_the_references_pixels(
    strip_bytes: int, config: NAFNetConfig, train_patch_px: int | None, height: int, width: int
) -> None:
    model = lively_network(config)
    assert_network_acts(model, photo_nchw(64, 64))
    lq = photo_nchw(height, width)
    reference = reference_of(model)
    if train_patch_px is not None:
        reference.localize(train_patch_px)
    with torch.no_grad(), local_statistics(model, train_patch_px):
        torch.testing.assert_close(forward_in_strips(model, lq), reference(lq), rtol=0, atol=1e-5)


def test_several_images_and_an_untouched_input(strip_bytes: int) -> None:
    model = lively_network(SMALL)
    lq = torch.cat([photo_nchw(50, 70), photo_nchw(50, 70).flip(3)])
    before = lq.clone()
    with torch.no_grad(), local_statistics(model, 20):
        restored = forward_in_strips(model, lq)
        torch.testing.assert_close(restored, model(lq), rtol=0, atol=1e-5)
    assert torch.equal(lq, before)


def test_bf16_is_as_near_as_the_networks_own(strip_bytes: int) -> None:
    model = lively_network(SMALL)
    lq = photo_nchw(90, 110)
    with torch.no_grad(), local_statistics(model, 20):
        exact = model(lq)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own, ours = model(lq), forward_in_strips(model, lq)
    assert ours.dtype == own.dtype
    assert 0 < (ours - exact).abs().mean() < 1.5 * (own - exact).abs().mean()
