"""A report's folder: JSON for programs, two pages for people, a table of all images, pictures."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nafnet_core import InputError
from pipelines.evaluate.document import Document, html, markdown
from pipelines.files import make_folder, replaced_folder, write_json

PICTURES = "pictures"
_MARKS = ("report.json", "comparison.json")


def check_out(out: Path) -> None:
    """Refuse a folder before anything is scored for it.

    Raises:
        InputError: it cannot be written, or holds something else than an earlier report.
    """
    if out.exists() and not out.is_dir():
        raise InputError("this is a file, and a report is a folder", file=out, fix="Give another --out")
    if out.is_dir() and any(out.iterdir()) and not any((out / mark).is_file() for mark in _MARKS):
        raise InputError(
            "there is something else in this folder",
            file=out,
            expected="a new folder, or an earlier report to replace",
            fix="Give another --out",
        )
    make_folder(out.absolute().parent)


@contextmanager
def report_folder(path: Path, out: Path | None) -> Iterator[Path]:
    """Yield a new folder that becomes `path`, in the place of an earlier report; then copied to `out`."""
    make_folder(path.parent)
    with replaced_folder(path) as temporary:
        (temporary / PICTURES).mkdir()
        yield temporary
    if out is not None:
        with replaced_folder(out.absolute()) as copy:
            shutil.copytree(path, copy, dirs_exist_ok=True)


def write_content(
    folder: Path, stem: str, content: BaseModel, document: Document, images: Sequence[dict[str, Any]]
) -> None:
    """Write `stem`.json, .md and .html, and images.csv, which has a line of names first."""
    write_json(folder / f"{stem}.json", content.model_dump())
    (folder / f"{stem}.md").write_text(markdown(document), encoding="utf-8")
    (folder / f"{stem}.html").write_text(html(document), encoding="utf-8")
    with (folder / "images.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(images[0]))
        table.writeheader()
        table.writerows(images)
