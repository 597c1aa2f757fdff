"""The sample plan: the data of a run as a pure function of (seed, sample number).

Sample *i* (store, pair, patch corner, flips, seed of its degradation) follows from `(seed, i)` alone. So the
order is the same on any number of workers and readers, and resuming needs one number.

An epoch visits every store's pairs `weight` times. Its pairs are cut into segments of consecutive pairs; the
segments are shuffled, grouped into windows, and each window is shuffled as a whole. A remote store is thus
read in pieces, and nothing larger than a window is ever in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nafnet_core.blur import sample_rng
from nafnet_core.transforms import Box

if TYPE_CHECKING:
    from pipelines.blurring import FreshBlur

_WORDS_PER_SAMPLE = 4  # one Philox block: top, left, variant, degradation
_STREAM_PATCH, _STREAM_SEGMENTS, _STREAM_WINDOW, _STREAM_AUGMENTATION, _STREAM_BLUR = 1, 2, 3, 4, 5
SEGMENT_PAIRS, _FIRST_SEGMENTS = 256, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSamples:
    """What to read, one entry a sample."""

    sample: NDArray[np.int64]
    store: NDArray[np.int64]
    """Index into the mixture."""
    pair: NDArray[np.int64]
    top_share: NDArray[np.float64]
    left_share: NDArray[np.float64]
    """Patch corner, 0…1 of the room that the pair leaves."""
    variant: NDArray[np.int64]
    """Flips and quarter turns, 0…7; see `nafnet_core.transforms.dihedral`."""
    seed: NDArray[np.uint64]
    """Seed of what else is drawn for a sample: `drawn_augmentation`, `blur_rng`."""


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Plan of a whole run. Cheap to make, to copy to workers, and to ask at any sample."""

    seed: int
    store_pairs: tuple[int, ...]
    """Pairs in each store of the mixture."""
    weights: tuple[float, ...]
    """Passes over each store in one epoch."""
    window_pairs: int
    augment: bool = True
    cutblur: float = 0.0
    channel_shuffle: float = 0.0
    """Probabilities."""
    ramp: bool = False
    """Whether the first windows of all are small and grow, so that few shards need to be fetched to begin."""
    blurs: tuple[FreshBlur | None, ...] = ()
    """Of each store, blur to be made on the fly. Empty: none anywhere."""

    @property
    def epoch_samples(self) -> int:
        """Samples in one epoch of the mixture."""
        return sum(self._quotas())

    def samples(self, numbers: NDArray[np.int64]) -> PlannedSamples:
        """Plan the given sample numbers, in any order.

        Args:
            numbers: (N,) non-negative.
        """
        epochs, positions = np.divmod(numbers, self.epoch_samples)
        store, pair = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            store[here], pair[here] = self._pairs(int(epoch), positions[here])
        words = self._words(numbers)
        unit = (words[:, :2] >> np.uint64(11)) * 2.0**-53
        return PlannedSamples(
            sample=numbers,
            store=store,
            pair=pair,
            top_share=unit[:, 0],
            left_share=unit[:, 1],
            variant=(words[:, 2] % np.uint64(8) * np.uint64(self.augment)).astype(np.int64),
            seed=words[:, 3],
        )

    def _quotas(self) -> list[int]:
        return [
            max(1, round(pairs * weight))
            for pairs, weight in zip(self.store_pairs, self.weights, strict=True)
        ]

    def _words(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Four random words a sample, from a Philox counter that is the sample's number."""
        words = np.empty((len(numbers), _WORDS_PER_SAMPLE), np.uint64)
        # Runs of consecutive numbers are one call: the generator counts on by itself.
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        for start, stop in pairwise(sorted({0, *cuts, len(numbers)})):
            generator = np.random.Philox(key=[self.seed, _STREAM_PATCH], counter=int(numbers[start]))
            words[start:stop] = generator.random_raw((stop - start) * _WORDS_PER_SAMPLE).reshape(
                -1, _WORDS_PER_SAMPLE
            )
        return words

    def _pairs(self, epoch: int, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Store and pair at positions of one epoch."""
        segments, ends, window_of = _epoch_order(self, epoch)
        starts = ends - segments[:, 2]
        segment = np.searchsorted(ends, positions, side="right")
        shuffled = np.empty_like(positions)
        for window in np.unique(window_of[segment]):
            members = np.flatnonzero(window_of == window)
            first, last = starts[members[0]], ends[members[-1]]
            here = (positions >= first) & (positions < last)
            order = _window_order(self.seed, epoch, int(window), int(last - first))
            shuffled[here] = first + order[positions[here] - first]
        segment = np.searchsorted(ends, shuffled, side="right")
        store = segments[segment, 0]
        virtual = segments[segment, 1] + shuffled - starts[segment]
        # A store visited 0.4 times an epoch goes on where the last epoch left it.
        quotas = np.array(self._quotas())
        return store, (epoch * quotas[store] + virtual) % np.array(self.store_pairs)[store]


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What is done to one pair beside its flips and turns."""

    channels: int
    """Order of the channels, 0…5; see `nafnet_core.transforms.channel_order`."""
    sharp_box: Box | None
    """Part that CutBlur makes sharp, or leaves blurred; None for no CutBlur."""
    sharp_inside: bool


def drawn_augmentation(plan: SamplePlan, seed: int, patch_px: int) -> Augmentation:
    """Draw one sample's colour and CutBlur from its seed alone.

    CutBlur's box has sides of 0.7 ± 0.1 of the patch; its authors' code (clovaai/cutblur) takes 0.7 ± 0.01.
    """
    rng = sample_rng(seed, _STREAM_AUGMENTATION)
    shuffled, cut = rng.random(2) < (plan.channel_shuffle, plan.cutblur)
    channels = int(rng.integers(6)) if shuffled else 0
    if not cut:
        return Augmentation(channels=channels, sharp_box=None, sharp_inside=False)
    height, width = (
        int(side) for side in np.rint(patch_px * rng.normal(0.7, 0.1, 2).clip(0.1, 0.9)).clip(1, patch_px)
    )
    top, left = int(rng.integers(patch_px - height + 1)), int(rng.integers(patch_px - width + 1))
    return Augmentation(
        channels=channels, sharp_box=(top, left, height, width), sharp_inside=bool(rng.integers(2))
    )


def blur_rng(seed: int) -> np.random.Generator:
    """What one sample's blur is drawn from, by its seed alone."""
    return sample_rng(seed, _STREAM_BLUR)


def rank_slice(batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and stop of a rank's share of a global batch; shares differ by one at most."""
    return batch * rank // world_size, batch * (rank + 1) // world_size


@lru_cache(maxsize=4)
def _epoch_order(
    plan: SamplePlan, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Segments (store, start, length) in the epoch's order, their ends, and each one's window."""
    segments = np.array(
        [
            (store, start, min(SEGMENT_PAIRS, quota - start))
            for store, quota in enumerate(plan._quotas())
            for start in range(0, quota, SEGMENT_PAIRS)
        ],
        dtype=np.int64,
    )
    segments = segments[_generator(plan.seed, _STREAM_SEGMENTS, epoch).permutation(len(segments))]
    ends = segments[:, 2].cumsum()
    starts = ends - segments[:, 2]
    if not plan.ramp or epoch:
        return segments, ends, starts // plan.window_pairs
    doublings = max(0, (plan.window_pairs // (_FIRST_SEGMENTS * SEGMENT_PAIRS)).bit_length() - 1)
    small = _FIRST_SEGMENTS * SEGMENT_PAIRS * (2 ** np.arange(doublings + 1) - 1)
    window = np.searchsorted(small, starts, side="right") - 1
    rest = np.maximum(starts - small[-1], 0) // plan.window_pairs
    return segments, ends, window + rest


@lru_cache(maxsize=4)
def _window_order(seed: int, epoch: int, window: int, length: int) -> NDArray[np.int64]:
    return _generator(seed, _STREAM_WINDOW, epoch, window).permutation(length)


def _generator(seed: int, stream: int, epoch: int, window: int = 0) -> np.random.Generator:
    # The low word is the generator's own to count with.
    counter = [0, epoch, window, 0]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))
