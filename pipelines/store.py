"""PairStore: blurred/sharp pairs in shards, described by a manifest that is written last.

    STORE/manifest.json            schema below
    STORE/shard-00000.parquet      one row group a pair, so that one pair is one read; codec png
    STORE/shard-00000.lmdb         memory-mapped; codec png or raw: raw lets a reader touch only its patch
    STORE/quarantine.jsonl         what was refused, and why
    STORE/suspects.jsonl           what was taken and looks wrong: hardly a pair, misaligned, identical
    STORE/scenes.txt               names of its scenes, see `pipelines/scenes.py`

A store of sharp photos alone (`sides` is `gt`) holds each once: training blurs them anew every time.

The manifest's `digest` is taken over keys and *decoded* pixels in order, so the same pairs have the same
digest whatever the format, codec and shard size: it names the data in runs and reports.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nafnet_core import InputError
from nafnet_core.transforms import Box
from pipelines.files import sha256
from pipelines.shard_cache import DEFAULT_CACHE_GIB, DamagedShardError, node_cache
from pipelines.shards import SIDES, Codec, Format, Pair, Shard, Side, Sides, open_shard, shard_errors
from pipelines.storage import LocalFolder, folder, is_url

SCHEMA_VERSION = 1
MANIFEST, QUARANTINE, SUSPECTS, SCENES = "manifest.json", "quarantine.jsonl", "suspects.jsonl", "scenes.txt"
_MOST_OPEN = 512  # a process may often have 1,024 files open
PROGRESS = ".progress"  # notes of `prepare`, while it is at it


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardInfo(_Record):
    """One shard, as the manifest lists it."""

    # Names in the cache are made of these: a stranger's manifest must not reach other folders.
    file: str = Field(pattern=r"^[^/\\]+$")
    pairs: int
    bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Record):
    """What a store holds."""

    schema_version: int
    name: str
    split: str
    adapter: str
    adapter_options: dict[str, Any]
    format: Format
    codec: Codec
    color: Literal["RGB"] = "RGB"
    sides: Sides = SIDES
    """What is kept of each pair: both images, as in stores older than this field, or `gt` alone."""
    crop_px: int | None
    """Side of the square crops; None where whole images are kept."""
    stride_px: int | None
    min_remainder_px: int | None = None
    """A remainder of up to this was dropped; None of whole images, and in stores older than this field."""
    num_pairs: int
    num_refused: int
    num_suspect: int = 0
    """Source pairs in suspects.jsonl. This and the next: 0 in stores older than these lists."""
    num_scenes: int = 0
    min_side_px: int
    """Shortest side of any pair: patches cannot be larger."""
    shards: tuple[ShardInfo, ...]
    digest: str
    licence: str

    @property
    def is_sharp_only(self) -> bool:
        """Whether there are no blurred images in it."""
        return "lq" not in self.sides


def digest_of(pair_digests: bytes | bytearray) -> str:
    """Digest of a data set from its pairs' digests, one after the other in order."""
    return hashlib.sha256(pair_digests).hexdigest()


def shard_info(path: Path, num_pairs: int) -> ShardInfo:
    """Manifest entry of a finished shard file."""
    return ShardInfo(file=path.name, pairs=num_pairs, bytes=path.stat().st_size, sha256=sha256(path))


class PairStore:
    """A store opened for reading. Shards are opened on first use, and the last used ones kept open."""

    def __init__(self, root: str | Path, *, cache_gib: float = DEFAULT_CACHE_GIB) -> None:
        """Read the manifest only.

        Args:
            root: folder or URL.
            cache_gib: bound of this node's cache, where shards of a URL are kept.

        Raises:
            InputError: no store there, an unfinished one, or one of another schema version.
        """
        self.root = root if is_url(root) else Path(root)
        self.manifest = read_manifest(root)
        self._cache = node_cache(cache_gib)
        self._ends = list(accumulate(shard.pairs for shard in self.manifest.shards))
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.num_pairs

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def pair(self, index: int) -> Pair:
        """Read one whole pair; of a store of sharp photos, each with itself.

        Raises:
            InputError: the shard is missing or damaged.
        """
        shard, row = self.locate(index)
        with shard_errors(shard.path):
            return shard.pair(row)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a pair, without reading its pixels."""
        shard, row = self.locate(index)
        return shard.rows[row].height_px, shard.rows[row].width_px

    def windows(self, index: int, box: Box, sides: Sequence[Side] | None = None) -> list[NDArray[np.uint8]]:
        """Read a window of some sides of a pair.

        Args:
            index: number of the pair.
            box: top, left, height and width of the window, inside the pair.
            sides: which ones, of those that are kept; None: all of these.

        Returns:
            (H, W, 3) uint8 RGB each, as copies.

        Raises:
            InputError: the shard is missing or damaged.
        """
        shard, row = self.locate(index)
        top, left, height, width = box
        window = (slice(top, top + height), slice(left, left + width))
        with shard_errors(shard.path):
            return shard.windows(row, window, sides or self.manifest.sides)

    def patch(
        self, index: int, top_share: float, left_share: float, patch_px: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read one square patch of both images.

        Args:
            index: number of the pair.
            top_share, left_share: where the corner lies, 0…1 of the room that there is.
            patch_px: side.

        Returns:
            lq and gt, each (patch_px, patch_px, 3) uint8 RGB; of a sharp photo alone, the same one twice.

        Raises:
            InputError: the shard is missing or damaged.
        """
        images = self.windows(index, patch_box(self.size(index), top_share, left_share, patch_px))
        return images[0], images[-1]

    def scene(self, index: int) -> str:
        """Scene of a pair, without reading its pixels."""
        shard, row = self.locate(index)
        return shard.rows[row].scene

    def locate(self, index: int) -> tuple[Shard, int]:
        """Shard that holds a pair, opened, and the pair's row in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        shard = self._open.get(number)
        if shard is None:
            shard = self._opened(number)
        else:
            self._open.move_to_end(number)
        start = self._ends[number] - self.manifest.shards[number].pairs
        return shard, index - start

    def _opened(self, number: int) -> Shard:
        # Checked before: reading beyond the end of a memory-mapped file kills the process (SIGBUS).
        path, about = self.at_hand(number), self.manifest
        if is_url(self.root):
            # What the cache has removed takes up the disk for as long as somebody has it open.
            for other in [other for other, shard in self._open.items() if not shard.path.exists()]:
                del self._open[other]
        while len(self._open) >= _MOST_OPEN:
            self._open.popitem(last=False)
        with shard_errors(path):
            self._open[number] = shard = open_shard(path, about.format, about.codec, about.sides)
        return shard

    def at_hand(self, number: int) -> Path:
        """A shard's file on this node, its content checked; fetched first if the store is remote.

        Raises:
            InputError: it is missing or damaged.
            CapabilityError: the storage does not answer.
        """
        info, place = self.manifest.shards[number], folder(self.root)
        with shard_errors(place.at(info.file)):
            if isinstance(place, LocalFolder):
                return self._cache.checked(place.path / info.file, size=info.bytes, digest=info.sha256)
            return self._cache.fetched(place, info.file, size=info.bytes, digest=info.sha256)

    def shards_of(self, pairs: NDArray[np.int64]) -> list[int]:
        """Numbers of the shards that hold these pairs, in the order in which they are first met."""
        numbers = np.searchsorted(self._ends, pairs, side="right")
        values, firsts = np.unique(numbers, return_index=True)
        return values[np.argsort(firsts)].tolist()


def refuse_sharp_only(root: str | Path, manifest: Manifest, *, fix: str) -> None:
    """Raise `InputError` where a store has no blurred images, and they are asked for."""
    if manifest.is_sharp_only:
        raise InputError("a store of sharp photos alone", file=root, expected="blurred/sharp pairs", fix=fix)


def check_files(root: str | Path) -> None:
    """Raise `InputError` where a shard of a store is missing or has another size; none of them is read."""
    place, shards = folder(root), read_manifest(root).shards
    sizes = place.sizes()
    for shard in shards:
        with shard_errors(place.at(shard.file)):
            if (size := sizes.get(shard.file)) is None:
                raise FileNotFoundError("no such file")
            if size != shard.bytes:
                raise DamagedShardError(f"{size} bytes instead of {shard.bytes}")


def patch_box(size: tuple[int, int], top_share: float, left_share: float, patch_px: int) -> Box:
    """Box of a square patch.

    Args:
        size: height and width of the image.
        top_share, left_share: where its corner lies, 0…1 of the room that there is.
        patch_px: side.
    """
    top, left = (
        int(share * (length - patch_px + 1))
        for share, length in zip((top_share, left_share), size, strict=True)
    )
    return top, left, patch_px, patch_px


@lru_cache(maxsize=64)
def opened_store(root: str | Path) -> PairStore:
    """A store that stays open for the life of the process, for tasks that would each open its shards anew."""
    return PairStore(root)


def is_store(root: str | Path) -> bool:
    """Whether there is a store, finished or not."""
    place = folder(root)
    if isinstance(place, LocalFolder):
        return any((place.path / name).exists() for name in (MANIFEST, PROGRESS))
    return place.size(MANIFEST) is not None or bool(place.below(PROGRESS).names())


def read_manifest(root: str | Path) -> Manifest:
    """Read a store's manifest. Raises `InputError` where there is no finished store of this version."""
    place = folder(root)
    if isinstance(place, LocalFolder) and not place.path.is_dir():
        raise InputError("no such store", file=root, fix="Make one with `nafnet prepare SOURCE --out STORE`")
    if place.size(MANIFEST) is None:
        if place.below(PROGRESS).names():
            raise InputError("an unfinished store", file=place, fix="Run the same `nafnet prepare` again")
        raise InputError(
            "not a store",
            file=place,
            expected=MANIFEST,
            fix=f"Make one with `nafnet prepare {place} --out STORE`",
        )
    path = place.at(MANIFEST)
    try:
        content = json.loads(place.read(MANIFEST))
        if content.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                "a store of another version",
                file=path,
                expected=SCHEMA_VERSION,
                got=content.get("schema_version"),
                fix="Prepare it again with this version",
            )
        return Manifest.model_validate(content)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, AttributeError) as error:
        raise InputError("damaged manifest", file=path, got=str(error).splitlines()[0]) from error
