"""What an adapter is, and how pairs are split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.images import MAX_MEGAPIXELS, Photo, read_photo
from pipelines.packed import Packed, in_order, matched
from pipelines.sources.remote import AnyPath, RemotePath, list_together

# JPEG's colours of a gray scene stray by a level or two.
_GRAY_SPREAD_LEVELS = 16
_SHOWN = 3


class EncodedImage(Protocol):
    """An image that is no file of its own."""

    def read_photo(self, *, max_megapixels: float = MAX_MEGAPIXELS) -> Photo:
        """Decode it, as `images.read_photo` does with a file. Raises `InputError`."""
        ...

    def size_bytes(self) -> int:
        """Length of its content, -1 where there is none."""
        ...

    def read_bytes(self, start: int, count: int) -> bytes:
        """A part of its content; short, or nothing, beyond its end."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRef:
    """One pair by its places. `scene` groups pairs that a split must not separate."""

    key: str
    scene: str
    lq: Path | EncodedImage | None
    """None of a sharp photo alone."""
    gt: Path | EncodedImage

    def read(self, *, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Decode both, degraded and sharp, to (H, W, 3) uint8 RGB of the same size.

        16 bit is rounded to 8, alpha is dropped, gray of both becomes RGB. A sharp photo alone is its own
        partner: the same array twice.

        Raises:
            InputError: one of them is missing or damaged, they differ in size, or one of them is gray.
        """
        gt = _read(self.gt, max_megapixels)
        if self.lq is None:
            sharp = gt.rgb_hwc_u8()
            return sharp, sharp
        lq = _read(self.lq, max_megapixels)
        self._check_alike(lq, gt)
        return lq.rgb_hwc_u8(), gt.rgb_hwc_u8()

    def _check_alike(self, lq: Photo, gt: Photo) -> None:
        (height, width), (gt_height, gt_width) = lq.rgb_hwc.shape[:2], gt.rgb_hwc.shape[:2]
        if (height, width) != (gt_height, gt_width):
            is_turned = lq.is_on_side != gt.is_on_side and (height, width) == (gt_width, gt_height)
            raise InputError(
                "the two images differ in size: EXIF turns one of them by a quarter, and not the other"
                if is_turned
                else "the two images differ in size",
                file=str(self.lq),
                expected=f"{gt_width}×{gt_height} as {self.gt}",
                got=f"{width}×{height}",
                fix="Save both upright, without the EXIF orientation" if is_turned else None,
            )
        if lq.is_gray != gt.is_gray and _has_colour(gt if lq.is_gray else lq):
            gray, colour = (self.lq, self.gt) if lq.is_gray else (self.gt, self.lq)
            raise InputError(
                "one of the two images is gray",
                file=str(gray),
                expected=f"colour as {colour}",
                got="one channel",
                fix="Export it in colour, or both in gray",
            )


def _read(image: Path | EncodedImage, max_megapixels: float) -> Photo:
    if isinstance(image, Path):
        return read_photo(image, max_megapixels=max_megapixels)
    return image.read_photo(max_megapixels=max_megapixels)


def _has_colour(photo: Photo) -> bool:
    """Whether the channels differ; a gray picture may well be saved as RGB."""
    rgb = photo.rgb_hwc_u8()
    return any(int(cv2.absdiff(rgb[..., 1], rgb[..., side]).max()) > _GRAY_SPREAD_LEVELS for side in (0, 2))


class Source(Protocol):
    """What an adapter provides."""

    adapter: str
    licence: str

    def options(self) -> dict[str, Any]:
        """What the manifest records, as JSON values."""
        ...

    def pairs(self) -> Sequence[PairRef]:
        """All pairs, sorted by key, and not each an object: a million fit into little memory.

        Raises:
            InputError: the layout is not as expected.
        """
        ...


def hold_out(refs: Sequence[PairRef], share: float, *, test: bool) -> Sequence[PairRef]:
    """One side of a split by scene: `share` of the scenes, chosen by a hash of their names, are the test set.

    Raises:
        InputError: there are not two scenes to split, or the name of one is not UTF-8.
    """
    for ref in refs:
        check_name(ref.scene, file=str(ref.gt))
    scenes = np.unique(np.fromiter((_number_of(ref.scene) for ref in refs), np.uint64, len(refs)))
    if len(scenes) < 2:
        got = [ref.scene for ref in refs[:1]]
        raise InputError("cannot hold out a part of one scene", expected="two scenes", got=got)
    last = scenes[max(1, min(len(scenes) - 1, math.ceil(share * len(scenes)))) - 1]
    return Packed(ref for ref in refs if (_number_of(ref.scene) <= last) == test)


def _number_of(scene: str) -> int:
    """64 bits of the hash of a name: of a million scenes two have the same with a chance of 1 in 10⁷."""
    return int.from_bytes(hashlib.sha256(scene.encode()).digest()[:8], "big")


def checked(refs: Iterable[PairRef], *, file: AnyPath) -> Packed[PairRef]:
    """`refs` sorted by key, once all their files are there and no key comes twice.

    Raises:
        InputError: the first few missing files, a key of two pairs, or a name that is not UTF-8.
    """
    listed = Packed(refs)
    for ref in listed:
        for name in (ref.key, ref.scene):
            check_name(name, file=str(ref.gt))
    list_together(image for ref in listed for image in (ref.lq, ref.gt))
    num_missing, shown = 0, []
    for path in (path for ref in listed for path in (ref.lq, ref.gt)):
        if isinstance(path, (Path, RemotePath)) and not path.is_file():
            num_missing += 1
            shown += [str(path)] if num_missing <= _SHOWN else []
    if num_missing:
        raise InputError(
            f"{num_missing} images are listed and not there",
            file=file,
            got=", ".join(shown),
            fix="Complete the data set, or take them off the list",
        )
    found: Packed[PairRef] = Packed()
    before = None
    for ref in in_order(listed, key=lambda ref: ref.key):
        if ref.key == before:
            raise InputError("two pairs of one name", file=file, got=ref.key)
        before = ref.key
        found.append(ref)
    return found


def check_name(name: str, *, file: AnyPath | str) -> None:
    """Raise `InputError` where a name is not UTF-8: neither a store's keys nor its manifest can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:  # as old archives leave it behind
        raise InputError("a file name that is not UTF-8", file=file, fix="Rename it") from error


def refuse_shared(ours: Iterable[str], others: Iterable[str], *, what: str, file: AnyPath) -> None:
    """Refuse a data set of which something lies on both sides of its own split.

    Args:
        ours: names in the split that is asked for, as often as they come.
        others: those in its other splits.
        what: what they name, in the plural.
        file: where the split is told.

    Raises:
        InputError: some are in both.
    """
    num_shared, shown = 0, []
    for name, mine, theirs in matched(((name, None) for name in ours), ((name, None) for name in others)):
        if mine and theirs:
            num_shared += 1
            shown += [name] if num_shared <= _SHOWN else []
    if num_shared:
        raise InputError(
            f"{num_shared} {what} are in this split and in another one",
            file=file,
            got=", ".join(shown),
            fix="A score on them says nothing: take them out of one of the two",
        )
