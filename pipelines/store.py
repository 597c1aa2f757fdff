"""PairStore: blurred/sharp pairs in shards, described by a manifest that is written last.

    STORE/manifest.json            schema below
    STORE/shard-00000.parquet      one row group a pair, so that one pair is one read; codec png
    STORE/shard-00000.lmdb         memory-mapped; codec png or raw: raw lets a reader touch only its patch
    STORE/quarantine.jsonl         what was refused, and why
    STORE/suspects.jsonl           what was taken and looks wrong: hardly a pair, misaligned, identical
    STORE/scenes.txt               names of its scenes, see `pipelines/scenes.py`

The manifest's `digest` is taken over keys and *decoded* pixels in order, so the same pairs have the same
digest whatever the format, codec and shard size: it names the data in runs and reports.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from nafnet_core import InputError
from pipelines.files import sha256, written_aside
from pipelines.png import decode_png, decode_png_window, encode_png

SCHEMA_VERSION = 1
MANIFEST, QUARANTINE, SUSPECTS, SCENES = "manifest.json", "quarantine.jsonl", "suspects.jsonl", "scenes.txt"
PROGRESS = ".progress"  # notes of `prepare`, while it is at it
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


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardInfo(_Record):
    """One shard, as the manifest lists it."""

    file: str
    pairs: int
    bytes: int
    sha256: str


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
    crop_px: int | None
    """Side of the square crops; None where whole images are kept."""
    stride_px: int | None
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


def digest_of(pair_digests: bytes | bytearray) -> str:
    """Digest of a data set from its pairs' digests, one after the other in order."""
    return hashlib.sha256(pair_digests).hexdigest()


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


def shard_info(path: Path, num_pairs: int) -> ShardInfo:
    """Manifest entry of a finished shard file."""
    return ShardInfo(file=path.name, pairs=num_pairs, bytes=path.stat().st_size, sha256=sha256(path))


class PairStore:
    """A store opened for reading. Shards are opened on first use and kept open; one object a process."""

    def __init__(self, root: str | Path) -> None:
        """Read the manifest only.

        Raises:
            InputError: no store there, an unfinished one, or one of another schema version.
        """
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        self._ends = list(accumulate(shard.pairs for shard in self.manifest.shards))
        self._open: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return self.manifest.num_pairs

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def pair(self, index: int) -> Pair:
        """Read one whole pair.

        Raises:
            InputError: the shard is missing or damaged.
        """
        shard, row = self.locate(index)
        with shard_errors(shard.path):
            return shard.pair(row)

    def patch(
        self, index: int, top_share: float, left_share: float, patch_px: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read one square patch of both images.

        Args:
            index: number of the pair.
            top_share, left_share: where the corner lies, 0…1 of the room that there is.
            patch_px: side.

        Returns:
            lq and gt, each (patch_px, patch_px, 3) uint8 RGB: views into the memory map where the codec is
            raw, valid as long as this store, and read-only.

        Raises:
            InputError: the shard is missing or damaged.
        """
        shard, row = self.locate(index)
        with shard_errors(shard.path):
            return shard.patch(row, top_share, left_share, patch_px)

    def scene(self, index: int) -> str:
        """Scene of a pair, without reading its pixels."""
        shard, row = self.locate(index)
        return shard.rows[row].scene

    def locate(self, index: int) -> tuple[_Shard, int]:
        """Shard that holds a pair, opened, and the pair's row in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        if number not in self._open:
            path = self.root / self.manifest.shards[number].file
            kind = _ParquetShard if self.manifest.format == "parquet" else LmdbShard
            with shard_errors(path):
                expected = self.manifest.shards[number].bytes
                # Reading beyond the end of a memory-mapped file kills the process (SIGBUS).
                if (size := path.stat().st_size) != expected:
                    raise ValueError(f"{size} bytes instead of {expected}")
                self._open[number] = kind(path, self.manifest.codec)
        start = self._ends[number] - self.manifest.shards[number].pairs
        return self._open[number], index - start


@lru_cache(maxsize=64)
def opened_store(root: Path) -> PairStore:
    """A store that stays open for the life of the process: LMDB wants each file opened once a process."""
    return PairStore(root)


def read_manifest(root: Path) -> Manifest:
    """Read `root/manifest.json`. Raises `InputError` where there is no finished store of this version."""
    path = root / MANIFEST
    if not root.is_dir():
        raise InputError("no such store", file=root, fix="Make one with `nafnet prepare SOURCE --out STORE`")
    if not path.is_file():
        if (root / PROGRESS).is_dir():
            raise InputError("an unfinished store", file=root, fix="Run the same `nafnet prepare` again")
        raise InputError(
            "not a store",
            file=root,
            expected=MANIFEST,
            fix=f"Make one with `nafnet prepare {root} --out STORE`",
        )
    try:
        content = json.loads(path.read_text())
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


@dataclass(frozen=True, slots=True)
class _Row:
    key: str
    scene: str
    height_px: int
    width_px: int


class _Shard(Protocol):
    path: Path
    rows: list[_Row]

    def pair(self, row: int) -> Pair: ...

    def patch(
        self, row: int, top_share: float, left_share: float, patch_px: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...


class _ParquetShard:
    def __init__(self, path: Path, codec: Codec) -> None:
        assert codec == "png"
        self.path = path
        self._file = pq.ParquetFile(path, memory_map=True)
        table = self._file.read(columns=["key", "scene", "height_px", "width_px"])
        self.rows = [_Row(**row) for row in table.to_pylist()]

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
    """An LMDB file; what `value` and `image` return is valid inside the transaction of `begin` only."""

    def __init__(self, path: Path, codec: Codec) -> None:
        if not path.is_file():
            raise FileNotFoundError(path)
        self.path = path
        self._codec = codec
        # Patches are small and scattered: read-ahead would fetch what nobody wants.
        self._env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        # One for good: nobody writes here, and views of the memory map are valid as long as it is open.
        self._transaction = self._env.begin(buffers=True)
        index = self._transaction.get(_INDEX_KEY)
        if index is None:
            raise ValueError("its index is missing")
        self.rows = [_Row(*row) for row in json.loads(bytes(index))]

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
            lq, gt = (self.image(row, side)[window] for side in (b"lq", b"gt"))
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


def _window(row: _Row, top_share: float, left_share: float, patch_px: int) -> tuple[slice, slice]:
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

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (lmdb.Error, pa.ArrowException, OSError, ValueError, TypeError)):
            raise InputError(
                "a missing or damaged shard",
                file=self._path,
                got=str(error).splitlines()[0][:120],
                fix="Prepare the store again; shards that are whole are kept",
            ) from error
