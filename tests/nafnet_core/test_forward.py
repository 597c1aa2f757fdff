"""A GPU's recorded passes against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from nafnet_core import forward, local_stats
from nafnet_core.tiling import TileOptions, restore_images
from tests.nafnet_core.networks import SMALL, assert_network_acts, lively_network, photo, photo_nchw

pytestmark = pytest.mark.gpu


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    shapes: list[torch.Size] = []
    monkeypatch.setattr(forward, "_LAUNCHED_FIRST", 1)
    monkeypatch.setattr(forward, "_MOST_SHAPES", 4)
    record = forward.RecordedForward._record
    monkeypatch.setattr(
        forward.RecordedForward, "_record", lambda self, lq: (shapes.append(lq.shape), record(self, lq))[1]
    )
    yield shapes


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("train_patch_px", [None, 16])
def test_recorded_passes_restore_as_the_cpu_does(
    recordings: list[torch.Size], train_patch_px: int | None, ensemble: bool
) -> None:
    model = lively_network(SMALL)
    assert_network_acts(model, photo_nchw(40, 56))
    images = [photo(90, 130)[::step, ::step] for step in (1, -1, 1, -1)] + [photo(70, 70)]
    options = TileOptions(train_patch_px=train_patch_px, tile_px=None, ensemble=ensemble)
    expected = [result.restored for result in restore_images(model, images, options)]
    restored = [result.restored for result in restore_images(model.cuda(), images, options)]
    assert recordings
    for ours, theirs in zip(restored, expected, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_bf16_is_recorded_as_it_is_launched(recordings: list[torch.Size]) -> None:
    model = lively_network(SMALL).cuda()
    options = TileOptions(train_patch_px=16, tile_px=None, autocast=True)
    first, again, third = (result.restored for result in restore_images(model, [photo(90, 130)] * 3, options))
    assert len(recordings) == 1
    assert np.array_equal(first, again) and np.array_equal(first, third)


def test_a_graph_keeps_what_it_reads(recordings: list[torch.Size]) -> None:
    model = lively_network(SMALL).cuda()
    images = restore_images(model, [photo(90, 130)] * 4, TileOptions(train_patch_px=16, tile_px=None))
    first, second = next(images).restored, next(images).restored
    local_stats._band.cache_clear()
    junk = [torch.full((number,), 7.0, device="cuda") for number in range(1, 4000)]
    assert len(recordings) == 1 and len(junk) == 3999
    for restored in (second, *(result.restored for result in images)):
        assert np.abs(restored.astype(int) - first).max() <= 1


def test_more_shapes_than_are_kept(recordings: list[torch.Size]) -> None:
    model = lively_network(SMALL)
    images = [photo(40 + 8 * side, 64) for side in range(6)] * 3
    options = TileOptions(train_patch_px=16, tile_px=None)
    expected = [result.restored for result in restore_images(model, images, options)]
    restored = [result.restored for result in restore_images(model.cuda(), images, options)]
    assert len(recordings) == 6  # each in the second round; of the third, the first two were dropped
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(restored, expected, strict=True))
