"""Stores to measure with: of photos, or simulated ones of millions of pairs; preparing them, timed."""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import cv2

from benchmarks import _loaders as loaders
from benchmarks._rows import Rows, row
from pipelines import prepare, synth
from pipelines.png import encode_png
from pipelines.sources import PairRef, Source, find_source
from pipelines.store import MANIFEST, PairStore

_SUFFIXES = (".lmdb", ".mdb", ".parquet")
_SHARD_PAIRS = 256
# Of those that scikit-image ships; split by photo.
_PHOTOS = {
    "train": ("chelsea.png", "coffee.png", "motorcycle_left.png", "brick.png", "grass.png", "gravel.png"),
    "val": ("astronaut.png", "rocket.jpg"),
}


def make_stores(folder: Path, num_photos: int) -> None:
    """`raw`, `png` and the peer's LMDBs, of the same crops; what is there is kept."""
    make_pairs(folder, num_photos)
    source = find_source(folder / "pairs", split="train")
    for format, codec in (("lmdb", "raw"), ("parquet", "png")):
        if not (folder / codec).is_dir():
            config = prepare.PrepareConfig(
                out=folder / codec, format=format, codec=codec, pairs_per_shard=4, use_ray=False
            )
            prepare.run(source, source.pairs(), config)
    if not (folder / "basicsr").is_dir():
        loaders.write_png_lmdbs(PairStore(folder / "raw"), folder / "basicsr")


def make_pairs(folder: Path, num_photos: int) -> None:
    """`pairs`, of photos; what is there is kept."""
    if not (folder / "pairs").is_dir():
        photos = sharp_photos(folder / "photos", num_photos)
        synth.run(synth.SynthConfig(sharp=photos, out=folder / "pairs"))


def make_training_stores(folder: Path, num_test: int = 50) -> None:
    """`train` and its peer's `basicsr`, 256² crops; `val`, whole photos of others. What is there is kept."""
    data = os.environ.get("NAFNET_DATA")
    photos = {"train": _bsds(Path(data), "train"), "val": _bsds(Path(data), "val")[:num_test]} if data else {}
    for split, variants, seed in (("train", 4, 1), ("val", 1, 2)):
        pairs, store = folder / "pairs" / split, folder / split
        if store.is_dir():
            continue
        sharp = photos.get(split) or [_installed(name) for name in _PHOTOS[split]]
        synth.run(synth.SynthConfig(sharp=sharp, out=pairs, variants=variants, seed=seed))
        source = find_source(pairs, split="train")
        shape = (
            {"crop_px": 256, "stride_px": 128, "format": "lmdb", "codec": "raw"}
            if split == "train"
            else {"crop_px": None}
        )
        prepare.run(source, source.pairs(), prepare.PrepareConfig(out=store, use_ray=False, **shape))
    if not (folder / "basicsr").is_dir():
        loaders.write_png_lmdbs(PairStore(folder / "train"), folder / "basicsr")


def _bsds(data: Path, split: str) -> list[Path]:
    photos = sorted((data / "sharp" / "bsds500" / split).glob("*.jpg"))
    if not photos:
        raise SystemExit(f"no photos in {data / 'sharp' / 'bsds500'}: unset NAFNET_DATA to use shipped ones")
    return photos


def _installed(file: str) -> Path:
    """A photo that scikit-image ships."""
    import skimage

    return Path(skimage.__file__).parent / "data" / file


def sharp_photos(folder: Path, number: int) -> list[Path]:
    """Photos in NAFNET_DATA; or, where it is not set, some that are made in `folder`."""
    data = os.environ.get("NAFNET_DATA")
    return _unsplash(Path(data), number) if data else _shipped(folder, number)


def _unsplash(data: Path, number: int) -> list[Path]:
    photos = sorted((data / "sharp" / "unsplash").rglob("*.jpg"))[:number]
    if not photos:
        raise SystemExit(f"no photos in {data / 'sharp' / 'unsplash'}: unset NAFNET_DATA to use shipped ones")
    return photos


def _shipped(folder: Path, number: int) -> list[Path]:
    """Photos that scikit-image ships, enlarged and mirrored until there are enough."""
    from skimage import data

    images = [read() for read in (data.astronaut, data.chelsea, data.coffee, data.rocket)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for count in range(number):
        # Enlarged a little differently each time: the same picture twice would be refused.
        size = (1920 + 2 * count, 1280)
        image = cv2.resize(images[count % len(images)], size, interpolation=cv2.INTER_CUBIC)
        paths.append(folder / f"{count}.png")
        paths[-1].write_bytes(encode_png(image[:, :: 1 if count % 2 else -1].copy()))
    return paths


def fill_page_cache(folder: Path) -> None:
    for path in _files(folder):
        path.read_bytes()


def empty_page_cache(folder: Path) -> None:
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file()]


def simulated_store(num_pairs: int) -> Path:
    """A manifest of so many pairs in shards that are not there."""
    root = Path(tempfile.mkdtemp())
    num_shards = num_pairs // _SHARD_PAIRS
    shards = [
        {"file": f"shard-{n:05d}.lmdb", "pairs": _SHARD_PAIRS, "bytes": 4 * 10**8, "sha256": f"{n:064x}"}
        for n in range(num_shards)
    ]
    manifest = {
        "schema_version": 1, "name": "simulated", "split": "train", "adapter": "none", "adapter_options": {},
        "format": "lmdb", "codec": "raw", "crop_px": 512, "stride_px": 256, "num_pairs": 256 * num_shards,
        "num_refused": 0, "min_side_px": 512, "shards": shards, "digest": "0" * 64, "licence": "none",
    }  # fmt: skip
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


def preparing_rows(folder: Path) -> Rows:
    """`prepare` of few pairs and of ten times as many, in this process; decoding and encoding alone."""
    source = find_source(folder / "pairs", split="train")
    refs = source.pairs()
    few, many = refs[:2], refs[:20]
    bare, once, tenfold, growth = [], [], [], []
    for _ in range(3):
        bare.append(_bare(few))
        once.append(_prepared(few, source))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tenfold.append(_prepared(many, source))
        growth.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    each = statistics.median(once)
    return {
        "prepare, 512² crops, png, one process": row(1 / each, "pairs/s"),
        "prepare, share of the rate of decoding and encoding alone": row(statistics.median(bare) / each, ""),
        "prepare, time a pair at ten times the pairs, against once": row(
            statistics.median(tenfold) / each, "×", at_most=1.1
        ),
        "prepare, growth of peak memory at ten times the pairs": row(max(growth), "MiB"),
    }


def _prepared(refs: list[PairRef], source: Source) -> float:
    """Seconds a crop."""
    with tempfile.TemporaryDirectory() as temporary:
        config = prepare.PrepareConfig(out=Path(temporary) / "store", pairs_per_shard=4, use_ray=False)
        start = time.perf_counter()
        result = prepare.run(source, refs, config)
        return (time.perf_counter() - start) / result.manifest.num_pairs


def _bare(refs: list[PairRef]) -> float:
    """Seconds a crop of decoding both images and encoding their crops, nothing else."""
    start, count = time.perf_counter(), 0
    for ref in refs:
        for image in ref.read():
            for top in range(0, image.shape[0] - 511, 256):
                for left in range(0, image.shape[1] - 511, 256):
                    encode_png(image[top : top + 512, left : left + 512])
                    count += 1
    return (time.perf_counter() - start) / (count / 2)
