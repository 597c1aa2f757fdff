"""Blur made on the fly: a store's sharp images are blurred anew for each sample, so that no pair comes twice.

A patch is cut from its photo with as much around it as its blur reaches: its edges look as in the middle of a
blurred photo. At the photo's own border, light is mirrored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nafnet_core.blur import Exposure, draw_degradation
from nafnet_core.kernels import Kernel
from nafnet_core.transforms import Box
from pipelines.config import BlurSection
from pipelines.store import PairStore
from pipelines.synth.kernels import digests, read_kernels


@dataclass(frozen=True, kw_only=True)
class FreshBlur:
    """The blur of one store, its measured kernels read: it travels with the plan, and needs no file."""

    section: BlurSection
    kernels: tuple[Kernel, ...] = field(default=(), compare=False, repr=False)
    kernels_digest: str = ""
    """Of the kernels as they are used; nothing where there are none."""

    @classmethod
    def of(cls, section: BlurSection) -> FreshBlur:
        """Read the kernels, if there are any; see `read_kernels` for what it raises."""
        if section.kernels is None:
            return cls(section=section)
        found = read_kernels(section.kernels)
        return cls(
            section=section,
            kernels=tuple(kernel.kernel for kernel in found),
            kernels_digest=hashlib.sha256("".join(digests(found).values()).encode()).hexdigest(),
        )

    def patch(
        self, store: PairStore, index: int, box: Box, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read one patch, and blur it.

        Args:
            store: where it is read.
            index: number of the pair.
            box: top, left, height and width of the patch, inside the pair.
            rng: this sample's own; everything is drawn from it.

        Returns:
            lq and gt, (H, W, 3) uint8 RGB; the same array twice where the sample stays sharp.

        Raises:
            InputError: the shard is missing or damaged.
        """
        section, share = self.section, rng.random()
        if share < section.sharp_share:
            (gt,) = store.windows(index, box, ("gt",))
            return gt, gt
        if share < section.sharp_share + section.own_share:
            lq, gt = store.windows(index, box)
            return lq, gt
        exposure = Exposure.drawn(
            draw_degradation(rng, **section.ranges()), store.size(index), rng, measured_kernels=self.kernels
        )
        needed = exposure.needed(box)
        (sharp,) = store.windows(index, needed, ("gt",))
        top, left = box[0] - needed[0], box[1] - needed[1]
        return exposure.part(sharp, box, rng), sharp[top : top + box[2], left : left + box[3]]
