"""What an adapter is, and how pairs are split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.images import read_rgb_u8


class EncodedImage(Protocol):
    """An image that is no file of its own."""

    def read_rgb_u8(self) -> NDArray[np.uint8]:
        """Decode to (H, W, 3) uint8 RGB. Raises `InputError`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRef:
    """One pair by its places. `scene` groups pairs that a split must not separate."""

    key: str
    scene: str
    lq: Path | EncodedImage
    gt: Path | EncodedImage

    def read(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Decode both, degraded and sharp, to (H, W, 3) uint8 RGB.

        Raises:
            InputError: one of them is missing or damaged, or they differ in size.
        """
        lq, gt = (
            read_rgb_u8(image) if isinstance(image, Path) else image.read_rgb_u8()
            for image in (self.lq, self.gt)
        )
        if lq.shape != gt.shape:
            raise InputError(
                "the two images differ in size",
                file=str(self.lq),
                expected=f"{gt.shape[1]}×{gt.shape[0]} as {self.gt}",
                got=f"{lq.shape[1]}×{lq.shape[0]}",
            )
        return lq, gt


class Source(Protocol):
    """What an adapter provides."""

    adapter: str
    licence: str

    def options(self) -> dict[str, Any]:
        """What the manifest records, as JSON values."""
        ...

    def pairs(self) -> list[PairRef]:
        """All pairs, sorted by key. Raises `InputError` where the layout is not as expected."""
        ...


def hold_out(refs: Sequence[PairRef], share: float, *, test: bool) -> list[PairRef]:
    """One side of a split by scene: `share` of the scenes, chosen by a hash of their names, are the test set.

    Raises:
        InputError: there are not two scenes to split.
    """
    scenes = sorted({ref.scene for ref in refs}, key=lambda s: hashlib.sha256(s.encode()).digest())
    if len(scenes) < 2:
        raise InputError("cannot hold out a part of one scene", expected="two scenes", got=scenes)
    held = set(scenes[: max(1, min(len(scenes) - 1, math.ceil(share * len(scenes))))])
    return [ref for ref in refs if (ref.scene in held) == test]


def checked(refs: Sequence[PairRef], *, file: Path) -> list[PairRef]:
    """`refs` sorted by key, once all their files are there and no key comes twice.

    Raises:
        InputError: the first few missing files, or a key of two pairs.
    """
    paths = [path for ref in refs for path in (ref.lq, ref.gt) if isinstance(path, Path)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} images are listed and not there",
            file=file,
            got=", ".join(str(path) for path in missing[:3]),
            fix="Complete the data set, or take them off the list",
        )
    seen: set[str] = set()
    for ref in refs:
        if ref.key in seen:
            raise InputError("two pairs of one name", file=file, got=ref.key)
        seen.add(ref.key)
    return sorted(refs, key=lambda ref: ref.key)
