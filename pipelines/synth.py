"""Blurred/sharp pairs from sharp photos.

    nafnet synth photos/ --out pairs/ --variants 4
    nafnet synth photos/ --out pairs/ --max-side 320 --variants 1      # a laptop's minute

Writes `pairs/blur/NAME/0.png`, `pairs/sharp/NAME/0.png`, `pairs/degradations.jsonl` with the parameters of
each pair, and `pairs/contact_sheet.png` to look at. The same seed and file name give the same pixels.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from nafnet_core import InputError
from nafnet_core.blur import BlurKind, Degradation, degrade, draw_degradation, sample_rng
from nafnet_core.kernels import Kernel, centred
from pipelines.files import make_folder, written_aside
from pipelines.images import list_images, read_rgb_u8
from pipelines.pictures import label_bar
from pipelines.png import encode_png

MIN_SIDE_PX = 64
_SHEET_PAIRS, _SHEET_SIDE_PX, _LABEL_CHARS = 8, 240, 32


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """What `run` makes of which photos."""

    sharp: Sequence[Path]
    """Photos, or folders of them."""
    out: Path
    seed: int = 0
    variants: int = 1
    """Differently blurred copies of each photo."""
    kinds: tuple[BlurKind, ...] = ("shake",)
    min_size_px: float = 3.0
    max_size_px: float = 15.0
    """Range of the blur's extent. GoPro's blurs reach some 30 px at 1280×720."""
    max_noise: float = 0.004
    """Upper end of the read noise, linear light, 1.0 being white: 0.004 is a phone at ISO 400 or so."""
    min_jpeg_quality: int | None = None
    """Blurred images are compressed, at qualities from this to 95; None leaves them as they are."""
    max_side_px: int | None = None
    """Photos are shrunk (by area) to this longer side first."""
    kernels: Path | None = None
    """Folder of measured kernels as gray images, for the kind `measured`."""


@dataclass(frozen=True, kw_only=True)
class SynthResult:
    """Where the pairs are, and what was refused."""

    out: Path
    num_pairs: int
    refused: tuple[str, ...]
    contact_sheet: Path


def run(
    config: SynthConfig, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> SynthResult:
    """Blur every photo `variants` times, in threads; files that are there already are made again.

    Raises:
        InputError: no photos, unreadable kernels, an unusable range, or a folder that cannot be written.
    """
    if config.variants < 1:
        raise InputError("variants must be at least 1", got=config.variants)
    try:
        _draw(config, sample_rng(config.seed, 0))
    except ValueError as error:
        raise InputError(f"blur that cannot be: {error}") from error
    photos = _photos(config.sharp, config.out)
    kernels = _read_kernels(config.kernels) if config.kernels else []
    if kernels and "measured" not in config.kinds:
        raise InputError("kernels are for the kind `measured`", fix="Add --kind measured")
    if "measured" in config.kinds and not kernels:
        raise InputError("the kind `measured` needs kernels", fix="Give their folder with --kernels")
    make_folder(config.out)
    _refuse_other_pairs(config, [name for name, _ in photos])
    records: list[dict[str, object]] = []
    refused: list[str] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [pool.submit(_blur_photo, name, path, config, kernels) for name, path in photos]
        for done, job in enumerate(jobs, start=1):
            try:
                records += job.result()
            except InputError as error:
                refused.append(str(error))
            on_progress(done, len(jobs))
    if not records:
        raise InputError("none of the photos could be used", file=config.out, got=refused[0])
    with written_aside(config.out / "degradations.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    sheet = config.out / "contact_sheet.png"
    _draw_sheet(config.out, [str(record["key"]) for record in records], sheet)
    return SynthResult(out=config.out, num_pairs=len(records), refused=tuple(refused), contact_sheet=sheet)


def _photos(paths: Sequence[Path], out: Path) -> list[tuple[str, Path]]:
    """Each photo with the name of its output folder: its path below its root, with a number where taken."""
    found: dict[str, Path] = {}
    num_inside = 0
    for root in paths:
        files = [root] if root.is_file() else list_images(root)
        for path in files:
            # What an earlier run wrote there is blurred already; a photo may be named twice, as itself and
            # by its folder.
            if out.resolve() in path.resolve().parents:
                num_inside += 1
                continue
            if path in found.values():
                continue
            stem = path.stem if root.is_file() else path.relative_to(root).with_suffix("").as_posix()
            name = stem = stem.replace("/", "_")
            number = 1
            while name in found:
                number += 1
                name = f"{stem}-{number}"
            found[name] = path
    if not found and num_inside:
        raise InputError(
            "the photos lie in the output folder", file=out, fix="Choose another --out, outside of the photos"
        )
    if not found:
        raise InputError("no photos in this folder", file=paths[0], expected="png, jpg, tif, webp or bmp")
    return sorted(found.items())


def _refuse_other_pairs(config: SynthConfig, names: Sequence[str]) -> None:
    """Pairs of another run, left among this one's, would be prepared and trained on with them."""
    ours = {f"{name}/{variant}.png" for name in names for variant in range(config.variants)}
    for side in (config.out / "blur", config.out / "sharp"):
        found = list_images(side) if side.is_dir() else []
        others = [path for path in found if path.relative_to(side).as_posix() not in ours]
        if others:
            raise InputError(
                f"{len(others)} images of another run in this folder",
                file=others[0],
                fix="Remove the folder, or choose another --out",
            )


def _blur_photo(
    name: str, path: Path, config: SynthConfig, kernels: Sequence[Kernel]
) -> list[dict[str, object]]:
    sharp = _shrunk(read_rgb_u8(path), config.max_side_px)
    if min(sharp.shape[:2]) < MIN_SIDE_PX:
        raise InputError(
            "photo too small", file=path, expected=f"{MIN_SIDE_PX} px a side", got=sharp.shape[:2]
        )
    folders = [config.out / side / name for side in ("blur", "sharp")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    records = []
    for variant in range(config.variants):
        # From seed, name and variant only, not from order or threads.
        rng = sample_rng(config.seed, zlib.crc32(name.encode()) << 32 | variant)
        degradation = _draw(config, rng)
        blurred = degrade(sharp, degradation, rng, measured_kernels=kernels)
        _write_png(folders[0] / f"{variant}.png", blurred)
        if variant == 0:
            _write_png(folders[1] / "0.png", sharp)
        else:
            _link(folders[1] / "0.png", folders[1] / f"{variant}.png")
        records.append(
            {"key": f"{name}/{variant}", "photo": str(path), "seed": config.seed, **degradation.to_dict()}
        )
    return records


def _draw(config: SynthConfig, rng: np.random.Generator) -> Degradation:
    return draw_degradation(
        rng,
        kinds=config.kinds,
        min_size_px=config.min_size_px,
        max_size_px=config.max_size_px,
        max_noise=config.max_noise,
        min_jpeg_quality=config.min_jpeg_quality,
    )


def _write_png(path: Path, image: NDArray[np.uint8]) -> None:
    with written_aside(path) as temporary:
        temporary.write_bytes(encode_png(image))


def _link(source: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, path)


def _shrunk(image: NDArray[np.uint8], max_side_px: int | None) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if max_side_px is None or max(height, width) <= max_side_px:
        return image
    scale = max_side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _read_kernels(folder: Path) -> list[Kernel]:
    kernels = []
    for path in list_images(folder):
        try:
            kernels.append(centred(read_rgb_u8(path).mean(axis=2)))
        except ValueError as error:
            raise InputError("not a blur kernel", file=path, got=str(error)) from error
    if not kernels:
        raise InputError("no kernels in this folder", file=folder, expected="gray images")
    return kernels


def _draw_sheet(out: Path, keys: Sequence[str], path: Path) -> None:
    """Rows of blurred and sharp side by side, of pairs spread evenly over all."""
    chosen = [keys[i] for i in np.linspace(0, len(keys) - 1, min(_SHEET_PAIRS, len(keys))).astype(int)]
    cells = []
    for key in chosen:
        sides = [read_rgb_u8(out / side / f"{key}.png") for side in ("blur", "sharp")]
        height, width = sides[0].shape[:2]
        side = min(height, width, _SHEET_SIDE_PX)
        top, left = (height - side) // 2, (width - side) // 2
        cell = np.hstack([image[top : top + side, left : left + side] for image in sides])
        canvas = np.full((_SHEET_SIDE_PX, 2 * _SHEET_SIDE_PX + 8, 3), 255, np.uint8)
        canvas[:side, : 2 * side] = cell
        cells.append(np.vstack([label_bar(f"{_ascii(key)}: blurred, sharp", canvas.shape[1]), canvas]))
    if len(cells) % 2:
        cells.append(np.full_like(cells[0], 255))
    rows = [np.hstack(cells[i : i + 2]) for i in range(0, len(cells), 2)]
    _write_png(path, np.vstack(rows))


def _ascii(name: str) -> str:
    """What OpenCV's fonts can draw of a name, its end where it is long."""
    return name.encode("ascii", "replace").decode()[-_LABEL_CHARS:]
