"""Are a store's files those that its manifest lists?"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from nafnet_core import InputError
from pipelines.inspect.result import Show
from pipelines.storage import LocalFolder, RemoteFolder, folder
from pipelines.store import MANIFEST, PROGRESS, QUARANTINE, Manifest, PairStore, ShardInfo

_FIX = "Copy it anew from where the store came from, or remove the store and prepare it again"
# Beside the shards; what else lies there was not written by us.
_KNOWN = frozenset({MANIFEST, PROGRESS, QUARANTINE, "scenes.txt", "suspects.jsonl"})
_MAX_THREADS = 8
_Folder = LocalFolder | RemoteFolder


@dataclass(kw_only=True)
class Verification:
    """Outcome of checking a store."""

    hashed_bytes: int = 0
    digest: str | None = None
    """Over keys and decoded pixels, computed anew; None where it was not asked for, or cannot be."""
    bad_shards: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    extra_files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "hashed_bytes": self.hashed_bytes,
            "digest_of_pixels": self.digest,
            "bad_shards": sorted(self.bad_shards),
            "extra_files": self.extra_files,
        }


def verify(store: PairStore, *, deep: bool, show: Show) -> Verification:
    """Hash every shard; with `deep`, where all are whole, also every pair's pixels. Memory stays flat."""
    place, manifest = folder(store.root), store.manifest
    found = Verification(extra_files=_extra_files(place, manifest))
    listed = sum(shard.pairs for shard in manifest.shards)
    if listed != manifest.num_pairs:
        found.problems.append(
            _line(
                "the manifest contradicts itself", place.at(MANIFEST), f"{manifest.num_pairs} pairs", listed
            )
        )
    _check_shards(place, manifest, found, show)
    if deep and not found.problems:
        _check_pixels(store, found, show)
    return found


def _check_shards(place: _Folder, manifest: Manifest, found: Verification, show: Show) -> None:
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    faults: dict[int, str] = {}
    with ThreadPoolExecutor(threads) as pool, show("verify", "shards") as update:
        jobs = {pool.submit(_fault, place, shard): n for n, shard in enumerate(manifest.shards)}
        for done, job in enumerate(as_completed(jobs), start=1):
            number = jobs[job]
            if (fault := job.result()) is not None:
                faults[number] = fault
            else:
                found.hashed_bytes += manifest.shards[number].bytes
            update(done, len(jobs))
    found.bad_shards = set(faults)
    found.problems += [faults[number] for number in sorted(faults)]


def _fault(place: _Folder, shard: ShardInfo) -> str | None:
    path = place.at(shard.file)
    try:
        if (size := place.size(shard.file)) is None:
            return _line("a missing shard", path, f"{shard.bytes} bytes", "no such file")
        if size != shard.bytes:
            return _line("a shard of another size", path, f"{shard.bytes} bytes", size)
        if (digest := place.sha256(shard.file)) != shard.sha256:
            return _line("a damaged shard", path, f"SHA-256 {shard.sha256}", digest)
    except OSError as error:
        return _line("a shard that cannot be read", path, None, error.strerror)
    return None


def _check_pixels(store: PairStore, found: Verification, show: Show) -> None:
    """As `prepare` computes the digest: over the pairs' own digests, in order."""
    manifest, state = store.manifest, hashlib.sha256()
    path = folder(store.root).at(MANIFEST)
    try:
        with show("decode", "pairs") as update:
            for index in range(len(store)):
                state.update(store.pair(index).digest(manifest.sides))
                update(index + 1, len(store))
    except InputError as error:
        found.problems.append(str(error))
        return
    except IndexError:  # fewer rows in the shard than the manifest says
        text = "a shard of fewer pairs than listed"
        found.problems.append(_line(text, path, f"{manifest.num_pairs} pairs", index))
        return
    found.digest = state.hexdigest()
    if found.digest != manifest.digest:
        text = "the pixels are not those of the manifest"
        found.problems.append(_line(text, path, f"digest {manifest.digest}", found.digest))


def _extra_files(place: _Folder, manifest: Manifest) -> list[str]:
    known = _KNOWN | {shard.file for shard in manifest.shards}
    names = [p.name for p in place.path.iterdir()] if isinstance(place, LocalFolder) else place.names()
    return sorted(name for name in names if name not in known)


def _line(what: str, file: str, expected: object, got: object) -> str:
    return str(InputError(what, file=file, expected=expected, got=got, fix=_FIX))


def whole_pairs(manifest: Manifest, bad_shards: set[int]) -> list[range]:
    """Numbers of the pairs in shards that are whole."""
    ranges, start = [], 0
    for number, shard in enumerate(manifest.shards):
        if number not in bad_shards:
            ranges.append(range(start, start + shard.pairs))
        start += shard.pairs
    return ranges
