"""Patches of a store to look at a network with: the same ones for the same store and seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nafnet_core import InputError
from pipelines.store import PairStore, refuse_sharp_only

Image = NDArray[np.uint8]
_MAKE_PAIRS = "Make pairs of the photos with `nafnet synth`, and prepare these"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Patches from all over a store."""

    store: PairStore
    pairs: range
    """Which pairs of it."""
    num_patches: int = 64
    patch_px: int = 128
    """Side; smaller where a pair is."""
    seed: int = 0

    @classmethod
    def on(cls, place: str, *, num_patches: int, patch_px: int) -> Calibration:
        """Open a store.

        Raises:
            InputError: there is none, or it has no pairs.
        """
        store = PairStore(place)
        refuse_sharp_only(place, store.manifest, fix=_MAKE_PAIRS)
        if not len(store):
            raise InputError("no pairs in this store", file=place)
        return cls(store=store, pairs=range(len(store)), num_patches=num_patches, patch_px=patch_px)

    def split(self) -> tuple[Calibration, Calibration | None]:
        """Two thirds of the pairs, and half as many patches of the others: neighbours are crops of one photo.

        The cut is between two scenes where there are several. None of fewer than three pairs.
        """
        if len(self.pairs) < 3:
            return self, None
        number = self._before_a_scene(len(self.pairs) * 2 // 3)
        others = replace(self, pairs=self.pairs[number:], num_patches=max(1, self.num_patches // 2))
        return replace(self, pairs=self.pairs[:number]), others

    def _before_a_scene(self, number: int) -> int:
        """The place closest to `number` where a scene begins; `number` itself where all are of one."""
        scenes = [self.store.scene(index) for index in self.pairs]
        begins = [place for place in range(1, len(scenes)) if scenes[place] != scenes[place - 1]]
        return min(begins, key=lambda place: abs(place - number), default=number)

    def images(self) -> Iterator[tuple[Image, Image]]:
        """Blurred and sharp, (P, P, 3) uint8 RGB each, of pairs evenly spread.

        Raises:
            InputError: a shard is missing or damaged.
        """
        rng = np.random.default_rng(self.seed)
        for number in range(self.num_patches):
            index = self.pairs[number * len(self.pairs) // self.num_patches]
            side = min(self.patch_px, *self.store.size(index))
            yield self.store.patch(index, rng.random(), rng.random(), side)

    def patches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same as (1, 3, P, P) fp32 in 0…1 each."""
        for lq, gt in self.images():
            yield _as_tensor(lq), _as_tensor(gt)


def _as_tensor(patch_hwc_u8: Image) -> Tensor:
    return torch.from_numpy(patch_hwc_u8).permute(2, 0, 1)[None].float() / 255
