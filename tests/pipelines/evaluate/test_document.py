"""Pages: they stand alone, whatever names files have, and are of use without eyes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipelines import evaluate
from pipelines.evaluate import Pairs
from pipelines.evaluate.document import Document, Heading, Panel, Paragraph, Strip, Table, html, markdown
from pipelines.evaluate.drawing import histogram
from pipelines.evaluate.pages import short_name
from pipelines.models import LoadedModel
from pipelines.png import decode_png
from pipelines.workspace import Workspace

_VOID = {"meta", "img", "br", "link"}


class _Page(HTMLParser):
    """Elements and attributes of a page; fails where tags do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


_EVIL = '<script>alert("1")</script>|*a*_b_`c`[d](e)'
_DOCUMENT = Document(
    _EVIL,
    [
        Heading(_EVIL),
        Paragraph(_EVIL),
        Table(_EVIL, ["", _EVIL], [[_EVIL, "1"]]),
        Strip("pictures/01.png", _EVIL, [Panel(_EVIL, b"jpeg", b"jpeg")]),
    ],
)


def test_names_are_text_and_nothing_else() -> None:
    page = _Page(html(_DOCUMENT))
    assert not page.all("script") and page.text.count(_EVIL) >= 6
    assert page.all("img")[0]["alt"] == f"{_EVIL}: {_EVIL}"
    row = next(line for line in markdown(_DOCUMENT).splitlines() if line.endswith("| 1 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "<script>" not in re.sub(r"\\<", "", markdown(_DOCUMENT))


def test_the_page_of_a_report_stands_alone(model: LoadedModel, places: Path, workspace: Workspace) -> None:
    result = evaluate.run(model, Pairs(places / "store"), workspace)
    content = result.path.with_name("report.html").read_text()
    page = _Page(content)
    images = page.all("img")
    # A histogram, and four panels of each of the six images, each with a detail.
    assert len(images) == 1 + 6 * 4 * 2
    assert all((image["src"] or "").startswith("data:image/") and image["alt"] for image in images)
    assert not page.all("script") and not page.all("link")
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|https?://", content)
    (title,) = re.findall("<h1>(.*)</h1>", content)
    assert title == "a.safetensors on store" and str(places / "store") in page.text
    assert page.all("html")[0]["lang"] == "en" and "prefers-color-scheme: dark" in content
    assert "width=device-width" in str(page.all("meta"))
    assert len(page.all("caption")) == len(page.all("table")) == 5
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    assert all(score.key in page.text for score in result.report.images)
    for words in ("By scene", "By strength of the blur", "32 levels", "one thread", "Crete"):
        assert words in page.text


@pytest.mark.parametrize(
    ("data", "short"),
    [
        ("/data/stores/test/", "test"),
        ("s3://bucket/stores/test?region=eu", "test"),
        ("a/blur and b/sharp", "blur and sharp"),
        ("test", "test"),
    ],
)
def test_a_title_has_the_last_names(data: str, short: str) -> None:
    assert short_name(data) == short


def test_no_bar_of_the_histogram_is_behind_the_legend() -> None:
    drawn = decode_png(histogram([number + 0.5 for number in range(30)] * 7, label="gain, dB")).astype(int)
    is_bar = np.abs(drawn - (31, 119, 180)).max(axis=2) < 40
    top, left, right = np.flatnonzero(is_bar.any(axis=1))[0] + 2, *np.flatnonzero(is_bar.any(axis=0))[[0, -1]]
    # All bars are of one height: what is missing of its upper end are the lines of the mean and of zero.
    assert is_bar[top, left:right].mean() > 0.97


def test_long_tables_are_folded_and_cut_in_markdown() -> None:
    rows = [[f"scene {number}", "1"] for number in range(1000)]
    document = Document("t", [Table("By scene", ["scene", "images"], rows, more="report.json")])
    page = _Page(html(document))
    assert len(page.all("details")) == 1 and "1000 rows" in page.text and "scene 999" in page.text
    text = markdown(document)
    assert text.count("scene ") < 60 and "950 more are in report.json" in text


def test_a_page_of_large_photos_stays_small(model: LoadedModel, workspace: Workspace, tmp_path: Path) -> None:
    from tests.pipelines.pairs import write_pairs

    write_pairs(tmp_path / "pairs", ["1", "2"], height=240, width=430)
    result = evaluate.run(model, Pairs(tmp_path / "pairs"), workspace)
    # Twenty images of this kind: below 4 MB.
    assert result.path.with_name("report.html").stat().st_size < 2 * 200_000
