"""What is to be restored, and what each result is called."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nafnet_core import InputError
from pipelines.images import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, image_names
from pipelines.sources.remote import AnyPath, place
from pipelines.urls import is_url, public

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One photo or video, and its result's place below the output folder."""

    source: AnyPath
    output: str

    @property
    def is_video(self) -> bool:
        return self.source.suffix.lower() in VIDEO_SUFFIXES

    @property
    def name(self) -> str:
        """As it may be shown and written down."""
        return public(str(self.source))


def find_items(inputs: Sequence[str], out: str, *, suffix: str | None = None) -> list[Item]:
    """Photos and videos that arguments name, each once, with results that are called differently.

    A result keeps the name of its photo, below the folder or the fixed part of the glob that named it. Of two
    that would be called the same, the second has a sign of where it lies added: `a.png`, `a~3f01c2.png`.

    Args:
        inputs: files, folders (recursive), globs, or URLs of files and folders.
        out: folder or URL of the results. What lies in it is left out.
        suffix: of all results but videos; None keeps that of each photo.

    Raises:
        InputError: no such file or folder, nothing to restore in it, or all of it lies in the output folder,
            where it would be overwritten.
    """
    found = [pair for name in inputs for pair in _sources_of(name)]
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise InputError("no photos", file=public(inputs[0]), expected=kinds)
    outside = [pair for pair in found if not _lies_in(pair[0], out)]
    if not outside:
        raise InputError(
            "the photos lie in the output folder, and would be overwritten",
            file=public(out),
            fix="Choose another --out",
        )
    items: dict[AnyPath, Item] = {}
    names: set[str] = set()
    for source, relative in outside:
        if source in items:
            continue
        name = _result_name(relative, suffix)
        if name in names:
            sign = hashlib.sha256(str(source.parent if suffix is None else source).encode()).hexdigest()[:6]
            name = str(PurePosixPath(name).with_stem(f"{PurePosixPath(name).stem}~{sign}"))
        if name in names:
            raise InputError(
                "two photos of one name", file=str(source), fix="Restore their folders one by one"
            )
        names.add(name)
        items[source] = Item(source=source, output=name)
    return list(items.values())


def _result_name(relative: str, suffix: str | None) -> str:
    path = PurePosixPath(relative)
    kind = path.suffix.lower()
    if kind in VIDEO_SUFFIXES:
        return relative
    if suffix is not None:
        return str(path.with_suffix(suffix))
    return relative if kind in IMAGE_SUFFIXES else f"{relative}.png"


def _sources_of(name: str) -> Iterator[tuple[AnyPath, str]]:
    """Photos that one argument names, each with its path below that."""
    root = place(name)
    if isinstance(root, Path) and (root.is_symlink() or root.exists()) and not root.is_dir():
        yield root, root.name
    elif root.is_dir():
        # Videos are decoded from a disk only.
        suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES if isinstance(root, Path) else IMAGE_SUFFIXES
        yield from ((root / each, each) for each in sorted(image_names(root, suffixes)))
    elif not isinstance(root, Path) and root.is_file():
        yield root, root.name
    else:
        matches = [] if is_url(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise InputError("no such file, folder or match", file=public(name))
        fixed = _fixed_part(name)
        for match in map(Path, matches):
            if match.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not match.is_dir():
                yield match, match.relative_to(fixed).as_posix()


def _fixed_part(pattern: str) -> Path:
    """The folder of a glob above its first part that is one."""
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _lies_in(source: AnyPath, out: str) -> bool:
    if isinstance(source, Path):
        # Resolved, since `photos/../photos` and a link name the same folder, and photos would be overwritten.
        return not is_url(out) and os.path.realpath(source).startswith(f"{os.path.realpath(out)}{os.sep}")
    target = place(out)
    return not isinstance(target, Path) and source.is_below(target)


def warn_of_foreign(inputs: Sequence[str]) -> None:
    """Say how many pictures of other kinds lie in the folders."""
    folders = [Path(name) for name in inputs if not is_url(name) and Path(name).is_dir()]
    foreign = [name for folder in folders for name in image_names(folder, FOREIGN_SUFFIXES)]
    if foreign:
        kinds = ", ".join(sorted({PurePosixPath(name).suffix.lower() for name in foreign}))
        number = f"{len(foreign)} file{'s' if len(foreign) > 1 else ''}"
        log.warning("passed over %s of kinds that are not read: %s", number, kinds)
