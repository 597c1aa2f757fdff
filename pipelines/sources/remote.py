"""Folders and images behind a URL, for adapters that were written for paths.

    root = place("s3://bucket/gopro")       # a path stays a Path
    root / "train", root.glob("*/*/sharp"), root.is_dir()      # answered from one listing

What lies below the first folder that is asked for is listed once, with sizes: a data set of 100,000 pairs is
some 200 requests, not one a file. Images are read by whoever decodes them.
"""

from __future__ import annotations

import os
import posixpath
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import lru_cache
from operator import itemgetter
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from nafnet_core import CapabilityError, InputError
from pipelines.images import MAX_MEGAPIXELS, Photo, read_photo
from pipelines.packed import Packed, in_order
from pipelines.scratch import scratch_folder
from pipelines.storage import RemoteFolder
from pipelines.urls import absolute, is_url, local_path


class _Listing:
    """What is known of a file system behind a URL; one object a process and URL."""

    def __init__(self, url: str) -> None:
        self.folder = RemoteFolder(url)
        # Paths and sizes of the files below a folder, and of those right in one, sorted by path.
        self._whole: dict[str, Packed[tuple[str, int]]] = {}
        self._flat: dict[str, Packed[tuple[str, int]]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return _listing, (self.folder.url,)  # workers read images, and need to know nothing of others

    def know(self, path: str, *, recursive: bool) -> Packed[tuple[str, int]]:
        """List a folder, unless that was done; with what lies beside it, where that came with it."""
        for known, files in self._whole.items():
            if f"{path}/".startswith(f"{known}/" if known else ""):
                return files
        listings = self._whole if recursive else self._flat
        if path not in listings:
            listings[path] = Packed(in_order(self.folder.files_below(path, recursive=recursive)))
        return listings[path]

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none."""
        files = self.know(path.rpartition("/")[0], recursive=False)
        index = bisect_left(files, path, key=itemgetter(0))
        return files[index][1] if index < len(files) and files[index][0] == path else None

    def below(self, path: str) -> Iterator[str]:
        """Paths of all files below a folder, sorted."""
        files, prefix = self.know(path, recursive=True), f"{path}/" if path else ""
        for index in range(bisect_left(files, prefix, key=itemgetter(0)), len(files)):
            if not files[index][0].startswith(prefix):
                return
            yield files[index][0]


@lru_cache(maxsize=64)
def _listing(url: str) -> _Listing:
    return _Listing(url)


class RemotePath:
    """A file or folder behind a URL, with those methods of `Path` that adapters use, and `EncodedImage`'s."""

    __slots__ = ("_listing", "_path")

    def __init__(self, listing: _Listing, path: str) -> None:
        """`path` from the listing's folder, with `/` and without `..`."""
        self._listing, self._path = listing, path

    def __reduce__(self) -> tuple[object, ...]:
        return RemotePath, (self._listing, self._path)

    # As a path

    def __str__(self) -> str:
        return self._listing.folder.at(self._path)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __hash__(self) -> int:
        return hash(self._path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._key == other._key

    def __lt__(self, other: RemotePath) -> bool:
        return self._key < other._key

    @property
    def _key(self) -> tuple[str, str]:
        return self._listing.folder.url, self._path

    def __truediv__(self, name: str | os.PathLike[str]) -> RemotePath:
        path = posixpath.normpath(posixpath.join("/", self._path, os.fspath(name)))
        if os.fspath(name).startswith("/"):
            raise InputError("a path from the root, which a bucket does not have", file=os.fspath(name))
        return RemotePath(self._listing, path.strip("/"))

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self._path or self._listing.folder.name)

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._listing, self._path.rpartition("/")[0])

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return PurePosixPath(self._path).relative_to(other._path)

    def is_below(self, other: RemotePath) -> bool:
        """Whether it lies in a folder of the same bucket or server."""
        same = self._listing.folder.url == other._listing.folder.url
        return same and f"{self._path}/".startswith(f"{other._path}/" if other._path else "")

    def is_file(self) -> bool:
        return self._listing.size(self._path) is not None

    def is_dir(self) -> bool:
        return next(self._listing.below(self._path), None) is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def names_below(self) -> Iterator[str]:
        """Paths from here of all files below, sorted."""
        skip = len(self._path) + 1 if self._path else 0
        return (path[skip:] for path in self._listing.below(self._path))

    def glob(self, pattern: str) -> list[RemotePath]:
        """Files and folders that match, each part of the pattern a part of the path, sorted."""
        parts = pattern.split("/")
        starts = (name.split("/")[: len(parts)] for name in self.names_below())
        matching = {"/".join(s) for s in starts if len(s) == len(parts) and all(map(fnmatchcase, s, parts))}
        return [self / name for name in sorted(matching, key=lambda name: name.split("/"))]

    def fetch(self, target: Path) -> None:
        """Copy the file to a disk."""
        self._listing.folder.fetch(self._path, target)

    # As an image

    def content(self) -> bytes:
        """Fetch it.

        Raises:
            InputError: it is missing.
            CapabilityError: the storage does not answer, or refuses: no fault of the image.
        """
        try:
            return self._listing.folder.read(self._path)
        except FileNotFoundError as error:
            raise InputError("no such image", file=str(self)) from error
        except InputError as error:
            raise CapabilityError(str(error)) from error

    def read_photo(self, *, max_megapixels: float = MAX_MEGAPIXELS) -> Photo:
        """Fetch and decode it.

        Raises:
            InputError: it is missing, no image, or damaged.
            CapabilityError: as `content`.
        """
        return read_photo(self.content(), name=str(self), max_megapixels=max_megapixels)

    def size_bytes(self) -> int:
        """As it was listed; -1 where it was not there."""
        size = self._listing.size(self._path)
        return -1 if size is None else size

    def read_bytes(self, start: int, count: int) -> bytes:
        """A part of its content; nothing where it has gone meanwhile."""
        try:
            return self._listing.folder.read(self._path, start, count)
        except FileNotFoundError as error:
            return f"{self}: {error}".encode() if start == 0 else b""


AnyPath = Path | RemotePath


def place(text: str | os.PathLike[str]) -> AnyPath:
    """A path, or the file or folder behind a URL."""
    text = local_path(text)
    if not is_url(text):
        return Path(text)
    # From the root of the bucket or server, so that lists may name what lies beside them.
    base, question, query = absolute(text).partition("?")
    scheme, _, rest = base.partition("://")
    authority, _, path = rest.partition("/")
    return RemotePath(_listing(f"{scheme}://{authority}{question}{query}"), unquote(path))


def beside(parent: AnyPath, text: str) -> AnyPath:
    """What a list in folder `parent` means by a text: a URL, or a path from there."""
    return place(text) if is_url(text) else parent / text


def list_together(images: Iterable[object]) -> None:
    """Look up files of a list by as few requests as can be: below their common folder, if they have one."""
    common: dict[_Listing, str] = {}
    for image in images:
        if isinstance(image, RemotePath):
            folder = image.parent._path
            common[image._listing] = posixpath.commonpath((common.get(image._listing, folder), folder))
    for listing, path in common.items():
        if path:
            listing.know(path, recursive=True)


def text_lines(path: AnyPath) -> Iterator[str]:
    """Lines of a list, without their ends. Raises `InputError` where it is no text in UTF-8."""
    with ExitStack() as stack:
        if isinstance(path, Path):
            local = path
        else:
            local = stack.enter_context(scratch_folder()) / "list.txt"
            path.fetch(local)
        try:
            for line in stack.enter_context(local.open(encoding="utf-8-sig")):
                yield line.removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError("not a text file", file=path, got=error) from error
