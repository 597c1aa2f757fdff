"""What was done to each photo, `restore.jsonl`: written as it happens, and read to go on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from nafnet_core import InputError, NAFNetError
from pipelines.scratch import scratch_folder
from pipelines.storage import LocalFolder, RemoteFolder

RECORD = "restore.jsonl"
_UPLOADED_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What was done to one photo or video."""

    input: str
    output: str
    """Name below the output folder."""
    status: Literal["restored", "skipped", "failed"]
    """`skipped`: done before, from the same content by the same model and settings."""
    error: str | None = None
    model: str = ""
    model_digest: str = ""
    """SHA-256 of the weights."""
    backend: str = ""
    """What ran it: `torch`, or an export's runtime."""
    settings: dict[str, Any] | None = None
    """Everything else that the pixels depend on."""
    input_digest: str | None = None
    """SHA-256 of the file."""
    output_digest: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    num_frames: int | None = None
    """Of a video."""
    tile_px: int | None = None
    """What sides of tiles were limited to; None where the image was run whole."""
    num_tiles: int = 0
    tiles_redone: int = 0
    """Tiles that the network broke, and that were sound without local statistics."""
    tiles_kept: int = 0
    """Tiles that the network broke either way, where the input was kept."""
    colour_shift: tuple[float, float, float] | None = None
    """What the network did to the mean of red, green and blue, in levels of 8 bit; before `keep_colour`."""
    notes: tuple[str, ...] = ()
    """What the output's format could not hold, and the like."""
    seconds: float = 0.0
    """In the network and around it, without reading and writing."""

    def failed(self, error: BaseException) -> Restored:
        """This entry with what went wrong, in one line."""
        if isinstance(error, NAFNetError):
            line = str(error)
        elif isinstance(error, OSError) and error.strerror:
            line = str(InputError(error.strerror, file=error.filename or self.input))
        else:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            line = str(InputError("cannot restore it", file=self.input, got=reason))
        return replace(self, status="failed", error=line)

    def stands_for(self, other: Restored) -> bool:
        """Whether this entry's result is what `other`, not restored yet, would come to."""
        mine, theirs = ((entry.input_digest, entry.model_digest, entry.settings) for entry in (self, other))
        return self.status == "restored" and mine == theirs


_KNOWN = frozenset(field.name for field in fields(Restored))


class Record:
    """The record in an output folder, on a disk or in a bucket, where nothing can be appended."""

    def __init__(self, folder: LocalFolder | RemoteFolder) -> None:
        self._folder = folder
        self._content = b"" if folder.size(RECORD) is None else folder.read(RECORD)

    def entries(self) -> dict[str, Restored]:
        """The latest entry of each output; a line cut short by a crash is passed over."""
        entries: dict[str, Restored] = {}
        for line in self._content.splitlines():
            try:
                row = json.loads(line)
                entry = Restored(**{name: value for name, value in row.items() if name in _KNOWN})
            except (ValueError, TypeError, AttributeError):
                continue
            entries[entry.output] = replace(
                entry,
                colour_shift=entry.colour_shift and tuple(entry.colour_shift),  # type: ignore[arg-type]
                notes=tuple(entry.notes),
            )
        return entries

    @contextmanager
    def opened(self) -> Iterator[_Writer]:
        """Yield what adds lines: at once on a disk, every minute and at the end in a bucket.

        Raises:
            InputError: it cannot be written.
        """
        if isinstance(self._folder, LocalFolder):
            try:
                file = (self._folder.path / RECORD).open("ab")
            except OSError as error:
                raise InputError(
                    "cannot write the record", file=self._folder.at(RECORD), got=error.strerror
                ) from error
            with file:
                if self._content and not self._content.endswith(b"\n"):
                    file.write(b"\n")
                yield _Writer(file)
            return
        with scratch_folder() as scratch, (scratch / RECORD).open("wb") as file:
            file.write(self._content)
            writer = _Writer(file, lambda: self._folder.upload(scratch / RECORD, RECORD))
            try:
                yield writer
            finally:
                writer.upload()


class _Writer:
    def __init__(self, file: Any, upload: Any = None) -> None:
        self._file, self._upload, self._uploaded = file, upload, time.monotonic()

    def add(self, entry: Restored) -> None:
        """Write an entry down, so that a crash after it loses nothing."""
        self._file.write(json.dumps(asdict(entry)).encode() + b"\n")
        self._file.flush()
        if self._upload and time.monotonic() - self._uploaded > _UPLOADED_EVERY_S:
            self.upload()

    def upload(self) -> None:
        """Have a bucket's copy be as new as this one."""
        self._uploaded = time.monotonic()
        self._file.flush()
        self._upload()
