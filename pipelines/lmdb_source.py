"""Ray Data source of the pairs in LMDBs; a read task is a range of keys, so many tasks read one file.

    from pipelines.lmdb_source import read_lmdb_pairs
    pairs = read_lmdb_pairs("store")                        # a PairStore of format lmdb, all its shards
    pairs = read_lmdb_pairs("blur.lmdb", "sharp.lmdb")      # two LMDBs as BasicSR writes them
    for batch in pairs.iter_batches(batch_size=8): ...      # key, scene, lq, gt

Rows come in key order where `DataContext.execution_options.preserve_order` is set. Planning reads only the
manifest or `meta_info.txt`. Every node must see the files under the same path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from nafnet_core import InputError
from pipelines.counting import counted
from pipelines.png import decode_png
from pipelines.shards import SIDES, LmdbShard, shard_errors
from pipelines.sources.lmdbs import META, LmdbImage, LmdbPairs, is_lmdb, opened_lmdb, refuse_pickle
from pipelines.store import Manifest, opened_store, read_manifest, refuse_sharp_only

# What a PNG of a photo takes of its pixels: only for planning, where sizes are not listed.
_PNG_SHARE = 0.6


def read_lmdb_pairs(
    lq: str | Path,
    gt: str | Path | None = None,
    *,
    decode: bool = True,
    override_num_blocks: int | None = None,
    **ray_options: Any,
) -> ray.data.Dataset:
    """Read blurred/sharp pairs from LMDBs.

    Args:
        lq: a PairStore of format `lmdb`; or, with `gt`, the LMDB of the blurred images.
        gt: the LMDB of the sharp images, with the same keys.
        decode: False gives the encoded bytes as they are stored.
        override_num_blocks: number of read tasks, at most one a pair; None leaves it to Ray Data.
        ray_options: of `ray.data.read_datasource`, such as `concurrency` or `num_cpus`.

    Returns:
        Rows of `key`, `scene`, `lq` and `gt`: (H, W, 3) uint8 RGB, or bytes. Sizes may differ among rows.

    Raises:
        InputError: there are no such pairs. A missing key, a damaged value, a pickled one or two images of
            different sizes raise it while rows are read, as the cause of Ray's `RayTaskError`.
    """
    source = LmdbPairSource(lq, gt, decode=decode)
    return ray.data.read_datasource(source, override_num_blocks=override_num_blocks, **ray_options)


class LmdbPairSource(Datasource):
    """Pairs in LMDBs, cut into ranges of keys; see `read_lmdb_pairs`."""

    def __init__(self, lq: str | Path, gt: str | Path | None = None, *, decode: bool = True) -> None:
        super().__init__()
        # Resolved: LMDB counts opens by file, the caches of opened ones by path.
        first = Path(lq).resolve()
        self._pairs: _KeyRange = (
            _store_range(first, decode) if gt is None else _listed_range(first, Path(gt).resolve())
        )
        self._decode = decode

    def get_name(self) -> str:
        return "LmdbPairs"

    def estimate_inmemory_data_size(self) -> int:
        return len(self._pairs) * self._row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """`parallelism` ranges of keys that differ by at most one in length; never an empty one."""
        context = data_context or ray.data.DataContext.get_current()
        target = context.target_max_block_size
        # Just over Ray's target: smaller blocks would be copied together, larger ones cut.
        rows_per_block = len(self._pairs) if target is None else target // self._row_bytes + 1
        if per_task_row_limit is not None:
            rows_per_block = min(rows_per_block, per_task_row_limit)
        num_tasks = max(1, min(parallelism, len(self._pairs)))
        edges = [len(self._pairs) * task // num_tasks for task in range(num_tasks + 1)]
        return [
            ReadTask(
                partial(_blocks, self._pairs.part(start, end), self._decode, rows_per_block),
                BlockMetadata(
                    num_rows=end - start,
                    size_bytes=(end - start) * self._row_bytes,
                    input_files=None,
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for start, end in zip(edges[:-1], edges[1:], strict=True)
        ]

    @property
    def _row_bytes(self) -> int:
        """Of one pair in memory, as an estimate."""
        return max(1, self._pairs.decoded_bytes if self._decode else self._pairs.stored_bytes)


@dataclass(frozen=True, slots=True)
class _Stored:
    """One image inside the memory map; valid as long as its transaction."""

    place: str
    value: memoryview
    shape: tuple[int, int, int] | None
    """Of raw pixels; None where the value is an encoded image."""

    def pixels(self) -> NDArray[np.uint8]:
        """(H, W, 3) RGB; of raw pixels a view."""
        try:
            if self.shape is not None:
                return np.frombuffer(self.value, np.uint8).reshape(self.shape)
            return decode_png(self.value)
        except ValueError as error:
            raise InputError(
                "a damaged image", file=self.place, got=counted(len(self.value), "byte")
            ) from error


_Row = tuple[str, str, _Stored, _Stored]


class _KeyRange(Protocol):
    """Keys in order. `decoded_bytes` and `stored_bytes` are of a pair, as estimates."""

    @property
    def decoded_bytes(self) -> int: ...

    @property
    def stored_bytes(self) -> int: ...

    def __len__(self) -> int: ...

    def part(self, start: int, end: int) -> _KeyRange: ...

    def rows(self, transactions: ExitStack) -> Iterator[_Row]:
        """Key, scene and both images; the memory map stays valid until `transactions` closes."""
        ...


@dataclass(frozen=True, kw_only=True)
class _StoreRange:
    """Pairs `start` to `end` of a PairStore, whichever shards they lie in."""

    root: Path
    start: int
    end: int
    is_raw: bool
    decoded_bytes: int
    stored_bytes: int

    def __len__(self) -> int:
        return self.end - self.start

    def part(self, start: int, end: int) -> _StoreRange:
        return replace(self, start=self.start + start, end=self.start + end)

    def rows(self, transactions: ExitStack) -> Iterator[_Row]:
        store = opened_store(self.root)
        for index in range(self.start, self.end):
            shard, row = store.locate(index)
            assert isinstance(shard, LmdbShard)
            with shard_errors(shard.path):
                about = shard.rows[row]
                shape = (about.height_px, about.width_px, 3) if self.is_raw else None
                place = f"{shard.path}#{about.key}"
                lq, gt = (_Stored(place, shard.value(row, side), shape) for side in SIDES)
            yield about.key, about.scene, lq, gt


@dataclass(frozen=True, kw_only=True)
class _ListedRange:
    """Keys that `meta_info.txt` lists, with their scenes."""

    lq_dir: Path
    gt_dir: Path
    keys: tuple[tuple[str, str], ...]
    decoded_bytes: int
    stored_bytes: int

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, start: int, end: int) -> _ListedRange:
        return replace(self, keys=self.keys[start:end])

    def rows(self, transactions: ExitStack) -> Iterator[_Row]:
        sides = [
            (root, transactions.enter_context(opened_lmdb(root).begin(buffers=True)))
            for root in (self.lq_dir, self.gt_dir)
        ]
        for key, scene in self.keys:
            images = []
            for root, transaction in sides:
                place, value = str(LmdbImage(root, key)), transaction.get(key.encode())
                if value is None:
                    raise InputError("listed, but not in the LMDB", file=place)
                refuse_pickle(value, root)
                images.append(_Stored(place, value, None))
            yield key, scene, images[0], images[1]


def _store_range(root: Path, decode: bool) -> _StoreRange:
    if is_lmdb(root):
        raise InputError(
            "one side of a pair", file=root, expected="a store, or the LMDBs of both sides",
            fix="read_lmdb_pairs(LQ, GT)",
        )  # fmt: skip
    manifest = read_manifest(root)
    if manifest.format != "lmdb":
        raise InputError(
            "a store of another format",
            file=root,
            expected="lmdb",
            got=manifest.format,
            fix="Prepare it with --format lmdb",
        )
    refuse_sharp_only(root, manifest, fix="Make pairs of the photos with `nafnet synth`, and prepare these")
    if manifest.codec == "raw" and not decode:
        raise InputError(
            "raw pixels are not encoded", file=root, expected="codec png", fix="Leave decode=False out"
        )
    stored_bytes = sum(shard.bytes for shard in manifest.shards) // max(1, manifest.num_pairs)
    return _StoreRange(
        root=root,
        start=0,
        end=manifest.num_pairs,
        is_raw=manifest.codec == "raw",
        decoded_bytes=_decoded_bytes(manifest, stored_bytes),
        stored_bytes=stored_bytes,
    )


def _decoded_bytes(manifest: Manifest, stored_bytes: int) -> int:
    if manifest.crop_px is not None:
        return 6 * manifest.crop_px**2
    return stored_bytes if manifest.codec == "raw" else round(stored_bytes / _PNG_SHARE)


def _listed_range(lq_dir: Path, gt_dir: Path) -> _ListedRange:
    for root in (lq_dir, gt_dir):
        if not is_lmdb(root):
            raise InputError("not an LMDB", file=root, expected="a folder with data.mdb")
    keys = tuple((ref.key, ref.scene) for ref in LmdbPairs(lq_dir=lq_dir, gt_dir=gt_dir).pairs())
    stored_bytes = sum((root / "data.mdb").stat().st_size for root in (lq_dir, gt_dir)) // len(keys)
    # `0001_s003.png (480,480,3) 1`
    shapes = re.findall(r"\((\d+),\s*(\d+),\s*\d+\)", (gt_dir / META).read_text())
    sizes = [6 * int(height) * int(width) for height, width in shapes]
    decoded_bytes = sum(sizes) // len(sizes) if sizes else round(stored_bytes / _PNG_SHARE)
    return _ListedRange(
        lq_dir=lq_dir, gt_dir=gt_dir, keys=keys, decoded_bytes=decoded_bytes, stored_bytes=stored_bytes
    )


def _blocks(pairs: _KeyRange, decode: bool, rows_per_block: int) -> Iterator[Block]:
    """Read a range, in pieces of `rows_per_block`; runs in a Ray task."""
    for start in range(0, len(pairs), rows_per_block):
        part = pairs.part(start, min(start + rows_per_block, len(pairs)))
        with ExitStack() as transactions:
            block = _block(part, decode, transactions)
        yield block


def _block(pairs: _KeyRange, decode: bool, transactions: ExitStack) -> Block:
    keys, scenes = [], []
    lq, gt = _Column(len(pairs)), _Column(len(pairs))
    for key, scene, *images in pairs.rows(transactions):
        keys.append(key)
        scenes.append(scene)
        if not decode:
            for column, image in zip((lq, gt), images, strict=True):
                if image.shape is None:
                    refuse_pickle(image.value, Path(image.place))
                column.add(bytes(image.value))
            continue
        pixels = [image.pixels() for image in images]
        if pixels[0].shape != pixels[1].shape:
            shapes = [f"{shape[1]}×{shape[0]}" for shape in (pixels[1].shape, pixels[0].shape)]
            raise InputError(
                "the two images differ in size", file=images[0].place, expected=shapes[0], got=shapes[1]
            )
        lq.add(pixels[0])
        gt.add(pixels[1])
    columns = {"key": keys, "scene": scenes, "lq": lq.content(), "gt": gt.content()}
    # Still inside the transaction: images of several sizes are copied here, the others were by `add`.
    return BlockAccessor.batch_to_block(columns)


class _Column:
    """Images of one block: one array where all are of one size, which copies each once; else a list."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows, self._done = num_rows, 0
        self._same: NDArray[np.uint8] | None = None
        self._items: list[Any] | None = None

    def add(self, item: NDArray[np.uint8] | bytes) -> None:
        if self._items is None and isinstance(item, np.ndarray):
            if self._same is None:
                self._same = np.empty((self._num_rows, *item.shape), np.uint8)
            if item.shape == self._same.shape[1:]:
                self._same[self._done] = item
                self._done += 1
                return
        if self._items is None:
            self._items = [] if self._same is None else list(self._same[: self._done])
        self._items.append(item)

    def content(self) -> Any:
        if self._items is None:
            return self._same
        items = np.empty(len(self._items), object)
        items[:] = self._items
        return items
