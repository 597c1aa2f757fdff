"""A store, or pairs that `prepare` would make one of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nafnet_core import InputError
from pipelines.inspect.drawing import draw_histograms, draw_pairs
from pipelines.inspect.result import InspectConfig, InspectResult, Show
from pipelines.inspect.sampling import Read, Sample, measure, spread
from pipelines.inspect.verification import verify, whole_pairs
from pipelines.shards import Pair
from pipelines.sources import AnyPath, Source, find_source, place
from pipelines.storage import folder
from pipelines.store import Manifest, PairStore
from pipelines.urls import is_url, local_path, public

_NUM_PICTURED = 8
_SPLITS = ("train", "val", "test")
_SHOWN = 5


def inspect_store(config: InspectConfig, show: Show) -> InspectResult:
    """Table of the manifest, verification, statistics and pictures. Reads the store, writes nothing there.

    Raises:
        InputError: no finished store of this version, or a folder that pictures cannot be written to.
    """
    root = local_path(config.what)
    store = PairStore(root)  # one, as LMDB opens a file once a process
    manifest = store.manifest
    name = folder(root).name if is_url(root) else Path(root).resolve().name
    problems: list[str] = []
    notes: list[str] = []
    verification, bad_shards = None, set[int]()
    if config.verify or config.deep:
        found = verify(store, deep=config.deep, show=show)
        verification, bad_shards = found.to_dict(), found.bad_shards
        problems += found.problems
        if found.extra_files:
            notes.append(f"Files that the store does not list: {_first(found.extra_files)}")

    def read(index: int) -> Pair:
        try:
            return store.pair(index)
        except IndexError as error:
            raise InputError("a pair that no shard holds", file=public(root), got=f"pair {index}") from error

    # Never from a damaged shard: LMDB may crash on one.
    ranges = whole_pairs(manifest, bad_shards)
    sample, pictures = _look(read, ranges, name, config, show)
    if sample.unreadable:
        problems += sample.unreadable[:_SHOWN]
    return InspectResult(
        kind="store",
        name=name,
        facts=_facts(root, manifest),
        statistics=sample.to_dict(),
        verification=verification,
        pictures=pictures,
        notes=(*notes, *_remarks(sample)),
        problems=tuple(problems),
    )


def inspect_source(config: InspectConfig, show: Show) -> InspectResult:
    """Adapter, number of pairs a split, statistics and pictures of the first split that there is.

    Raises:
        InputError: no adapter recognises it, its files do not match, or no picture can be written.
    """
    root = place(config.what)
    sources = _sources(root)
    refs = {split: source.pairs() for split, source in sources.items()}
    split, source = next(iter(sources.items()))
    chosen = refs[split]

    def read(index: int) -> Pair:
        lq, gt = chosen[index].read()
        return Pair(key=chosen[index].key, scene=chosen[index].scene, lq=lq, gt=gt)

    whole = root.resolve() if isinstance(root, Path) else root
    name = whole.stem if root.is_file() else whole.name
    sample, pictures = _look(read, [range(len(chosen))], name, config, show)
    notes = [f"unreadable: {line}" for line in sample.unreadable[:_SHOWN]]
    if len(sources) > 1:
        notes.append(f"Statistics and pictures are of split {split}.")
    return InspectResult(
        kind="source",
        name=name,
        facts={
            "path": str(root),
            "adapter": source.adapter,
            "pairs": {split: len(found) for split, found in refs.items()},
            "scenes": {split: len({ref.scene for ref in found}) for split, found in refs.items()},
            "options": source.options(),
            "licence": source.licence,
            "next": f"nafnet prepare {root} --out STORE",
        },
        statistics=sample.to_dict(),
        pictures=pictures,
        notes=(*notes, *_remarks(sample)),
    )


def _sources(root: AnyPath) -> dict[str, Source]:
    """Split → source. An adapter that knows no splits gives the same pairs for each: it comes once."""
    found: dict[str, Source] = {}
    known: list[dict[str, Any]] = []
    faults: list[InputError] = []
    for split in _SPLITS:
        try:
            source = find_source(root, split=split)
            source.pairs()
        except InputError as error:
            faults.append(error)
            continue
        if source.options() not in known:
            known.append(source.options())
            found[split] = source
    if not found:
        raise faults[0]
    return found


def _look(
    read: Read, ranges: list[range], name: str, config: InspectConfig, show: Show
) -> tuple[Sample, tuple[Path, ...]]:
    sample = measure(read, ranges, config.num_samples, show=show)
    if not sample.sizes:
        return sample, ()
    pairs = []
    for index in spread(ranges, _NUM_PICTURED):
        try:
            pairs.append(read(index))
        except InputError as error:
            if str(error) not in sample.unreadable:
                sample.unreadable.append(str(error))
    out = config.out_dir(name)
    pictures = []
    if pairs:
        what = "photos" if pairs[0].is_sharp_alone else "pairs, PSNR of blurred against sharp"
        title = f"{name}: {len(pairs)} of {sample.num_pairs} {what}"
        pictures.append(draw_pairs(out / "pairs.png", pairs, title=title))
    title = f"{name}: {len(sample.sizes)} of {sample.num_pairs} pairs"
    return sample, (*pictures, draw_histograms(out / "histograms.png", sample, title=title))


def _facts(root: Path | str, manifest: Manifest) -> dict[str, Any]:
    return {
        "path": public(root),
        "store": manifest.name,
        "split": manifest.split,
        "adapter": manifest.adapter,
        "format": manifest.format,
        "codec": manifest.codec,
        "sides": manifest.sides,
        "pairs": manifest.num_pairs,
        "refused": manifest.num_refused,
        "crop_px": manifest.crop_px,
        "stride_px": manifest.stride_px,
        "shortest_side_px": manifest.min_side_px,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "digest": manifest.digest,
        "licence": manifest.licence,
    }


def _remarks(sample: Sample) -> list[str]:
    if not sample.num_equal:
        return []
    return [
        f"{sample.num_equal} of {len(sample.sizes)} pairs are equal: blurred and sharp are the same image"
    ]


def _first(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
