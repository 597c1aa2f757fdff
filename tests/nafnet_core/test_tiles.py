"""How tiles cover an image, and how they are run together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nafnet_core import restore_image
from nafnet_core.canvas import tiles
from tests.nafnet_core.networks import SMALL, lively_network, photo

TRAIN_PATCH_PX = 32


@pytest.mark.parametrize("tile_batch", [2, 3, 16])
@pytest.mark.parametrize(("height", "width"), [(200, 700), (211, 523)])
def test_batches_of_tiles_give_what_single_tiles_give(tile_batch: int, height: int, width: int) -> None:
    model = lively_network(SMALL)
    image = photo(height, width)
    done: list[tuple[int, int]] = []
    sizes: list[int] = []
    model.intro.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    single = restore_image(model, image, train_patch_px=TRAIN_PATCH_PX, tile_px=192)
    number = len(sizes)
    assert number > 3 and set(sizes) == {1}
    sizes.clear()
    batched = restore_image(
        model,
        image,
        train_patch_px=TRAIN_PATCH_PX,
        tile_px=192,
        tile_batch=tile_batch,
        on_tile=lambda num, total: done.append((num, total)),
    )
    assert 1 < max(sizes) <= tile_batch and sum(sizes) == number
    assert done == [(sum(sizes[: i + 1]), number) for i in range(len(sizes))]
    assert np.abs(batched.astype(int) - single).max() <= 1


def test_an_empty_batch_of_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="tile_batch must be at least 1, got 0"):
        restore_image(lively_network(SMALL), photo(64, 64), train_patch_px=16, tile_batch=0)


@settings(deadline=None, max_examples=150)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    tile_px=st.integers(4, 128),
    overlap_share=st.floats(0, 1),
    align_px=st.sampled_from([1, 2, 4, 16]),
)
def test_tiles_cover_the_image(
    height: int, width: int, tile_px: int, overlap_share: float, align_px: int
) -> None:
    overlap_px = int(overlap_share * ((tile_px - 1) // 2))
    align_px = min(align_px, 2 ** int(math.log2(tile_px - overlap_px)))
    covered = np.zeros((height, width), dtype=int)
    cover = list(tiles(height, width, tile_px, overlap_px, align_px))
    for tile in cover:
        assert tile.top % align_px == tile.left % align_px == 0
        assert 0 <= tile.top and tile.top + tile.height <= height
        assert 0 <= tile.left and tile.left + tile.width <= width
        assert 1 <= tile.height <= tile_px and 1 <= tile.width <= tile_px
        covered[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] += 1
    assert covered.min() >= 1
    assert len(set(cover)) == len(cover)
    for first, size in (("left", "width"), ("top", "height")):
        spans = sorted({(getattr(tile, first), getattr(tile, size)) for tile in cover})
        for (start, length), (next_start, _) in zip(spans, spans[1:], strict=False):
            assert start + length - next_start >= overlap_px


def test_tiles_by_hand() -> None:
    cover = [(tile.top, tile.left, tile.height, tile.width) for tile in tiles(100, 270, 128, 32, 16)]
    # 270 px in three pieces on a grid of 16: 79⅓ px apart, all as long as the longest of them needs to be.
    assert cover == [(0, 0, 100, 126), (0, 64, 100, 126), (0, 144, 100, 126)]
