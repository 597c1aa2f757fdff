"""Photos through one model: the next are read and decoded, and the last encoded and written, meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from nafnet_core import InputError
from pipelines.encoding import JPEG_QUALITY, encode_photo, what_is_lost
from pipelines.restore.finding import Item
from pipelines.restore.reading import Decoded, Reader, Room
from pipelines.restore.record import Restored
from pipelines.restore.video import restore_video
from pipelines.restorer import Image, Restoration, Restorer
from pipelines.storage import LocalFolder, RemoteFolder

_MAX_PIXELS = 24_000_000  # decoded and not yet written; a single photo may be larger


class FileWork:
    """Restores files into a folder with one model."""

    def __init__(
        self,
        restorer: Restorer,
        out: LocalFolder | RemoteFolder,
        *,
        quality: int = JPEG_QUALITY,
        on_part: Callable[[str], None] = lambda note: None,
    ) -> None:
        """`on_part` is called with words on how far a photo or a video is."""
        self._restorer, self._out, self._quality, self._on_part = restorer, out, quality, on_part
        self._settings: dict[str, Any] = {
            **restorer.settings.to_dict(),
            "precision": restorer.precision,
            "train_patch_px": restorer.loaded.train_patch_px,
            "quality": quality,
        }

    def run(self, items: Sequence[Item], before: Mapping[str, Restored]) -> Iterator[Restored]:
        """Restore photos and videos; what is skipped or fails may come a little out of order.

        Args:
            items: a packet, or any number of them.
            before: entries of earlier runs, by output.

        Raises:
            CapabilityError: a bucket does not answer.
        """
        self._before = before
        photos = [item for item in items if not item.is_video]
        yield from self._photos(photos)
        for item in items:
            if item.is_video:
                yield self._video(item)

    def _photos(self, items: Sequence[Item]) -> Iterator[Restored]:
        room = Room(_MAX_PIXELS)
        in_network: deque[Decoded] = deque()
        done: deque[Restored] = deque()
        written: deque[Future[Restored]] = deque()

        def images() -> Iterator[Image | None]:
            for entry in reader:
                if isinstance(entry, Restored):
                    done.append(entry)
                elif entry is None:
                    yield None
                else:
                    in_network.append(entry)
                    yield entry.photo.rgb_hwc

        def on_tile(num_done: int, total: int) -> None:
            self._on_part(f"{PurePosixPath(in_network[-1].item.output).name} tile {num_done}/{total}")

        def finished(*, wait: bool = False) -> Iterator[Restored]:
            while done:
                yield done.popleft()
            while written and (wait or written[0].done()):
                yield written.popleft().result()

        reader = Reader(items, room, begin=self._begin, is_done=self._is_done)
        with reader, ThreadPoolExecutor(1, "nafnet-write") as writer:
            is_over = False
            while not is_over:
                try:
                    for result in self._restorer.stream(images(), on_tile=on_tile):
                        decoded = in_network.popleft()
                        written.append(writer.submit(self._write, decoded, result, room))
                        del decoded, result  # the writer's alone, from here on
                        yield from finished()
                    is_over = True
                except (RuntimeError, MemoryError) as error:
                    # Torch raises RuntimeError where memory runs out: one huge photo must not stop all.
                    if not in_network:
                        raise
                    for decoded in in_network:
                        done.append(decoded.entry.failed(error))
                        room.give(decoded.pixels)
                    in_network.clear()
            yield from finished(wait=True)

    def _begin(self, item: Item) -> Restored:
        return Restored(
            input=item.name,
            output=item.output,
            status="failed",
            model=self._restorer.loaded.label,
            model_digest=self._restorer.loaded.digest,
            backend=self._restorer.loaded.backend,
            settings=self._settings,
        )

    def _is_done(self, entry: Restored) -> Restored | None:
        """The earlier entry that stands for this one, if its result is still what was written then."""
        before = self._before.get(entry.output)
        if before is None or not before.stands_for(entry) or self._out.size(before.output) is None:
            return None
        try:
            return before if self._out.sha256(before.output) == before.output_digest else None
        except OSError:
            return None

    def _write(self, decoded: Decoded, result: Restoration, room: Room) -> Restored:
        photo = replace(decoded.photo, rgb_hwc=result.image)
        suffix = PurePosixPath(decoded.item.output).suffix
        red, green, blue = (round(shift, 3) for shift in result.colour_shift)
        entry = replace(
            decoded.entry,
            tile_px=result.tile_px,
            num_tiles=result.num_tiles,
            tiles_redone=result.num_redone,
            tiles_kept=result.num_kept,
            colour_shift=(red, green, blue),
            notes=tuple(what_is_lost(photo, suffix)),
            seconds=result.seconds,
        )
        try:
            content = encode_photo(photo, suffix, quality=self._quality)
            self._put(decoded.item.output, content)
        except (InputError, OSError, MemoryError) as error:
            return entry.failed(error)
        finally:
            room.give(decoded.pixels)
        return replace(entry, status="restored", output_digest=sha256(content).hexdigest())

    def _put(self, name: str, content: bytes) -> None:
        if isinstance(self._out, LocalFolder):
            (self._out.path / name).parent.mkdir(parents=True, exist_ok=True)
        self._out.write(name, content)

    def _video(self, item: Item) -> Restored:
        if not isinstance(self._out, LocalFolder):
            fix = "Choose an --out on a disk"
            return self._begin(item).failed(
                InputError("videos are written to a disk", file=item.name, fix=fix)
            )
        return restore_video(
            item,
            self._out.path / item.output,
            self._restorer,
            self._begin(item),
            is_done=self._is_done,
            on_frame=self._on_part,
        )
