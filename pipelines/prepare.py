"""Any paired data set → PairStore; sharp photos alone as well, which training blurs anew each time.

    nafnet prepare pairs/ --out store/ --crop 512 --stride 256
    nafnet prepare photos/ --sharp --out store/ --crop 0 --format lmdb --codec raw
    nafnet prepare pairs/ --out store/ --crop 128 --stride 128 --format lmdb --codec raw   # small and fast
    nafnet prepare s3://bucket/pairs --out s3://bucket/stores/train

A shard covers a fixed range of source pairs, so what it holds does not depend on who writes it. Finished
shards leave a note under `STORE/.progress`; an interrupted run goes on from these and ends with the same
digest. Several shards are written as a Ray Data job, a single one in this process. Into a bucket each is
uploaded whole, then its note; one run at a time is at work in a store, see `pipelines/lease.py`.

Pairs that cannot be used (`PairRef.read`) and those that come twice (`duplicates`) are refused, and listed
with the reason; those that look wrong (`screening`) are kept, and listed as well.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from nafnet_core import CapabilityError, InputError, NAFNetError
from nafnet_core.transforms import crop_corners
from pipelines import nodes
from pipelines.duplicates import find_duplicates, refuse_duplicate
from pipelines.files import json_bytes, write_json_lines
from pipelines.images import MAX_MEGAPIXELS
from pipelines.lease import held
from pipelines.notes import claim, note_name, notes, shard_name, whole_shards
from pipelines.scenes import SceneList
from pipelines.screening import Findings, Row
from pipelines.shards import SIDES, Codec, Format, Pair, Sides, write_shard
from pipelines.sources import PairRef, Source
from pipelines.storage import LocalFolder, RemoteFolder, folder
from pipelines.store import (
    MANIFEST,
    PROGRESS,
    QUARANTINE,
    SCENES,
    SCHEMA_VERSION,
    SUSPECTS,
    Manifest,
    ShardInfo,
    shard_info,
)
from pipelines.urls import local_path

# A wave is one Ray Data execution: what it keeps of each shard, and takes before the first, is bounded.
_MIN_WAVE_SHARDS, _WAVE_SHARDS_A_CPU = 512, 32
_Folder = LocalFolder | RemoteFolder


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What `run` makes of a source."""

    out: Path | str = field(repr=False)
    """Folder, or a URL of one, which may hold credentials: not to be shown as it is."""
    name: str = ""
    split: str = "train"
    format: Format = "parquet"
    codec: Codec = "png"
    crop_px: int | None = 512
    """Side of the crops; None keeps whole images, as evaluation wants them."""
    stride_px: int = 256
    min_remainder_px: int = 0
    """A remainder beyond the last crop of up to this is dropped. 512, 256 and 0 are GoPro's usual cuts."""
    pairs_per_shard: int = 32
    """Source pairs in a shard: 32 of 1280×720 make 256 crops, about 200 MB as PNG."""
    max_megapixels: float = MAX_MEGAPIXELS
    """Larger images are refused, by what their header declares."""
    strict: bool = False
    """Stop at the first refused pair, instead of writing it to quarantine.jsonl."""
    use_ray: bool = field(default=True, compare=False)


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """The finished store."""

    out: Path | str = field(repr=False)
    manifest: Manifest
    refused: tuple[Row, ...]
    suspects: tuple[Row, ...] = ()
    """Pairs that were taken and look wrong."""


@dataclass(frozen=True, kw_only=True)
class _ShardJob:
    """Everything one worker needs to write one shard."""

    number: int
    refs: tuple[PairRef, ...]
    config: PrepareConfig
    duplicates: dict[str, str]
    """Those of `refs` that come for the second time, with the key of the first."""
    token: str
    """By which a worker knows the run's folder, see `pipelines/nodes.py`."""


def run(
    source: Source,
    refs: Sequence[PairRef],
    config: PrepareConfig,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrepareResult:
    """Write `refs` of `source` as a store at `config.out`, or go on with one that was interrupted.

    Raises:
        InputError: impossible options, another store or another run in that place, a folder that cannot be
            written, no usable pair, or (with `strict`) the first refused one.
        CapabilityError: a bucket that does not answer; what was done until then is kept.
    """
    _check(config)
    config = replace(config, out=local_path(config.out))
    store = folder(config.out)
    progress = store.below(PROGRESS)
    if store.size(MANIFEST) is not None and not progress.names():
        raise _finished_already(store)
    progress.make()
    with held(store, PROGRESS) as check_held:
        if store.size(MANIFEST) is not None:
            # By the run that was at work until now, or by one that was killed at its very end.
            progress.remove()
            raise _finished_already(store)
        result = _run(source, refs, config, on_progress, check_held)
    progress.remove()  # not before: the one who holds it would renew its note
    return result


def _run(
    source: Source,
    refs: Sequence[PairRef],
    config: PrepareConfig,
    on_progress: Callable[[int, int], None],
    check_held: Callable[[], None],
) -> PrepareResult:
    store = folder(config.out)
    claim(store, _identity(config, source, refs))
    token = uuid.uuid4().hex
    nodes.mark(store.below(PROGRESS), token)
    duplicates = _duplicates(refs, config)
    num_shards = -(-len(refs) // config.pairs_per_shard)
    whole = whole_shards(store, num_shards, config.format)
    todo = [number for number in range(num_shards) if number not in whole]
    done = len(whole)
    on_progress(done, num_shards)
    jobs = _jobs(refs, todo, config, duplicates, token)
    for _ in _work(jobs, use_ray=config.use_ray and len(todo) > 1):
        check_held()
        done += 1
        on_progress(done, num_shards)
    check_held()
    return _finish(source, refs, config)


def _duplicates(refs: Sequence[PairRef], config: PrepareConfig) -> dict[str, str]:
    duplicates = find_duplicates(refs)
    if config.strict and duplicates:
        for ref in refs:
            refuse_duplicate(ref, duplicates)
    return duplicates


def _jobs(
    refs: Sequence[PairRef],
    numbers: Iterable[int],
    config: PrepareConfig,
    duplicates: Mapping[str, str],
    token: str,
) -> Iterator[_ShardJob]:
    """Jobs of the shards of these numbers, each made when it is asked for: all at once are as many pairs."""
    for number in numbers:
        start = number * config.pairs_per_shard
        mine = tuple(refs[start : start + config.pairs_per_shard])
        twice = {ref.key: duplicates[ref.key] for ref in mine if ref.key in duplicates}
        yield _ShardJob(number=number, refs=mine, config=config, duplicates=twice, token=token)


def _identity(config: PrepareConfig, source: Source, refs: Iterable[PairRef]) -> dict[str, Any]:
    """What must not change while a store is unfinished: options, source and pairs."""
    options = {k: v for k, v in asdict(config).items() if k not in ("out", "use_ray", "strict")}
    keys = hashlib.sha256(b"[")  # of the keys as a JSON list, which is never held as a whole
    for number, ref in enumerate(refs):
        keys.update(f"{', ' if number else ''}{json.dumps(ref.key)}".encode())
    keys.update(b"]")
    return {**options, **source.options(), "pairs": keys.hexdigest()}


def _work(jobs: Iterator[_ShardJob], *, use_ray: bool) -> Iterator[None]:
    if not use_ray:
        for job in jobs:
            _write(job)
            yield
        return
    import ray
    import ray.data

    from cluster.connect import quiet_data_context

    quiet_data_context()
    wave = max(_MIN_WAVE_SHARDS, int(_WAVE_SHARDS_A_CPU * ray.cluster_resources().get("CPU", 1)))
    while rows := [{"job": job} for job in islice(jobs, wave)]:
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        for row in dataset.map(_write_row).iter_rows():
            if row["refused"]:
                raise (InputError if row["is_input"] else CapabilityError)(row["refused"])
            yield
        # What an execution leaves behind, 15 KiB a shard, refers to itself: it would lie there for long.
        del dataset, rows
        gc.collect()


def _write_row(row: dict[str, Any]) -> dict[str, Any]:
    # Raised in the task, it would come out as Ray's own error with pages of trace.
    try:
        _write(row["job"])
    except NAFNetError as error:
        return {"refused": str(error), "is_input": isinstance(error, InputError)}
    except OSError as error:  # a full disk
        line = CapabilityError(error.strerror or str(error), file=error.filename)
        return {"refused": str(line), "is_input": False}
    return {"refused": "", "is_input": False}


def _write(job: _ShardJob) -> None:
    """Write one shard, then its note. Either is whole or absent."""
    store = folder(job.config.out)
    nodes.check_folder(store.below(PROGRESS), job.token)
    nodes.check_pairs(job.refs)
    findings = Findings()
    pairs = _crops(job, findings)
    with store.staged(shard_name(job.number, job.config.format)) as path:
        count, digests, min_side = write_shard(
            path, pairs, format=job.config.format, codec=job.config.codec, sides=_sides(job.refs)
        )
        info = shard_info(path, count)
    note = {
        "info": info.model_dump(),
        "digests": base64.b64encode(digests).decode(),
        "min_side_px": min_side,
        **findings.to_json(),
    }
    store.below(PROGRESS).write(note_name(job.number), json_bytes(note))


def _sides(refs: Sequence[PairRef]) -> Sides:
    """What is kept of each pair. All of a source are alike."""
    return ("gt",) if refs[0].lq is None else SIDES


def _crops(job: _ShardJob, findings: Findings) -> Iterator[Pair]:
    crop, stride = job.config.crop_px, job.config.stride_px
    for ref in job.refs:
        try:
            refuse_duplicate(ref, job.duplicates)
            pair = _read_pair(ref, job.config)
        except InputError as error:
            if job.config.strict:
                raise
            findings.refuse(ref, error)
            continue
        findings.take(ref, pair)
        if crop is None:
            yield pair
            continue
        height, width = pair.gt.shape[:2]
        for top in crop_corners(height, crop, stride, job.config.min_remainder_px):
            for left in crop_corners(width, crop, stride, job.config.min_remainder_px):
                window = (slice(top, top + crop), slice(left, left + crop))
                key = f"{pair.key}@{top},{left}"
                yield replace(pair, key=key, lq=pair.lq[window], gt=pair.gt[window])


def _read_pair(ref: PairRef, config: PrepareConfig) -> Pair:
    lq, gt = ref.read(max_megapixels=config.max_megapixels)
    crop_px = config.crop_px
    if crop_px is not None and min(gt.shape[:2]) < crop_px:
        raise InputError(
            "smaller than a crop",
            file=str(ref.lq or ref.gt),
            expected=f"{crop_px} px a side",
            got=f"{gt.shape[1]}×{gt.shape[0]}",
            fix="Choose a smaller --crop",
        )
    return Pair(key=ref.key, scene=ref.scene, lq=lq, gt=gt)


def _check(config: PrepareConfig) -> None:
    if config.codec == "raw" and config.format != "lmdb":
        raise InputError("codec raw needs --format lmdb: a Parquet page cannot be touched in part")
    if config.crop_px is not None and not (config.crop_px > 0 and 0 < config.stride_px):
        raise InputError("crop and stride must be positive", got=(config.crop_px, config.stride_px))
    if config.pairs_per_shard < 1:
        raise InputError("pairs per shard must be at least 1", got=config.pairs_per_shard)
    if not config.max_megapixels > 0:
        raise InputError("the largest image must be of more than 0 megapixels", got=config.max_megapixels)


def _finished_already(store: _Folder) -> InputError:
    return InputError(
        "there is a finished store already", file=store, fix="Remove it, or choose another --out"
    )


def _finish(source: Source, refs: Sequence[PairRef], config: PrepareConfig) -> PrepareResult:
    store = folder(config.out)
    progress = store.below(PROGRESS)
    state = hashlib.sha256()
    shards: list[ShardInfo] = []
    refused: list[Row] = []
    suspects: list[Row] = []
    sides: list[int] = []
    with progress.scratch() as scratch:
        scenes = SceneList(scratch)
        for note in notes(progress, range(-(-len(refs) // config.pairs_per_shard))):
            state.update(base64.b64decode(note["digests"]))
            refused += note["refused"]
            suspects += note["suspects"]
            scenes.add(note["scenes"])
            if note["info"]["pairs"]:
                shards.append(ShardInfo.model_validate(note["info"]))
                sides.append(note["min_side_px"])
        for name, rows in ((QUARANTINE, refused), (SUSPECTS, suspects)):
            with store.staged(name) as path:
                write_json_lines(path, rows)
        if not shards:
            # The notes would hold it against pairs that are repaired meanwhile.
            progress.remove()
            reason = refused[0]["reason"] if refused else "none at all"
            raise InputError(f"no usable pair among {len(refused)}; the first: {reason}")
        with store.staged(SCENES) as path:
            num_scenes = scenes.write(path)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=config.name or store.name,
        split=config.split,
        adapter=source.adapter,
        adapter_options=source.options(),
        format=config.format,
        codec=config.codec,
        sides=_sides(refs),
        crop_px=config.crop_px,
        stride_px=config.stride_px if config.crop_px else None,
        min_remainder_px=config.min_remainder_px if config.crop_px else None,
        num_pairs=sum(shard.pairs for shard in shards),
        num_refused=len(refused),
        num_suspect=len(suspects),
        num_scenes=num_scenes,
        min_side_px=min(sides),
        shards=tuple(shards),
        digest=state.hexdigest(),
        licence=source.licence,
    )
    store.delete_halves("shard-")  # left by a run that was killed
    store.write(MANIFEST, json_bytes(manifest.model_dump()))
    return PrepareResult(out=config.out, manifest=manifest, refused=tuple(refused), suspects=tuple(suspects))
