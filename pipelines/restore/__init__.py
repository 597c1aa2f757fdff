"""Deblur photos and videos: files, folders, globs or buckets; no ground truth needed.

    nafnet restore holiday/ --out restored/
    nafnet restore photo.jpg --model runs/mine
    nafnet restore s3://bucket/photos --out s3://bucket/restored --address auto

Each output keeps its photo's name, format, bit depth, alpha, EXIF and ICC; pixels come out upright. What was
done is in `OUT/restore.jsonl`; photos that it lists with the same content, model and settings are skipped
next time, if their results are still what was written then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from nafnet_core import InputError
from pipelines.encoding import JPEG_QUALITY
from pipelines.images import IMAGE_SUFFIXES
from pipelines.models import LoadedModel
from pipelines.restore.finding import Item, find_items, warn_of_foreign
from pipelines.restore.record import RECORD, Record, Restored
from pipelines.restorer import Restorer, RestoreSettings
from pipelines.storage import folder

__all__ = ["RECORD", "RestoreConfig", "RestoreResult", "Restored", "find_items", "run"]


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """What `run` restores, and how. Raises `InputError` where that cannot be."""

    inputs: Sequence[str]
    """Files, folders (recursive), globs, or URLs of files and folders."""
    out: str
    """Folder or URL for the results, which keep the folders below their inputs."""
    settings: RestoreSettings = RestoreSettings()
    suffix: str | None = None
    """Format of all photos, as `.png`; None keeps that of each."""
    quality: int = JPEG_QUALITY
    """1 to 100, of JPEG and WebP."""
    stop_on_error: bool = False
    """Raise at the first bad photo, instead of going on with the next."""
    use_ray: bool = False
    """On the cluster that this process is connected to."""
    num_workers: int | None = None
    """On the cluster; None is one for each GPU, or for each CPU where there is no GPU."""

    def __post_init__(self) -> None:
        if self.suffix is not None and self.suffix not in IMAGE_SUFFIXES:
            raise InputError("unknown format", got=self.suffix, expected=" ".join(sorted(IMAGE_SUFFIXES)))
        if not 1 <= self.quality <= 100:
            raise InputError("the quality of JPEG and WebP", expected="1 to 100", got=self.quality)

    def items(self) -> list[Item]:
        """What there is to restore; see `find_items`."""
        return find_items(self.inputs, self.out, suffix=self.suffix)


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """A whole call."""

    out: str
    files: tuple[Restored, ...]
    """In the order of the inputs."""
    seconds: float
    """From the first photo to the last, reading and writing included."""

    def count(self, status: str) -> int:
        """Files with this status."""
        return sum(file.status == status for file in self.files)

    @property
    def images_per_s(self) -> float:
        """Restored photos and frames, a second."""
        images = sum(file.num_frames or 1 for file in self.files if file.status == "restored")
        return images / self.seconds if self.seconds else 0.0


def run(
    config: RestoreConfig,
    loaded: LoadedModel,
    *,
    on_progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> RestoreResult:
    """Restore every photo and video that `config` names.

    Args:
        config: what, and how.
        loaded: the model.
        on_progress: files done, all files, and how far the next one is.

    Raises:
        InputError: nothing to restore, a folder that cannot be written or that nodes do not share, or a bad
            photo with `stop_on_error`.
        CapabilityError: a bucket does not answer; what was done until then is kept.
    """
    items = config.items()
    warn_of_foreign(config.inputs)
    out = folder(config.out)
    out.make()
    record = Record(out)
    results: dict[str, Restored] = {}

    def on_part(note: str) -> None:
        on_progress(len(results), len(items), note)

    start = time.perf_counter()
    with record.opened() as writer, closing(_work(config, items, record, loaded, on_part)) as entries:
        for entry in entries:
            if entry.status != "skipped":
                writer.add(entry)
            if entry.status == "failed" and config.stop_on_error:
                raise InputError(entry.error or "a photo failed")
            results[entry.output] = entry
            on_progress(len(results), len(items), "")
    seconds = time.perf_counter() - start
    return RestoreResult(out=config.out, files=tuple(results[item.output] for item in items), seconds=seconds)


def _work(
    config: RestoreConfig,
    items: Sequence[Item],
    record: Record,
    loaded: LoadedModel,
    on_part: Callable[[str], None],
) -> Iterator[Restored]:
    out, before = folder(config.out), record.entries()
    if config.use_ray:
        loaded.check_travels()
        from pipelines.restore.cluster import restore_on_cluster

        return restore_on_cluster(
            items,
            before,
            loaded,
            config.settings,
            out,
            quality=config.quality,
            num_workers=config.num_workers,
        )
    from pipelines.restore.work import FileWork

    work = FileWork(Restorer(loaded, config.settings), out, quality=config.quality, on_part=on_part)
    return work.run(items, before)
