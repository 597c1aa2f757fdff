"""Shards of a PairStore: Parquet with one row group a pair, or LMDB, memory-mapped.

`write_shard` writes one, whole or not at all; `open_shard` opens one for reading pairs and patches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.files import written_aside
from pipelines.png import decode_png, decode_png_window, encode_png

Format = Literal["parquet", "lmdb"]
Codec = Literal["png", "raw"]
_INDEX_KEY = b"index"
_LMDB_START_BYTES = 64 * 2**20
_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("scene", pa.string()),
        ("height_px", pa.int32()),
        ("width_px", pa.int32()),
        ("lq", pa.large_binary()),
        ("gt", pa.large_binary()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One pair; `lq` and `gt` are (H, W, 3) uint8 RGB of the same size."""

    key: str
    scene: str
    lq: NDArray[np.uint8]
    gt: NDArray[np.uint8]

    def digest(self) -> bytes:
        """SHA-256 over key, shape and both images' pixels."""
        state = hashlib.sha256(json.dumps([self.key, self.scene, *self.lq.shape]).encode())
        state.update(np.ascontiguousarray(self.lq))
        state.update(np.ascontiguousarray(self.gt))
        return state.digest()


def write_shard(path: Path, pairs: Iterable[Pair], *, format: Format, codec: Codec) -> tuple[int, bytes, int]:
    """Write one shard, whole or not at all.

    Returns:
        Number of pairs, their digests one after the other, and the shortest side in px (0 where empty).
    """
    digests, sides = bytearray(), []

    def counted() -> Iterator[Pair]:
        for pair in pairs:
            digests.extend(pair.digest())
            sides.append(min(pair.lq.shape[:2]))
            yield pair

    with written_aside(path) as temporary:
        if format == "parquet":
            _write_parquet(temporary, counted())
        else:
            _write_lmdb(temporary, counted(), codec)
    return len(sides), bytes(digests), min(sides, default=0)


def open_shard(path: Path, format: Format, codec: Codec) -> Shard:
    """Open a shard file. Raises `OSError`, `ValueError` or what its library raises; see `shard_errors`."""
    return ParquetShard(path) if format == "parquet" else LmdbShard(path, codec)


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    scene: str
    height_px: int
    width_px: int


class Shard(Protocol):
    path: Path
    rows: list[Row]

    def pair(self, row: int) -> Pair: ...

    def patch(
        self, row: int, top_share: float, left_share: float, patch_px: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...


class ParquetShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pq.ParquetFile(path, memory_map=True)
        table = self._file.read(columns=["key", "scene", "height_px", "width_px"])
        self.rows = [Row(**row) for row in table.to_pylist()]

    def pair(self, row: int) -> Pair:
        lq, gt = (decode_png(value) for value in self._values(row))
        return Pair(key=self.rows[row].key, scene=self.rows[row].scene, lq=lq, gt=gt)

    def patch(
        self, row: int, top_share: float, left_share: float, patch_px: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        window = _window(self.rows[row], top_share, left_share, patch_px)
        lq, gt = (decode_png_window(value, *window) for value in self._values(row))
        return lq, gt

    def _values(self, row: int) -> tuple[memoryview, memoryview]:
        group = self._file.read_row_group(row, columns=["lq", "gt"], use_threads=False)
        return memoryview(group["lq"][0].as_buffer()), memoryview(group["gt"][0].as_buffer())


class LmdbShard:
    """An LMDB file; what `value` and `image` return is valid as long as it is open."""

    def __init__(self, path: Path, codec: Codec) -> None:
        if not path.is_file():
            raise FileNotFoundError(path)
        self.path = path
        self._codec = codec
        # Patches are small and scattered: read-ahead would fetch what nobody wants.
        self._env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        # One for good: nobody writes here, and what it hands out is valid as long as it is open.
        self._transaction = self._env.begin(buffers=True)
        index = self._transaction.get(_INDEX_KEY)
        if index is None:
            raise ValueError("its index is missing")
        self.rows = [Row(*row) for row in json.loads(bytes(index))]

    def pair(self, row: int) -> Pair:
        lq, gt = (self.image(row, side).copy() for side in (b"lq", b"gt"))
        return Pair(key=self.rows[row].key, scene=self.rows[row].scene, lq=lq, gt=gt)

    def patch(
        self, row: int, top_share: float, left_share: float, patch_px: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        window = _window(self.rows[row], top_share, left_share, patch_px)
        if self._codec == "png":
            lq, gt = (decode_png_window(self.value(row, side), *window) for side in (b"lq", b"gt"))
        else:
            # Copied: a view would crash the process once the map is gone. It costs flips and turns nothing.
            lq, gt = (self.image(row, side)[window].copy() for side in (b"lq", b"gt"))
        return lq, gt

    def value(self, row: int, side: bytes) -> memoryview:
        """What is stored for one side, `lq` or `gt`, of a pair."""
        value = self._transaction.get(_lmdb_key(row, side))
        if value is None:
            raise ValueError(f"pair {row} is not in it")
        return value

    def image(self, row: int, side: bytes) -> NDArray[np.uint8]:
        value = self.value(row, side)
        if self._codec == "png":
            return decode_png(value)
        # A view into the memory map: only the pages that the caller's window touches are read.
        shape = (self.rows[row].height_px, self.rows[row].width_px, 3)
        return np.frombuffer(value, np.uint8).reshape(shape)


def _window(row: Row, top_share: float, left_share: float, patch_px: int) -> tuple[slice, slice]:
    top = int(top_share * (row.height_px - patch_px + 1))
    left = int(left_share * (row.width_px - patch_px + 1))
    return slice(top, top + patch_px), slice(left, left + patch_px)


def _write_parquet(path: Path, pairs: Iterator[Pair]) -> None:
    # PNG does not compress again. One row group a pair costs about 1 KiB and makes a pair one read.
    # Statistics would hold each small PNG twice more, as its own minimum and maximum.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(path, _COLUMNS, **options) as writer:
        for pair in pairs:
            height, width = pair.lq.shape[:2]
            row = (pair.key, pair.scene, height, width, encode_png(pair.lq), encode_png(pair.gt))
            columns = [pa.array([value], field.type) for value, field in zip(row, _COLUMNS, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=_COLUMNS))


def _write_lmdb(path: Path, pairs: Iterator[Pair], codec: Codec) -> None:
    rows = []
    # Synced once at the end, by `written_aside`: before that nobody can see the file.
    env = lmdb.open(str(path), subdir=False, map_size=_LMDB_START_BYTES, lock=False, sync=False, meminit=True)
    try:
        for row, pair in enumerate(pairs):
            rows.append([pair.key, pair.scene, *pair.lq.shape[:2]])
            for side, image in ((b"lq", pair.lq), (b"gt", pair.gt)):
                value = encode_png(image) if codec == "png" else np.ascontiguousarray(image).tobytes()
                _put(env, _lmdb_key(row, side), value)
        _put(env, _INDEX_KEY, json.dumps(rows).encode())
        env.sync(True)
    finally:
        env.close()


def _put(env: lmdb.Environment, key: bytes, value: bytes) -> None:
    while True:
        try:
            with env.begin(write=True) as transaction:
                transaction.put(key, value)
            return
        except lmdb.MapFullError:
            env.set_mapsize(env.info()["map_size"] * 2)


def _lmdb_key(row: int, side: bytes) -> bytes:
    return b"%08d/%s" % (row, side)


class shard_errors:  # noqa: N801 - reads as a function where it is used
    """Turn whatever a damaged shard raises into one line that names it."""

    def __init__(self, path: Path | str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (lmdb.Error, pa.ArrowException, OSError, ValueError, TypeError)):
            raise InputError(
                "a missing or damaged shard",
                file=self._path,
                got=str(error).splitlines()[0][:120],
                fix="Copy the store anew, or remove it and prepare it again",
            ) from error
