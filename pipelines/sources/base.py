"""What an adapter is, and how pairs are split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nafnet_core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRef:
    """One pair by its paths. `scene` groups pairs that a split must not separate."""

    key: str
    scene: str
    lq: Path
    gt: Path


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
    missing = [path for ref in refs for path in (ref.lq, ref.gt) if not path.is_file()]
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
