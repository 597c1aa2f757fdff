"""Folders of artifacts, on a disk or in a bucket.

    place = folder("s3://bucket/stores/gopro")      # any URL that pyarrow or fsspec knows; a path is a path
    place.read("manifest.json")

Credentials and end points come from where the file system's own tools look (`AWS_PROFILE`,
`AWS_ENDPOINT_URL`), or from the URL's query (`s3://bucket/x?region=eu-west-1`). A server that fails for a
while is asked again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as pafs

from nafnet_core import CapabilityError, InputError
from pipelines.files import written_aside

log = logging.getLogger(__name__)

_BLOCK_BYTES = 4 * 2**20
# Half a minute and more in all: longer than a bucket's throttling or a server's restart usually lasts.
_DELAYS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# What asking again does not change; pyarrow gives most of these as a plain OSError with a telling text.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_TEXTS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT")
_T = TypeVar("_T")


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in os.fspath(place)


def absolute(place: str | os.PathLike[str]) -> str:
    """A path made absolute; a URL as it is, without a slash at its end."""
    text = os.fspath(place)
    return text.rstrip("/") if is_url(text) else str(Path(text).absolute())


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

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def names(self) -> list[str]:
        """Files right in this folder, sorted; none where there is no such folder."""
        return sorted(path.name for path in self.path.glob("*") if path.is_file())

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with written_aside(self.path / name) as temporary:
            temporary.write_bytes(content)

    def upload(self, source: Path, name: str) -> None:
        """Copy a file there."""
        with written_aside(self.path / name) as temporary:
            shutil.copyfile(source, temporary)

    def remove(self) -> None:
        """Delete the folder and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def below(self, name: str) -> LocalFolder:
        """A folder in this one."""
        return LocalFolder(self.path / name)


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder behind a URL. Files appear whole or not at all, as object stores have it."""

    url: str

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        """Whole content of a small file. Raises `FileNotFoundError`, or `CapabilityError`."""

        def read() -> bytes:
            filesystem, path = self._at(name)
            with filesystem.open_input_stream(path) as stream:
                return stream.read()

        return self._patiently(name, read)

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
            return sorted(info.base_name for info in infos if info.type == pafs.FileType.File)

        return self._patiently("", names)

    def fetch(self, name: str, target: Path) -> str:
        """Copy a file to `target`, whole or not at all.

        Returns:
            Its SHA-256, as hexadecimal digits.

        Raises:
            FileNotFoundError, CapabilityError.
        """

        def fetch() -> str:
            filesystem, path = self._at(name)
            state = hashlib.sha256()
            with (
                written_aside(target) as temporary,
                filesystem.open_input_stream(path) as stream,
                temporary.open("wb") as file,
            ):
                while block := stream.read(_BLOCK_BYTES):
                    state.update(block)
                    file.write(block)
            return state.hexdigest()

        return self._patiently(name, fetch)

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file there. Raises `CapabilityError`."""

        def upload() -> None:
            filesystem, path = self._at(name)
            with source.open("rb") as file, filesystem.open_output_stream(path) as stream:
                while block := file.read(_BLOCK_BYTES):
                    stream.write(block)

        self._patiently(name, upload)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file. Raises `CapabilityError`."""

        def write() -> None:
            filesystem, path = self._at(name)
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)

        self._patiently(name, write)

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

    def _at(self, name: str = "") -> tuple[pafs.FileSystem, str]:
        filesystem, path = _filesystem(self.url)
        return filesystem, f"{path}/{name}" if name else path

    def _patiently(self, name: str, action: Callable[[], _T]) -> _T:
        """Run `action`, again and again where the storage fails in a way that may pass."""
        file = f"{self.url}/{name}".rstrip("/")
        for delay in (*_DELAYS_S, None):
            try:
                return action()
            except _FINAL:
                raise
            except OSError as error:
                text = str(error)
                if any(final in text for final in _FINAL_TEXTS):
                    raise InputError("the storage refuses this", file=file, got=_short(text)) from error
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
    try:
        filesystem, path = pafs.FileSystem.from_uri(url)
    except (pafs.pa.ArrowInvalid, pafs.pa.ArrowNotImplementedError):
        import fsspec

        try:
            remote, path = fsspec.url_to_fs(url)
        except (ValueError, ImportError) as error:  # an unknown protocol, or its package is not installed
            raise InputError("no file system for this URL", file=url, got=_short(str(error))) from error
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(remote))
    return filesystem, path.rstrip("/")


def _short(text: str) -> str:
    return text.splitlines()[0][:160] if text else "no reason given"
