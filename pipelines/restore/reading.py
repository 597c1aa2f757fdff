"""Photos read and decoded ahead of the network, in a thread, within a bounded number of pixels."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nafnet_core import InputError
from nafnet_core.memory import give_back_freed
from pipelines.images import Photo, declared_pixels, read_photo
from pipelines.restore.finding import Item
from pipelines.restore.record import Restored

PACKET = 16
"""Photos that one worker takes at a time. Equal tiles share a batch only within a packet, and in it within a
group of a bounded number of pixels: what is computed together, and with it every last bit, is the same on one
machine and on many."""
_READ_AHEAD = 4  # small photos, beside those that the network has
_LARGE_PIXELS = 8_000_000  # what decoding one leaves behind is worth giving back
_END = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A photo on its way from the file to its result."""

    item: Item
    photo: Photo
    entry: Restored
    """What is known of it so far."""
    pixels: int
    """Of its share of the room."""


class Room:
    """Pixels that are decoded and not yet written. Whatever is asked for is given when there are none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken, self._is_closed = 0, False
        self._changed = threading.Condition()

    def take(self, pixels: int) -> None:
        """Wait until there is room."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or not self._taken or self._taken + pixels <= self.limit
            )
            self._taken += pixels

    def give(self, pixels: int) -> None:
        """Give back."""
        with self._changed:
            self._taken -= pixels
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody through: nothing comes of it any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class Reader:
    """Iterates over decoded photos, entries of those that need no network, and None at the end of a group.

    Raises, from the iteration, what is no fault of a photo: a bucket that does not answer.
    """

    def __init__(
        self,
        items: Sequence[Item],
        room: Room,
        *,
        begin: Callable[[Item], Restored],
        is_done: Callable[[Restored], Restored | None],
    ) -> None:
        """Read `items` in order.

        Args:
            items: photos.
            room: bounds what is decoded.
            begin: an entry with what is known before reading.
            is_done: the earlier entry whose result stands for this one's, which has the input's digest.
        """
        self._items, self._room, self._begin, self._is_done = items, room, begin, is_done
        self._queue: queue.Queue[Any] = queue.Queue(_READ_AHEAD)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nafnet-read", daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()
        self._room.close()
        self._thread.join()

    def __iter__(self) -> Iterator[Restored | Decoded | None]:
        while (entry := self._queue.get()) is not _END:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
        self._put(_END)  # for whoever asks again

    def _run(self) -> None:
        try:
            group_pixels = 0
            for number, item in enumerate(self._items):
                entry, content = self._open(item)
                pixels = declared_pixels(content)
                # Half of the room, so that there is some for the next group while this one is at work.
                if number % PACKET == 0 or group_pixels + pixels > self._room.limit // 2:
                    self._put(None)
                    group_pixels = 0
                if not content:
                    self._put(entry)
                    continue
                group_pixels += pixels
                self._room.take(pixels)
                result = _decode(item, entry, content, pixels)
                if isinstance(result, Restored):
                    self._room.give(pixels)
                del content
                if pixels > _LARGE_PIXELS:
                    give_back_freed()
                if not self._put(result):
                    return
                del result  # else this thread keeps the largest photo of all
            self._put(_END)
        except BaseException as error:  # told where the photos are waited for
            self._put(error)

    def _open(self, item: Item) -> tuple[Restored, bytes]:
        """The file's content, or an entry that is final already and nothing."""
        entry = self._begin(item)
        try:
            content = _content(item)
        except (InputError, OSError, MemoryError) as error:
            return entry.failed(error), b""
        entry = replace(entry, input_digest=sha256(content).hexdigest())
        before = self._is_done(entry)
        if before is not None:
            return replace(before, input=item.name, status="skipped", seconds=0.0), b""
        if not content:
            return entry.failed(InputError("not an image, but an empty file", file=item.name)), b""
        return entry, content

    def _put(self, entry: object) -> bool:
        """Hand over, unless nobody takes it any more."""
        while not self._is_stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _decode(item: Item, entry: Restored, content: bytes, pixels: int) -> Restored | Decoded:
    try:
        photo = read_photo(content, name=item.name)
    except (InputError, MemoryError) as error:
        return entry.failed(error)
    height, width = photo.rgb_hwc.shape[:2]
    entry = replace(entry, height_px=height, width_px=width)
    return Decoded(item=item, photo=photo, entry=entry, pixels=pixels)


def _content(item: Item) -> bytes:
    if not isinstance(item.source, Path):
        return item.source.content()
    if not item.source.is_file():
        raise InputError("no such image", file=item.source)
    return item.source.read_bytes()
