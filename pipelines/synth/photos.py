"""Pairs from sharp photos: each is blurred `variants` times by a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nafnet_core import InputError
from nafnet_core.blur import degrade
from pipelines.images import list_images, read_rgb_u8
from pipelines.synth.config import MIN_SIDE_PX, SynthConfig, draw
from pipelines.synth.frames import is_video
from pipelines.synth.kernels import MeasuredKernel
from pipelines.synth.writing import Made, is_made, link, make_folders, pair_paths, pair_rng, shrunk, write_png


@dataclass(frozen=True, kw_only=True)
class PhotoJob:
    """One photo. `name` is that of its folder under blur/ and sharp/."""

    name: str
    path: Path

    def keys(self, variants: int) -> list[str]:
        return [f"{self.name}/{variant}" for variant in range(variants)]


def find_photos(config: SynthConfig) -> list[PhotoJob]:
    """Each photo with its name: its path below its root, with a number where that is taken.

    Raises:
        InputError: no such folder, or no photo in any.
    """
    found: dict[Path, str] = {}
    out = config.out.resolve()
    num_inside = 0
    for root in config.sharp:
        if root.is_file() and is_video(root):
            raise InputError("a video, not a photo", file=root, fix="Add --average 7 to average its frames")
        for path in [root] if root.is_file() else list_images(root):
            # What an earlier run wrote there is blurred already; a photo may be named twice, as itself and
            # by its folder.
            if out in path.resolve().parents:
                num_inside += 1
            elif path not in found:
                below = path.name if root.is_file() else path.relative_to(root).as_posix()
                found[path] = below
    if not found and num_inside:
        raise InputError(
            "the photos lie in the output folder", file=out, fix="Choose another --out, outside of the photos"
        )
    if not found:
        raise InputError(
            "no photos in this folder", file=config.sharp[0], expected="png, jpg, tif, webp or bmp"
        )
    names = unique_names(Path(below).with_suffix("").as_posix() for below in found.values())
    return sorted(
        (PhotoJob(name=name, path=path) for name, path in zip(names, found, strict=True)),
        key=lambda job: job.name,
    )


def unique_names(paths: Iterable[str]) -> list[str]:
    """Names of one folder each for relative paths, in their order, with a number where one is taken."""
    names: dict[str, None] = {}
    for path in paths:
        name = stem = path.replace("/", "_")
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names[name] = None
    return list(names)


def blur_photo(job: PhotoJob, config: SynthConfig, kernels: Sequence[MeasuredKernel]) -> Made:
    """Make the pairs of one photo that are not there yet."""
    keys = job.keys(config.variants)
    try:
        made = [is_made(config.out, key, [job.path]) for key in keys]
        records = _blur_missing(job, config, kernels, dict(zip(keys, made, strict=True)))
    except InputError as error:
        return Made(refused=str(error))
    return Made(records=tuple(records), num_kept=sum(made))


def _blur_missing(
    job: PhotoJob, config: SynthConfig, kernels: Sequence[MeasuredKernel], made: dict[str, bool]
) -> list[dict[str, object]]:
    sharp = None
    if not all(made.values()):
        sharp = shrunk(read_rgb_u8(job.path), config.max_side_px)
        if min(sharp.shape[:2]) < MIN_SIDE_PX:
            raise InputError(
                "photo too small", file=job.path, expected=f"{MIN_SIDE_PX} px a side", got=sharp.shape[:2]
            )
        make_folders(config.out, job.name)
        first = pair_paths(config.out, next(iter(made)))[1]
        if not next(iter(made.values())):
            write_png(first, sharp)
    records = []
    for variant, (key, is_there) in enumerate(made.items()):
        rng = pair_rng(config.seed, job.name, variant)
        degradation = draw(config, rng)
        record = {"key": key, "photo": str(job.path), "seed": config.seed, **degradation.to_dict()}
        chosen = None
        if degradation.kind == "measured":
            # Drawn here, to be recorded; of a single kernel the core draws nothing.
            chosen = kernels[int(rng.integers(len(kernels)))]
            record |= {"kernel": chosen.name, "kernel_sha256": chosen.sha256}
        records.append(record)
        if sharp is None or is_there:
            continue
        blur_path, sharp_path = pair_paths(config.out, key)
        # The sharp one first: who stops between them leaves no blurred image that seems complete.
        if variant:
            link(first, sharp_path)
        measured = [chosen.kernel] if chosen else []
        write_png(blur_path, degrade(sharp, degradation, rng, measured_kernels=measured))
    return records
