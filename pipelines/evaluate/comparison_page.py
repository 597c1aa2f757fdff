"""What a comparison says to people, as blocks of a document."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.counting import counted
from pipelines.evaluate.difference import Comparison, Difference
from pipelines.evaluate.document import Block, Chart, Document, Heading, Paragraph, Strip, Table
from pipelines.evaluate.pages import PERCEPTUAL_NOTE, SHARPNESS_NOTE, protocol_table, time_told
from pipelines.evaluate.summary import percentiles

HISTOGRAM = "difference.png"
_FEW_UNITS = 10
TIME_NOTE = (
    "The times are not compared: A ran first and then B, and what else the machine did in the meantime is in "
    "them. To compare them, the two taking turns: nafnet registry compare A B STORE."
)


def comparison_document(comparison: Comparison, *, gains_png: bytes, strips: Sequence[Strip]) -> Document:
    """The comparison for people.

    Args:
        comparison: what it is about.
        gains_png: the histogram of the difference in PSNR.
        strips: the images that differ most, that one first.
    """
    first, second = comparison.first, comparison.second
    blocks: list[Block] = [
        Paragraph(f"A: {first.model}. B: {second.model}. Data: {first.data}."),
        Paragraph(verdict(comparison)),
        score_table(comparison),
        *(Paragraph(note, is_note=True) for note in notes(comparison)),
        Paragraph(SHARPNESS_NOTE, is_note=True),
    ]
    if first.perceptual_restored is not None:
        blocks.append(Paragraph(PERCEPTUAL_NOTE, is_note=True))
    gains = percentiles([image.psnr_gain_db for image in comparison.images])
    columns = ["", "min", "5 %", "25 %", "median", "75 %", "95 %", "max"]
    rows = [["PSNR, dB", *(f"{value:+.2f}" for value in gains.model_dump().values())]]
    blocks += [
        Heading("Distribution"),
        Table("B over A, percentiles", columns, rows),
        Chart(HISTOGRAM, f"Histogram of B over A, {counted(len(comparison.images), 'image')}", gains_png),
    ]
    if first.by_blur:
        rows = group_rows(comparison, "by_blur")
        blocks += [
            Heading("By strength of the blur"),
            Table("PSNR, means in dB", ["blur", "images", "A", "B", "B over A"], rows),
            Paragraph(f"{first.blur_rule}.", is_note=True),
        ]
    rows = group_rows(comparison, "by_scene")
    columns = ["scene", "images", "A", "B", "B over A"]
    blocks += [
        Heading("By scene"),
        Table("PSNR, means in dB by scene", columns, rows, more="comparison.json"),
    ]
    told = (
        f"The {counted(len(strips), 'image')} of the largest difference. Below each the detail where "
        "blurring cost most, pixel by pixel."
    )
    blocks += [Heading("Where they differ most"), Paragraph(told, is_note=True), *strips]
    blocks += [Heading("How it was measured"), protocol_table(first, second)]
    blocks += [Paragraph(f"{name}: {time_told(report)}") for name, report in (("A", first), ("B", second))]
    return Document(f"{second.model} against {first.model}", blocks)


def verdict(comparison: Comparison) -> str:
    """The difference in a sentence."""
    found = comparison.psnr_db
    told = f"B is {found.mean:+.3f} dB over A"
    if found.low is not None and found.high is not None:
        told += f", {comparison.confidence:.0%} interval {found.low:+.3f} to {found.high:+.3f} dB"
        told += "." if found.is_clear else ": no clear difference."
    else:
        told += "; one unit alone gives no interval."
    num_equal = len(comparison.images) - comparison.num_better - comparison.num_worse
    same = f", the same on {num_equal}" if num_equal else ""
    total = counted(len(comparison.images), "image")
    return f"{told} B is better on {comparison.num_better} of {total}, worse on {comparison.num_worse}{same}."


def notes(comparison: Comparison) -> list[str]:
    """How the interval was made, and what is not to be read out of the figures."""
    first, second = comparison.first, comparison.second
    told = [interval_told(comparison), TIME_NOTE]
    if (first.weights_digest, first.train_patch_px) == (second.weights_digest, second.train_patch_px):
        told.insert(0, "A and B are the same model, by the digest of the weights: nothing can differ.")
    return told


def interval_told(comparison: Comparison) -> str:
    """How the interval was made."""
    units = counted(comparison.num_units, comparison.unit)
    told = f"Paired bootstrap of {units}, {comparison.resamples:,} resamples, expanded percentiles. "
    scenes = {image.scene for image in comparison.images}
    if comparison.unit == "scene":
        told += "Scenes are drawn with all of their images, which are not independent of each other."
    elif len(scenes) == 1 < comparison.num_units:
        told += "All images are of one scene: it says nothing of others."
    else:
        told += "Each image counts by itself."
    return told + (f" Of fewer than {_FEW_UNITS} an interval is rough." if _is_few(comparison) else "")


def score_table(comparison: Comparison) -> Table:
    """Means of A and B, and the difference with its interval."""
    first, second = comparison.first, comparison.second
    rows = []
    for name, digits, a, b, difference in (
        ("PSNR, dB", 3, first.psnr_restored_db, second.psnr_restored_db, comparison.psnr_db),
        ("SSIM", 4, first.ssim_restored, second.ssim_restored, comparison.ssim),
        ("Sharpness", 4, first.sharpness_restored, second.sharpness_restored, None),
        (
            "Perceptual distance",
            4,
            first.perceptual_restored,
            second.perceptual_restored,
            comparison.perceptual,
        ),
    ):
        if a is not None and b is not None:
            between = "" if difference is None else _interval(difference, digits)
            cells = [name, f"{a:.{digits}f}", f"{b:.{digits}f}", f"{b - a:+.{digits}f}", between]
            rows.append(cells)
    rows.append(["Time, s", f"{first.latency_s:.3f}", f"{second.latency_s:.3f}", "not compared", ""])
    interval = f"{comparison.confidence:.0%} interval"
    return Table("Restored images, means", ["", "A", "B", "B over A", interval], rows)


def group_rows(comparison: Comparison, field: str) -> list[list[str]]:
    """Scenes or strengths of the blur: the number of images, PSNR of A and B and the difference."""
    both = zip(getattr(comparison.first, field), getattr(comparison.second, field), strict=True)
    rows = []
    for a, b in both:
        gain = b.psnr_restored_db - a.psnr_restored_db
        scores = [f"{a.psnr_restored_db:.2f}", f"{b.psnr_restored_db:.2f}", f"{gain:+.2f}"]
        rows.append([a.name or "–", str(a.num_images), *scores])
    return rows


def _interval(difference: Difference, digits: int) -> str:
    if difference.low is None or difference.high is None:
        return "–"
    return f"{difference.low:+.{digits}f} to {difference.high:+.{digits}f}"


def _is_few(comparison: Comparison) -> bool:
    return 1 < comparison.num_units < _FEW_UNITS
