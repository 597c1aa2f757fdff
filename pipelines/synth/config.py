"""What `run` is asked for and what it answers, and the record of it in the output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from nafnet_core import InputError
from nafnet_core.blur import BlurKind, Degradation, draw_degradation, sample_rng
from pipelines.config import BlurSection
from pipelines.files import make_folder, write_json
from pipelines.images import list_images

SETTINGS, RECORDS, SHEET = "synth.json", "degradations.jsonl", "contact_sheet.png"
SIDES = ("blur", "sharp")
MIN_SIDE_PX = 64
_SCHEMA_VERSION = 1
_DEFAULTS = BlurSection()
# What a pair's pixels do not hang on: with these changed, the pairs that are there remain right.
_NOT_IN_PIXELS = ("sharp", "out", "variants", "kernels", "address", "use_ray")
# Options that came later, as pairs were made until then.
_BEFORE_THEY_WERE = {"encoded_share": 0.0}
_OF_PHOTOS_ONLY = ("variants", "kinds", "min_size_px", "max_size_px", "kernels")


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """What `run` makes of which photos or frames."""

    sharp: Sequence[Path]
    """Photos, or folders of them; with `average`, videos, folders of frames, or folders of either."""
    out: Path
    seed: int = 0
    variants: int = 1
    """Differently blurred copies of each photo."""
    # Of these, what is not said here is as in `BlurSection`.
    kinds: tuple[BlurKind, ...] = _DEFAULTS.kinds
    min_size_px: float = _DEFAULTS.min_size_px
    max_size_px: float = _DEFAULTS.max_size_px
    max_noise: float | None = None
    """None: as there for photos; 0 for averaged frames, which bring the noise of their camera."""
    min_jpeg_quality: int | None = _DEFAULTS.min_jpeg_quality
    encoded_share: float = _DEFAULTS.encoded_share
    max_side_px: int | None = None
    """Photos and frames are shrunk (by area) to this longer side first."""
    kernels: Path | None = None
    average: tuple[int, int] | None = None
    """Frames in a window, from and to, both odd: each pair averages a number drawn from these, and the frame
    in the middle is the sharp one (Nah et al., CVPR 2017, section 2: 7 to 13). None blurs photos."""
    window_stride: int | None = None
    """Frames from the start of a window to that of the next; None: the window's length, so none overlap."""
    address: str | None = field(default=None, compare=False)
    """Ray cluster to work on, as `cluster.connect` takes it; it must see the folders. None: this machine."""
    use_ray: bool | None = field(default=None, compare=False)
    """None: with an `address`, or where this machine has cores and the run jobs enough, see `pairs.py`."""


@dataclass(frozen=True, kw_only=True)
class SynthResult:
    """Where the pairs are, what was refused, and what else is worth knowing."""

    out: Path
    num_pairs: int
    refused: tuple[str, ...]
    """One line for each photo, sequence or window that no pair was made of."""
    contact_sheet: Path
    notes: tuple[str, ...] = ()
    """Of frames: what each sequence is, and what looks odd about it."""
    num_kept: int = 0
    """Pairs among `num_pairs` that an earlier run had made."""


def check(config: SynthConfig) -> None:
    """Raise `InputError` where options are impossible, or make no sense together."""
    if config.variants < 1:
        raise InputError("variants must be at least 1", got=config.variants)
    try:
        draw(config, sample_rng(config.seed, 0))
    except ValueError as error:
        raise InputError(f"blur that cannot be: {error}") from error
    if config.average is None:
        if config.window_stride is not None:
            raise InputError("a window stride is for frames", fix="Add --average 7")
        _check_kernels(config)
        return
    low, high = config.average
    if not (3 <= low <= high and low % 2 and high % 2):
        raise InputError(
            "unusable number of frames to average",
            expected="odd numbers from 3 on, as 7 or 7:15: the middle frame is the sharp one",
            got=f"{low}:{high}" if low != high else low,
        )
    if config.window_stride is not None and config.window_stride < 1:
        raise InputError("the window stride must be at least 1", got=config.window_stride)
    given = [name for name in _OF_PHOTOS_ONLY if getattr(config, name) != getattr(SynthConfig, name)]
    if given:
        raise InputError(
            f"{', '.join(given)}: for photos, not for frames",
            expected="frames have their own blur",
            fix="Leave out --average, or these",
        )


def _check_kernels(config: SynthConfig) -> None:
    if config.kernels and "measured" not in config.kinds:
        raise InputError("kernels are for the kind `measured`", fix="Add --kind measured")
    if "measured" in config.kinds and not config.kernels:
        raise InputError("the kind `measured` needs kernels", fix="Give their folder with --kernels")


def draw(config: SynthConfig, rng: np.random.Generator) -> Degradation:
    """Draw the degradation of one pair. Raises `ValueError` where the options are impossible."""
    return draw_degradation(
        rng,
        kinds=config.kinds,
        min_size_px=config.min_size_px,
        max_size_px=config.max_size_px,
        max_noise=_max_noise(config),
        min_jpeg_quality=config.min_jpeg_quality,
        encoded_share=config.encoded_share,
    )


def _max_noise(config: SynthConfig) -> float:
    if config.max_noise is not None:
        return config.max_noise
    return _DEFAULTS.max_noise if config.average is None else 0.0


def claim(config: SynthConfig, kernels: Mapping[str, str]) -> None:
    """Record the settings in the output folder, so that pairs of several settings never lie there together.

    Args:
        kernels: name → SHA-256 of each measured kernel.

    Raises:
        InputError: the folder cannot be written, or holds pairs that were made otherwise.
    """
    make_folder(config.out)
    options = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_PIXELS}
    options |= {"max_noise": _max_noise(config), "kernels": dict(kernels), "schema_version": _SCHEMA_VERSION}
    settings = json.loads(json.dumps(options))  # so that it compares with what was written
    path = config.out / SETTINGS
    try:
        earlier = json.loads(path.read_text()) if path.exists() else {}
        assert isinstance(earlier, dict)
        if earlier:
            earlier = _BEFORE_THEY_WERE | earlier
    except (ValueError, AssertionError) as error:
        raise InputError("damaged settings", file=path, fix="Remove the folder") from error
    changed = [name for name in settings | earlier if settings.get(name) != earlier.get(name)]
    images = existing_images(config.out)
    if changed and images:
        words = [name for name in changed if earlier] or ["no settings"]
        raise InputError(
            f"{len(images)} images of another run in this folder, made with other settings",
            file=config.out,
            expected=", ".join(f"{name} {_shown(earlier.get(name))}" for name in words),
            got=", ".join(f"{name} {_shown(settings.get(name))}" for name in words),
            fix="Run the command that made them, remove the folder, or choose another --out",
        )
    if changed:
        write_json(path, settings)


def refuse_other_pairs(out: Path, keys: set[str]) -> None:
    """Pairs left of another run, among this one's, would be prepared and trained on with them."""
    for side in SIDES:
        others = [
            path for path in existing_images(out, side) if path.relative_to(out / side).as_posix() not in keys
        ]
        if others:
            raise InputError(
                f"{len(others)} images of another run in this folder",
                file=others[0],
                fix="Remove the folder, or choose another --out",
            )


def existing_images(out: Path, *sides: str) -> list[Path]:
    """Images that lie in the output folder already."""
    folders = [out / side for side in sides or SIDES]
    return [path for folder in folders if folder.is_dir() for path in list_images(folder)]


def _shown(value: object) -> str:
    return f"{len(value)} files" if isinstance(value, dict) else str(value)
