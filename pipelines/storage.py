"""Folders of artifacts, on a disk or in a bucket.

    place = folder("s3://bucket/stores/gopro")      # any URL that pyarrow or fsspec knows; a path is a path
    place.read("manifest.json")

Credentials and end points come from where the file system's own tools look (`AWS_PROFILE`,
`AWS_ENDPOINT_URL`), or from the URL (`s3://bucket/x?region=eu-west-1`), of which messages and records show
what `public` leaves. A server that fails for a while is asked again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from nafnet_core import CapabilityError, InputError
from pipelines.files import NODE_ERRNOS, make_folder, sha256, written_aside
from pipelines.scratch import scratch_folder
from pipelines.urls import absolute, is_url, public

log = logging.getLogger(__name__)

_BLOCK_BYTES = 4 * 2**20
_SHOWN_CHARS = 160
# Half a minute, with the S3 client's own attempts 80 s: longer than throttling or a server's restart lasts.
_DELAYS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# What asking again does not change; pyarrow gives most of these as a plain OSError with a telling text.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_TEXTS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT")
# There a folder is a part of names; made as such it would be an empty object.
_WITHOUT_FOLDERS = ("s3", "gcs", "abfs")
_T = TypeVar("_T")


def folder(place: str | os.PathLike[str]) -> LocalFolder | RemoteFolder:
    """The folder at a path or URL; it need not be there."""
    return RemoteFolder(absolute(place)) if is_url(place) else LocalFolder(Path(place))


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder on a disk that every worker sees. Files appear whole or not at all."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        """Whole content of a small file. Raises `OSError`."""
        return (self.path / name).read_bytes()

    def at(self, name: str) -> str:
        """A file's place, to tell people."""
        return str(self.path / name)

    def sha256(self, name: str) -> str:
        """Hex SHA-256 of a file. Raises `OSError`."""
        return sha256(self.path / name)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def names(self) -> list[str]:
        """Files right in this folder, sorted; none where there is no such folder."""
        return sorted(path.name for path in self.path.glob("*") if path.is_file())

    def sizes(self) -> dict[str, int]:
        """Bytes of each file right in this folder; none where there is no such folder."""
        return {name: (self.path / name).stat().st_size for name in self.names()}

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with written_aside(self.path / name) as temporary:
            temporary.write_bytes(content)

    def upload(self, source: Path, name: str) -> None:
        """Copy a file there."""
        with written_aside(self.path / name) as temporary:
            shutil.copyfile(source, temporary)

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.name

    def make(self) -> None:
        """Make the folder. Raises `InputError` where it cannot be written."""
        make_folder(self.path)

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Yield the path where a file of this name is to be written, whole or not at all."""
        yield self.path / name

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a folder on a disk for what is needed meanwhile: this one, which goes away as a whole."""
        yield self.path

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def delete_halves(self, prefix: str) -> None:
        """Delete what runs that were killed have left of files whose names begin so."""
        for half in self.path.glob(f".{prefix}*.tmp"):
            half.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def below(self, name: str) -> LocalFolder:
        """A folder in this one."""
        return LocalFolder(self.path / name)


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder behind a URL. Files appear whole or not at all, as object stores have it."""

    url: str = field(repr=False)

    def __str__(self) -> str:
        return public(self.url)

    @property
    def name(self) -> str:
        """Its last part."""
        return self.url.partition("?")[0].rpartition("/")[2]

    def read(self, name: str, start: int = 0, count: int | None = None) -> bytes:
        """Content of a small file, or `count` bytes from `start` on.

        Raises:
            FileNotFoundError, CapabilityError.
        """

        def read() -> bytes:
            filesystem, path = self._at(name)
            with filesystem.open_input_file(path) as file:
                # Beyond the end there is nothing, and that is no fault.
                wanted = max(0, file.size() - start) if count is None else min(count, file.size() - start)
                content = file.read_at(wanted, start) if wanted > 0 else b""
            if len(content) < wanted:
                raise OSError(f"{len(content)} of {wanted} bytes have come")
            return content

        return self._patiently(name, read)

    def at(self, name: str) -> str:
        """A file's place, to tell people."""
        return str(self.below(name)) if name else str(self)

    def sha256(self, name: str) -> str:
        """Hex SHA-256 of a file. Raises `FileNotFoundError`, `CapabilityError`."""

        def digest() -> str:
            state = hashlib.sha256()
            for block in self._blocks(name):
                state.update(block)
            return state.hexdigest()

        return self._patiently(name, digest)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none. Raises `CapabilityError`."""

        def size() -> int | None:
            filesystem, path = self._at(name)
            info = filesystem.get_file_info(path)
            return info.size if info.type == pafs.FileType.File else None

        return self._patiently(name, size)

    def names(self) -> list[str]:
        """Files right in this folder, sorted; none where there is no such folder."""

        def names() -> list[str]:
            filesystem, path = self._at()
            selector = pafs.FileSelector(path, allow_not_found=True)
            infos = filesystem.get_file_info(selector)
            return sorted(info.base_name for info in infos if info.is_file)

        return self._patiently("", names)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file right in this folder; none where there is no such folder."""
        return dict(self.files_below(recursive=False))

    def files_below(self, name: str = "", *, recursive: bool = True) -> Iterator[tuple[str, int]]:
        """Path from here and size in bytes of each file below this folder, or one in it.

        One listing, however many files there are. Raises `InputError`, `CapabilityError`.
        """

        def infos() -> list[pafs.FileInfo]:
            filesystem, path = self._at(name)
            return filesystem.get_file_info(
                pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
            )

        skip = len(self._at()[1]) + 1
        return ((i.path[skip:], i.size or 0) for i in self._patiently(name, infos) if i.is_file)

    def written_at(self) -> dict[str, float | None]:
        """When each file right in this folder was written, in seconds by the storage's own clock.

        None where the file system does not say.
        """

        def written_at() -> dict[str, float | None]:
            filesystem, path = self._at()
            infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
            times = {info.base_name: info.mtime_ns for info in infos if info.is_file}
            return {name: None if time_ns is None else time_ns / 1e9 for name, time_ns in times.items()}

        return self._patiently("", written_at)

    def fetch(self, name: str, target: Path) -> str:
        """Copy a file to `target`, whole or not at all.

        Returns:
            Its SHA-256, as hexadecimal digits.

        Raises:
            FileNotFoundError, CapabilityError.
        """

        def fetch() -> str:
            state = hashlib.sha256()
            with written_aside(target) as temporary, temporary.open("wb") as file:
                for block in self._blocks(name):
                    state.update(block)
                    file.write(block)
                file.flush()
            return state.hexdigest()

        return self._patiently(name, fetch)

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file there. Raises `CapabilityError`."""

        def upload() -> None:
            filesystem, path = self._at(name)
            # Not by a stream of ours: closing it, even after an error or Ctrl-C, makes an object of the half.
            pafs.copy_files(str(source), path, pafs.LocalFileSystem(), filesystem)
            if (size := filesystem.get_file_info(path).size) != source.stat().st_size:
                raise OSError(f"{size} of {source.stat().st_size} bytes have arrived")

        self._patiently(name, upload)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file. Raises `CapabilityError`."""
        with self.staged(name) as path:
            path.write_bytes(content)

    def make(self) -> None:
        """Make the folder, where the file system has any. Raises `CapabilityError`."""

        def make() -> None:
            filesystem, path = self._at()
            if filesystem.type_name not in _WITHOUT_FOLDERS:
                filesystem.create_dir(path, recursive=True)

        self._patiently("", make)

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Yield a path on this disk for a file of this name, which is uploaded after the block.

        Raises:
            CapabilityError.
        """
        with self.scratch() as scratch:
            path = scratch / Path(name).name
            yield path
            self.upload(path, name)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a folder on this disk for what is needed meanwhile."""
        with scratch_folder() as path:
            yield path

    def delete(self, name: str) -> None:
        """Delete a file, if it is there. Raises `CapabilityError`."""

        def delete() -> None:
            filesystem, path = self._at(name)
            with suppress(FileNotFoundError):
                filesystem.delete_file(path)

        self._patiently(name, delete)

    def delete_halves(self, prefix: str) -> None:
        """Nothing: half of an upload is no object."""

    def remove(self) -> None:
        """Delete the folder and all in it. Raises `CapabilityError`."""

        def remove() -> None:
            filesystem, path = self._at()
            if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
                filesystem.delete_dir(path)

        self._patiently("", remove)

    def below(self, name: str) -> RemoteFolder:
        """A folder in this one."""
        base, question, query = self.url.partition("?")
        return RemoteFolder(f"{base}/{name}{question}{query}")

    def _blocks(self, name: str) -> Iterator[bytes]:
        filesystem, path = self._at(name)
        with filesystem.open_input_stream(path) as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block

    def _at(self, name: str = "") -> tuple[pafs.FileSystem, str]:
        filesystem, path = _filesystem(self.url)
        return filesystem, f"{path}/{name}" if name else path

    def _patiently(self, name: str, action: Callable[[], _T]) -> _T:
        """Run `action`, again and again where the storage fails in a way that may pass."""
        file = self.at(name)
        for delay in (*_DELAYS_S, None):
            try:
                return action()
            except _FINAL:
                raise
            except OSError as error:
                if error.errno in NODE_ERRNOS:  # ours, and not the storage's
                    raise
                text = str(error)
                if any(final in text for final in _FINAL_TEXTS):
                    raise InputError(
                        "the storage refuses this",
                        file=file,
                        got=_short(text),
                        fix="Look at the bucket's name, and at what your credentials allow",
                    ) from error
                if delay is None:
                    raise CapabilityError(
                        "the storage does not answer",
                        file=file,
                        got=_short(text),
                        fix="The same command goes on where it stopped",
                    ) from error
                log.warning("%s: %s; again in about %g s", file, _short(text), delay)
                # Not all at once: many readers meet the same fault.
                time.sleep(delay * random.uniform(0.75, 1.25))
        raise AssertionError


@lru_cache(maxsize=32)
def _filesystem(url: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a URL: pyarrow's own where it has one, else fsspec's."""
    if "endpoint_override=" in url and os.environ.get("AWS_ACCESS_KEY_ID"):
        # Else Amazon's library asks the machine's metadata service first: two minutes behind some firewalls.
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    try:
        filesystem, path = pafs.FileSystem.from_uri(url)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as refusal:
        import fsspec

        try:
            remote, path = fsspec.url_to_fs(url)
        except Exception as error:  # an unknown protocol, its package is not installed, or what it dislikes
            reason = refusal if url.startswith(("s3://", "gs://", "gcs://", "abfs")) else error
            text = _short(str(reason).replace(url, public(url)))
            # Not `from`: a trace would show the URL as it was given.
            raise InputError("no file system for this URL", file=public(url), got=text) from None
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(remote))
    return filesystem, path.rstrip("/")


def _short(text: str) -> str:
    """The first line, or what is short of it: the server's code where there is one."""
    if code := re.search(r"AWS Error ([A-Z_]+)", text):
        text = code[1] if code[1] not in ("UNKNOWN", "NETWORK_CONNECTION") else text
    line = text.splitlines()[0] if text else "no reason given"
    return line if len(line) <= _SHOWN_CHARS else f"{line[:_SHOWN_CHARS]}…"
