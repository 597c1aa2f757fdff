"""A page for people: built once of a few kinds of blocks, written as Markdown and as HTML."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_MANY_ROWS = 30  # from here on a table of the HTML page is folded
_MARKDOWN_ROWS = 50
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --pale: #60646c; --line: #d5d8dc; --back: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --pale: #a3a8b0; --line: #3a3f45; --back: #16181b }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2.2rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
p, summary { max-width: 46rem } .note { color: var(--pale) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
caption { text-align: left; color: var(--pale); padding-bottom: .3rem }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tbody th { font-weight: normal; white-space: normal; min-width: 7rem }
img { display: block; width: 100%; height: auto; border-radius: 3px }
.detail { image-rendering: pixelated; margin-top: 4px }
.drawn { background: #fff; max-width: 46rem; margin-top: 1rem }
figure { margin: 0 } figcaption { color: var(--pale); font-size: .875rem; padding: .2rem 0 }
.panels { display: grid; gap: 8px; grid-template-columns: repeat(auto-fit, minmax(min(9.5rem, 100%), 1fr)) }
"""


@dataclass(frozen=True, slots=True)
class Heading:
    """A section begins."""

    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Text; `is_note` where it explains rather than tells."""

    text: str
    is_note: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, the first cell of each its name."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    more: str = ""
    """Where the rest is that Markdown leaves out."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn picture."""

    file: str
    """Its name beside the page."""
    alt: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Panel:
    """One image of a strip, shrunk, and a detail of it, pixel by pixel; JPEG."""

    label: str
    overview: bytes
    detail: bytes


@dataclass(frozen=True, slots=True)
class Strip:
    """An image in several states side by side."""

    file: str
    """Name beside the page of all of it in one picture."""
    title: str
    panels: Sequence[Panel]


Block = Heading | Paragraph | Table | Chart | Strip


@dataclass(frozen=True, slots=True)
class Document:
    """A title and what stands below it."""

    title: str
    blocks: Sequence[Block]


def markdown(document: Document) -> str:
    """The document as Markdown; pictures are links to files beside it."""
    lines = [f"# {_inline(document.title)}", ""]
    for block in document.blocks:
        match block:
            case Heading(text):
                lines += [f"## {_inline(text)}", ""]
            case Paragraph(text):
                lines += [_inline(text), ""]
            case Table():
                lines += _markdown_table(block)
            case Chart(file, alt, _):
                lines += [f"![{_inline(alt)}]({file})", ""]
            case Strip(file, title, panels):
                labels = ", ".join(panel.label for panel in panels)
                lines += [f"**{_inline(title)}**", "", f"![{_inline(labels)}]({file})", ""]
    return "\n".join(lines)


def html(document: Document) -> str:
    """The document as one HTML page that stands alone: no script, no file, no network."""
    parts = [_html_block(block) for block in document.blocks]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(document.title)}</title>",
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(document.title)}</h1>",
            *parts,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _markdown_table(table: Table) -> list[str]:
    rows = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows[:_MARKDOWN_ROWS]]
    lines = [f"{_inline(table.caption)}:", ""]
    lines += ["| " + " | ".join(_inline(cell) for cell in row) + " |" for row in rows]
    left = len(table.rows) - _MARKDOWN_ROWS
    return [*lines, "", *([f"{left} more are in {table.more}.", ""] if left > 0 else [])]


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text, is_note):
            kind = ' class="note"' if is_note else ""
            return f"<p{kind}>{escape(text)}</p>"
        case Table():
            return _html_table(block)
        case Chart(_, alt, png):
            return f'<img class="drawn" alt="{escape(alt)}" src="{_inlined(png, "png")}">'
        case Strip(_, title, panels):
            shown = "\n".join(_html_panel(panel, title) for panel in panels)
            return f'<section>\n<h3>{escape(title)}</h3>\n<div class="panels">\n{shown}\n</div>\n</section>'


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    ]
    whole = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
        f"<table>\n<caption>{escape(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>"
    )
    if len(rows) < _MANY_ROWS:
        return whole
    return f"<details>\n<summary>{escape(table.caption)}: {len(rows)} rows</summary>\n{whole}\n</details>"


def _html_panel(panel: Panel, title: str) -> str:
    alt = f"{title}: {panel.label}"
    return (
        f'<figure><img alt="{escape(alt)}" loading="lazy" src="{_inlined(panel.overview, "jpeg")}">'
        f'<img class="detail" alt="{escape(alt)}, detail" loading="lazy" '
        f'src="{_inlined(panel.detail, "jpeg")}"><figcaption>{escape(panel.label)}</figcaption></figure>'
    )


def _inlined(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _inline(text: str) -> str:
    """Text in Markdown: names of files may hold what would be read as marks."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
