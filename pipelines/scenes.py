"""The scenes of a store, in `scenes.txt` beside its manifest: sorted names, one a line.

A name that would not be read back as it is (a line break, a quotation mark or space at its start) is written
as a JSON string. Both ways the list is gone through line by line: millions of names need no memory.
"""

from __future__ import annotations

import heapq
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from pipelines.files import written_aside
from pipelines.storage import LocalFolder, folder
from pipelines.store import SCENES, read_manifest

_NAMES_IN_MEMORY = 200_000


class SceneList:
    """Collects names of scenes in any order, as often as they come, and writes them once each, sorted."""

    def __init__(self, folder: Path, *, names_in_memory: int = _NAMES_IN_MEMORY) -> None:
        """`folder` holds sorted parts of the list meanwhile, `scenes-*.txt`."""
        self._folder = folder
        self._limit = names_in_memory
        self._names: set[str] = set()
        self._parts: list[Path] = []

    def add(self, names: Iterable[str]) -> None:
        """Take these as well."""
        self._names.update(names)
        if len(self._names) > self._limit:
            part = self._folder / f"scenes-{len(self._parts):05d}.txt"
            part.write_text("".join(_line(name) for name in sorted(self._names)), encoding="utf-8")
            self._parts.append(part)
            self._names.clear()

    def write(self, path: Path) -> int:
        """Write the list, whole or not at all, and return the number of scenes."""
        count = 0
        with ExitStack() as stack, written_aside(path) as temporary:
            parts = [stack.enter_context(part.open(encoding="utf-8", newline="\n")) for part in self._parts]
            runs = [map(_name, part) for part in parts]
            file = stack.enter_context(temporary.open("w", encoding="utf-8", newline="\n"))
            for name, _ in groupby(heapq.merge(*runs, sorted(self._names))):
                file.write(_line(name))
                count += 1
            file.flush()
        return count


def scenes_of(root: Path | str) -> Iterator[str] | None:
    """Scenes of the store at `root`, sorted; None where it was made before they were listed."""
    place = folder(root)
    if place.size(SCENES) is None:
        return None
    if isinstance(place, LocalFolder):
        return _names_in(place.path / SCENES)
    return map(_name, io.StringIO(place.read(SCENES).decode(), newline="\n"))


def shared_scenes(root: Path | str, other: Path | str) -> tuple[int, str]:
    """How many scenes of the one store the other one has too, and the first of them.

    0 where either store has no list, and for two parts of REDS, each of which counts its sequences from 000.
    """
    ours, theirs = scenes_of(root), scenes_of(other)
    if ours is None or theirs is None or _are_parts_of_reds(root, other):
        return 0, ""
    # Both are sorted and without repetition, so a name that comes twice in the merged list is in both.
    count, first = 0, ""
    for name, occurrences in groupby(heapq.merge(ours, theirs)):
        if len(list(occurrences)) > 1:
            first = first if count else name
            count += 1
    return count, first


def _are_parts_of_reds(root: Path | str, other: Path | str) -> bool:
    one, two = read_manifest(root), read_manifest(other)
    splits = (manifest.adapter_options.get("split") for manifest in (one, two))
    return one.adapter == two.adapter == "reds" and len(set(splits)) == 2


def _names_in(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from map(_name, file)


def _line(name: str) -> str:
    is_plain = name.isprintable() and name == name.strip() and name != "" and not name.startswith('"')
    return (name if is_plain else json.dumps(name)) + "\n"


def _name(line: str) -> str:
    line = line.removesuffix("\n")
    return json.loads(line) if line.startswith('"') else line
