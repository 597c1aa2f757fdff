"""Deblur photos: files, folders or globs; no ground truth needed.

    nafnet restore holiday/ --out restored/
    nafnet restore photo.jpg --model runs/mine

Each output keeps its photo's name, format, bit depth, alpha, EXIF and ICC; pixels come out upright. What was
done is in `OUT/restore.jsonl`; photos that it lists with the same content and model are skipped next time.
"""

from __future__ import annotations

import glob
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nafnet_core import InputError, NAFNet
from nafnet_core.tiling import MIN_OVERLAP_PX, auto_tile_px, restore_image
from pipelines.files import make_folder, sha256
from pipelines.images import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, list_images, read_photo, write_photo
from pipelines.models import LoadedModel

log = logging.getLogger(__name__)

RECORD = "restore.jsonl"
_MIN_BF16_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was done to one photo."""

    input: str
    output: str | None
    status: str
    """`restored`, `skipped` (done before) or `failed`."""
    error: str | None
    model_digest: str
    train_patch_px: int | None
    """Sets the window of local statistics; None where they were off."""
    input_digest: str | None
    width_px: int | None
    height_px: int | None
    tile_px: int | None
    """None where the whole image was run at once."""
    precision: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """A whole call."""

    out: Path
    files: tuple[Restored, ...]

    def count(self, status: str) -> int:
        """Photos with this status."""
        return sum(file.status == status for file in self.files)


def run(
    inputs: Sequence[str],
    loaded: LoadedModel,
    out: Path,
    *,
    tile_px: int | None = None,
    precision: str = "auto",
    stop_on_error: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> RestoreResult:
    """Restore every photo that `inputs` name into `out`, keeping the folders below them.

    Args:
        inputs: files, folders (recursive) or globs.
        loaded: the model.
        out: folder for the results.
        tile_px: side of a tile; None takes the whole image, or the largest tile that fits into free memory.
        precision: `fp32`, `bf16`, or `auto` for bf16 where the processor or GPU computes in it.
        stop_on_error: raise at the first bad photo, instead of going on with the next.
        on_progress: photos done, all photos, and which tile of the next one is done.

    Raises:
        InputError: nothing to restore, tiles that are too small, a folder that cannot be written, or a bad
            photo with `stop_on_error`.
    """
    if tile_px is not None and tile_px <= 2 * MIN_OVERLAP_PX:
        raise InputError("tiles too small", expected=f"more than {2 * MIN_OVERLAP_PX} px", got=tile_px)
    photos = find_photos(inputs, out)
    _warn_of_foreign(inputs)
    make_folder(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)
    use_bf16 = precision == "bf16" or (precision == "auto" and faster_in_bf16(loaded.model, device))
    done_before = _read_record(out)
    results = []
    with (out / RECORD).open("a") as record:
        for index, (photo, relative) in enumerate(photos):
            result = _restore_one(
                photo,
                out / relative,
                loaded,
                tile_px=tile_px,
                use_bf16=use_bf16,
                done_before=done_before,
                on_tile=lambda done, total, index=index, photo=photo: on_progress(
                    index, len(photos), f"{photo.name} tile {done}/{total}"
                ),
            )
            if result.status == "failed" and stop_on_error:
                raise InputError(result.error or "a photo failed")
            if result.status != "skipped":
                record.write(json.dumps(asdict(result)) + "\n")
                record.flush()
            results.append(result)
            on_progress(index + 1, len(photos), "")
    return RestoreResult(out=out, files=tuple(results))


def find_photos(inputs: Sequence[str], out: Path) -> list[tuple[Path, Path]]:
    """Photos and their place below the output folder. What lies in the output folder is left out.

    Raises:
        InputError: no such file or folder, or no photo in it; photos that lie in the output folder, where
            they would be overwritten; two photos that would share an output.
    """
    found = [item for name in inputs for item in _photos_of(name)]
    # Resolved, since `photos/../photos` and a link name the same folder, and photos would be overwritten.
    outside = [(path, relative) for path, relative in found if out.resolve() not in path.resolve().parents]
    if found and not outside:
        raise InputError(
            "the photos lie in the output folder, and would be overwritten",
            file=out,
            fix="Choose another --out",
        )
    if not found:
        raise InputError("no photos", file=inputs[0], expected=" ".join(sorted(IMAGE_SUFFIXES)))
    places: dict[Path, Path] = {}
    for path, relative in outside:
        if places.get(relative, path) != path:
            raise InputError(
                "two photos of one name",
                file=path,
                got=places[relative],
                fix="Restore their folders one by one",
            )
        places[relative] = path
    return [(path, relative) for relative, path in places.items()]


def _warn_of_foreign(inputs: Sequence[str]) -> None:
    foreign = [
        path for name in inputs for path in Path(name).rglob("*") if path.suffix.lower() in FOREIGN_SUFFIXES
    ]
    if foreign:
        kinds = ", ".join(sorted({path.suffix.lower() for path in foreign}))
        log.warning("passed over %d files of kinds that are not read: %s", len(foreign), kinds)


def _photos_of(name: str) -> list[tuple[Path, Path]]:
    """Photos that one argument names, each with its path below that."""
    root = Path(name)
    if root.is_file():
        return [(root, Path(root.name))]
    if root.is_dir():
        return [(path, path.relative_to(root)) for path in list_images(root)]
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    if not matches:
        raise InputError("no such file, folder or match", file=name)
    return [
        (path, Path(path.name))
        for path in matches
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
    ]


def faster_in_bf16(model: NAFNet, device: torch.device) -> bool:
    """Whether bf16 is worth its rounding: on tensor cores, or processors with bf16 instructions.

    On a CPU the conversions of a network narrower than 32 channels cost what its products gain (measured:
    `mobile` 5.5 s in bf16 and 4.9 s in fp32 on 6 megapixels, `width32` 5.9 s and 9.1 s on 3.7).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(has_instructions) and model.config.width >= _MIN_BF16_WIDTH


def _restore_one(
    photo: Path,
    output: Path,
    loaded: LoadedModel,
    *,
    tile_px: int | None,
    use_bf16: bool,
    done_before: dict[str, Restored],
    on_tile: Callable[[int, int], None],
) -> Restored:
    start = time.perf_counter()
    result = Restored(
        input=str(photo),
        output=None,
        status="failed",
        error=None,
        model_digest=loaded.digest,
        train_patch_px=loaded.train_patch_px,
        input_digest=None,
        width_px=None,
        height_px=None,
        tile_px=None,
        precision="bf16" if use_bf16 else "fp32",
        seconds=0.0,
    )
    try:
        digest = sha256(photo)
        before = done_before.get(str(output))
        if (
            before
            and output.is_file()
            and (before.input_digest, before.model_digest, before.train_patch_px)
            == (digest, loaded.digest, loaded.train_patch_px)
        ):
            return replace(before, input=str(photo), status="skipped", seconds=0.0)
        decoded = read_photo(photo)
        height, width = decoded.rgb_hwc.shape[:2]
        tile = tile_px or auto_tile_px(loaded.model)
        restored = restore_image(
            loaded.model,
            decoded.rgb_hwc,
            train_patch_px=loaded.train_patch_px,
            tile_px=tile,
            autocast=use_bf16,
            on_tile=on_tile,
        )
        make_folder(output.parent)
        write_photo(output, replace(decoded, rgb_hwc=restored))
        return replace(
            result,
            output=str(output),
            status="restored",
            input_digest=digest,
            width_px=width,
            height_px=height,
            tile_px=tile if max(height, width) > tile else None,
            seconds=time.perf_counter() - start,
        )
    # Torch raises RuntimeError where memory runs out: one huge photo must not stop the others.
    except (InputError, OSError, RuntimeError) as error:
        return replace(result, error=str(error).splitlines()[0], seconds=time.perf_counter() - start)


def _read_record(out: Path) -> dict[str, Restored]:
    """Latest entry for each output; a line cut short by a crash is passed over."""
    path = out / RECORD
    entries: dict[str, Restored] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = Restored(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        if entry.output is not None:
            entries[entry.output] = entry
    return entries
