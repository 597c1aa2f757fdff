"""Shards of a PairStore: Parquet with one row group a pair, or LMDB, memory-mapped.

`write_shard` writes one, whole or not at all; `open_shard` opens one for reading pairs and patches.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from weakref import WeakValueDictionary

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nafnet_core import CapabilityError, InputError
from pipelines.files import NODE_ERRNOS, written_aside
from pipelines.png import decode_png, decode_png_window, encode_png

Format = Literal["parquet", "lmdb"]
Codec = Literal["png", "raw"]
Side = Literal["lq", "gt"]
Window = tuple[slice, slice]
"""Rows and columns, each with start and stop inside the image."""

Sides = tuple[Literal["lq"], Literal["gt"]] | tuple[Literal["gt"]]
"""What is kept of a pair: both images, or the sharp one alone."""
SIDES: Sides = ("lq", "gt")
_INDEX_KEY = b"index"
_OPENED: WeakValueDictionary[tuple[int, int], LmdbShard] = WeakValueDictionary()
_LMDB_START_BYTES = 64 * 2**20
_FULL_BYTES = 2**20  # a disk with less than this left is full
_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("scene", pa.string()),
        ("height_px", pa.int32()),
        ("width_px", pa.int32()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One pair; `lq` and `gt` are (H, W, 3) uint8 RGB of the same size.

    A sharp photo alone is a pair with itself: `lq` is `gt`.
    """

    key: str
    scene: str
    lq: NDArray[np.uint8]
    gt: NDArray[np.uint8]

    @property
    def is_sharp_alone(self) -> bool:
        return self.lq is self.gt

    def digest(self, sides: Sequence[Side] = SIDES) -> bytes:
        """SHA-256 over key, scene, shape and the pixels of the sides that are kept."""
        state = hashlib.sha256(json.dumps([self.key, self.scene, *self.gt.shape]).encode())
        for side in sides:
            state.update(np.ascontiguousarray(getattr(self, side)))
        return state.digest()


def write_shard(
    path: Path, pairs: Iterable[Pair], *, format: Format, codec: Codec, sides: Sequence[Side] = SIDES
) -> tuple[int, bytes, int]:
    """Write one shard, whole or not at all; of each pair the sides that are named.

    Returns:
        Number of pairs, their digests one after the other, and the shortest side in px (0 where empty).
    """
    digests, lengths_px = bytearray(), []

    def counted() -> Iterator[Pair]:
        for pair in pairs:
            digests.extend(pair.digest(sides))
            lengths_px.append(min(pair.gt.shape[:2]))
            yield pair

    with written_aside(path) as temporary:
        if format == "parquet":
            _write_parquet(temporary, counted(), sides)
        else:
            _write_lmdb(temporary, counted(), codec, sides)
    return len(lengths_px), bytes(digests), min(lengths_px, default=0)


def open_shard(path: Path, format: Format, codec: Codec, sides: Sequence[Side] = SIDES) -> Shard:
    """Open a shard file. Raises `OSError`, `ValueError` or what its library raises; see `shard_errors`."""
    if format == "parquet":
        return ParquetShard(path, sides)
    # LMDB refuses to open a file twice in a process; two stores of a mixture may be one.
    status = path.stat()
    identity = status.st_dev, status.st_ino
    shard = _OPENED.get(identity)
    if shard is None:
        _OPENED[identity] = shard = LmdbShard(path, codec, sides)
    return shard


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    scene: str
    height_px: int
    width_px: int


class Shard(Protocol):
    path: Path
    rows: list[Row]

    def pair(self, row: int) -> Pair:
        """One whole pair; of a sharp photo alone, the same image twice."""
        ...

    def windows(self, row: int, window: Window, sides: Sequence[Side]) -> list[NDArray[np.uint8]]:
        """One window of each of these sides, which must be kept, as copies."""
        ...


class ParquetShard:
    def __init__(self, path: Path, sides: Sequence[Side] = SIDES) -> None:
        self.path = path
        self._sides = tuple(sides)
        self._file = pq.ParquetFile(path, memory_map=True)
        table = self._file.read(columns=["key", "scene", "height_px", "width_px"])
        self.rows = [Row(**row) for row in table.to_pylist()]

    def pair(self, row: int) -> Pair:
        images = [decode_png(value) for value in self._values(row, self._sides)]
        return Pair(key=self.rows[row].key, scene=self.rows[row].scene, lq=images[0], gt=images[-1])

    def windows(self, row: int, window: Window, sides: Sequence[Side]) -> list[NDArray[np.uint8]]:
        return [decode_png_window(value, *window) for value in self._values(row, sides)]

    def _values(self, row: int, sides: Sequence[Side]) -> list[memoryview]:
        group = self._file.read_row_group(row, columns=list(sides), use_threads=False)
        return [memoryview(group[side][0].as_buffer()) for side in sides]


class LmdbShard:
    """An LMDB file; what `value` and `image` return is valid as long as it is open."""

    def __init__(self, path: Path, codec: Codec, sides: Sequence[Side] = SIDES) -> None:
        if not path.is_file():
            raise FileNotFoundError(path)
        self.path = path
        self._codec, self._sides = codec, tuple(sides)
        # With read-ahead: the rows of a patch lie beside one another, and without it each page of them is a
        # request of its own to the disk.
        self._env = lmdb.open(str(path), subdir=False, readonly=True, lock=False)
        # One for good: nobody writes here, and what it hands out is valid as long as it is open.
        self._transaction = self._env.begin(buffers=True)
        index = self._transaction.get(_INDEX_KEY)
        if index is None:
            raise ValueError("its index is missing")
        self.rows = [Row(*row) for row in json.loads(bytes(index))]

    def pair(self, row: int) -> Pair:
        images = [self.image(row, side).copy() for side in self._sides]
        return Pair(key=self.rows[row].key, scene=self.rows[row].scene, lq=images[0], gt=images[-1])

    def windows(self, row: int, window: Window, sides: Sequence[Side]) -> list[NDArray[np.uint8]]:
        if self._codec == "png":
            return [decode_png_window(self.value(row, side), *window) for side in sides]
        # Copied: a view would crash the process once the map is gone. It costs flips and turns nothing.
        return [self.image(row, side)[window].copy() for side in sides]

    def value(self, row: int, side: Side) -> memoryview:
        """What is stored for one side of a pair."""
        value = self._transaction.get(_lmdb_key(row, side))
        if value is None:
            raise ValueError(f"pair {row} is not in it")
        return value

    def image(self, row: int, side: Side) -> NDArray[np.uint8]:
        value = self.value(row, side)
        if self._codec == "png":
            return decode_png(value)
        # A view into the memory map: only the pages that the caller's window touches are read.
        shape = (self.rows[row].height_px, self.rows[row].width_px, 3)
        return np.frombuffer(value, np.uint8).reshape(shape)


def _write_parquet(path: Path, pairs: Iterator[Pair], sides: Sequence[Side]) -> None:
    # PNG does not compress again. One row group a pair costs about 1 KiB and makes a pair one read.
    # Statistics would hold each small PNG twice more, as its own minimum and maximum.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    schema = pa.schema([*_COLUMNS, *(pa.field(side, pa.large_binary()) for side in sides)])
    with pq.ParquetWriter(path, schema, **options) as writer:
        for pair in pairs:
            images = [encode_png(getattr(pair, side)) for side in sides]
            row = (pair.key, pair.scene, *pair.gt.shape[:2], *images)
            columns = [pa.array([value], field.type) for value, field in zip(row, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_lmdb(path: Path, pairs: Iterator[Pair], codec: Codec, sides: Sequence[Side]) -> None:
    rows = []
    # Synced once at the end, by `written_aside`: before that nobody can see the file.
    with _lmdb_disk_errors(path):
        env = lmdb.open(
            str(path), subdir=False, map_size=_LMDB_START_BYTES, lock=False, sync=False, meminit=True
        )
    with closing(env):
        # What reading the pairs raises is no fault of this file: it passes as it is.
        for row, pair in enumerate(pairs):
            rows.append([pair.key, pair.scene, *pair.gt.shape[:2]])
            for side in sides:
                image = getattr(pair, side)
                value = encode_png(image) if codec == "png" else np.ascontiguousarray(image).tobytes()
                with _lmdb_disk_errors(path):
                    _put(env, _lmdb_key(row, side), value)
        with _lmdb_disk_errors(path):
            _put(env, _INDEX_KEY, json.dumps(rows).encode())
            env.sync(True)


@contextmanager
def _lmdb_disk_errors(path: Path) -> Iterator[None]:
    """Turn what LMDB raises while it writes, which is no `OSError`, into one that names the file."""
    try:
        yield
    except lmdb.Error as error:
        # Of a disk that fills up LMDB mostly says "Input/output error": it writes less than it was to.
        room = os.statvfs(path.parent)
        if isinstance(error, lmdb.DiskError) or room.f_bavail * room.f_frsize < _FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise OSError(errno.EIO, str(error), str(path)) from error


def _put(env: lmdb.Environment, key: bytes, value: bytes) -> None:
    while True:
        try:
            with env.begin(write=True) as transaction:
                transaction.put(key, value)
            return
        except lmdb.MapFullError:
            env.set_mapsize(env.info()["map_size"] * 2)


def _lmdb_key(row: int, side: Side) -> bytes:
    return f"{row:08d}/{side}".encode()


class shard_errors:  # noqa: N801 - reads as a function where it is used
    """Turn whatever a damaged shard raises into one line that names it; a full disk is no damage."""

    def __init__(self, path: Path | str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in NODE_ERRNOS:
            raise CapabilityError(
                "this node has no room for shards",
                file=error.filename or self._path,
                got=error.strerror,
                fix="Free some there, or name another folder with NAFNET_CACHE",
            ) from error
        if isinstance(error, (lmdb.Error, pa.ArrowException, OSError, ValueError, TypeError, KeyError)):
            raise InputError(
                "a missing or damaged shard",
                file=self._path,
                got=str(error).splitlines()[0][:120],
                fix="Copy the store anew, or remove it and prepare it again",
            ) from error
