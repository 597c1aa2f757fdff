"""What a report says to people, as blocks of a document."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.counting import counted
from pipelines.evaluate.document import Block, Chart, Document, Heading, Paragraph, Strip, Table
from pipelines.evaluate.drawing import ERROR_SCALE_LEVELS
from pipelines.evaluate.report import Report
from pipelines.evaluate.summary import Distribution, Group

HISTOGRAM = "gain.png"
SHARPNESS_NOTE = (
    "Sharpness is taken without the truth: one minus the blur metric of Crete et al. 2007, on 8-bit luma, "
    "0 to 1. Noise and ringing count as sharp."
)
PERCEPTUAL_NOTE = (
    "The perceptual distance is LPIPS-like and not LPIPS: distances of normalised features as there, but of "
    "another network and without weights fitted to people's judgements. Lower is better."
)
ERROR_NOTE = (
    f"Error maps: mean absolute difference of the three channels to the truth, black none, yellow "
    f"{ERROR_SCALE_LEVELS} levels of 255 and more. Below each image the detail where blurring cost most, "
    "pixel by pixel."
)


def report_document(
    report: Report, *, gains_png: bytes, worst: Sequence[Strip], best: Sequence[Strip]
) -> Document:
    """The report for people.

    Args:
        report: what it is about.
        gains_png: the histogram of the gain.
        worst, best: images of the lowest and highest gain, the extremes first.
    """
    statistics = "off" if report.train_patch_px is None else f"on, training patch {report.train_patch_px} px"
    blocks: list[Block] = [
        Paragraph(
            f"{report.gain_db:+.2f} dB over the blurred input, from {report.psnr_blurred_db:.2f} to "
            f"{report.psnr_restored_db:.2f} dB: means over {counted(report.num_images, 'image')}. "
            f"Local statistics: {statistics}."
        ),
        score_table(report),
        Paragraph(SHARPNESS_NOTE, is_note=True),
    ]
    if report.perceptual_restored is not None:
        blocks.append(Paragraph(f"{PERCEPTUAL_NOTE} Here: {report.perceptual_network}.", is_note=True))
    blocks += [
        Heading("Distribution"),
        distribution_table(report.distributions),
        Chart(HISTOGRAM, f"Histogram of the gain over {counted(report.num_images, 'image')}", gains_png),
    ]
    if report.by_blur:
        blocks += [
            Heading("By strength of the blur"),
            _group_table("Means by strength of the blur", "blur", report.by_blur),
            Paragraph(f"{report.blur_rule}.", is_note=True),
        ]
    blocks += [Heading("By scene"), _group_table("Means by scene", "scene", report.by_scene)]
    for name, strips, which in (("Worst", worst, "lowest"), ("Best", best, "highest")):
        if strips:
            told = f"The {counted(len(strips), 'image')} of the {which} gain. {ERROR_NOTE}"
            blocks += [Heading(f"{name} images"), Paragraph(told, is_note=True), *strips]
    blocks += [Heading("How it was measured"), protocol_table(report), Paragraph(time_told(report))]
    return Document(f"{report.model} on {short_name(report.data)}", blocks)


def score_table(report: Report) -> Table:
    """Means before and after; the last column is of sharpness only."""
    rows = []
    for name, digits, blurred, restored, truth in (
        ("PSNR, dB", 2, report.psnr_blurred_db, report.psnr_restored_db, None),
        ("SSIM", 4, report.ssim_blurred, report.ssim_restored, None),
        ("Sharpness", 4, report.sharpness_blurred, report.sharpness_restored, report.sharpness_truth),
        ("Perceptual distance", 4, report.perceptual_blurred, report.perceptual_restored, None),
    ):
        if blurred is not None and restored is not None:
            values = [f"{value:.{digits}f}" for value in (blurred, restored)]
            end = "" if truth is None else f"{truth:.{digits}f}"
            rows.append([name, *values, f"{restored - blurred:+.{digits}f}", end])
    return Table("Means over images", ["", "blurred", "restored", "difference", "truth"], rows)


def distribution_table(distributions: dict[str, Distribution]) -> Table:
    """Percentiles of what a report gives them for."""
    rows = []
    for name, label, form in (
        ("psnr_restored_db", "PSNR, dB", "{:.2f}"),
        ("gain_db", "Gain, dB", "{:+.2f}"),
        ("ssim_restored", "SSIM", "{:.4f}"),
    ):
        if name in distributions:
            rows.append([label, *map(form.format, distributions[name].model_dump().values())])
    columns = ["", "min", "5 %", "25 %", "median", "75 %", "95 %", "max"]
    return Table("Restored images, percentiles", columns, rows)


def _group_table(caption: str, name: str, groups: Sequence[Group]) -> Table:
    columns = [name, "images", "detail lost", "blurred, dB", "restored, dB", "gain, dB", "SSIM"]
    rows = []
    for group in groups:
        lost = "–" if group.detail_lost is None else "{:.2f} to {:.2f}".format(*group.detail_lost)
        scores = [f"{group.psnr_blurred_db:.2f}", f"{group.psnr_restored_db:.2f}", f"{group.gain_db:+.2f}"]
        ssim = "–" if group.ssim_restored is None else f"{group.ssim_restored:.4f}"
        rows.append([group.name or "–", str(group.num_images), lost, *scores, ssim])
    return Table(caption, columns, rows, more="report.json")


def protocol_table(*reports: Report) -> Table:
    """What scores depend on beside the data, the data, and the models: one, or A and B."""
    report = reports[0]
    rows = [[name, "none" if value is None else str(value)] for name, value in report.protocol]
    rows += [["data", report.data], ["digest of the data", report.data_digest]]
    for name, each in zip((" A", " B") if len(reports) > 1 else ("",), reports, strict=True):
        rows += [[f"model{name}", each.model], [f"digest of the weights{name}", each.weights_digest]]
    return Table("Protocol, data and weights", ["", ""], rows)


def short_name(data: str) -> str:
    """The last name of a path or URL, or of both of two folders: for a title, whose table has it whole."""
    places = [place.partition("?")[0].rstrip("/") for place in data.split(" and ")]
    return " and ".join(place.rpartition("/")[2] for place in places) or data


def time_told(report: Report) -> str:
    """Time and memory, and under which conditions they were measured."""
    told = f"{report.latency_s:.2f} s an image (median), {report.peak_memory_mib:.0f} MiB at the peak"
    if report.num_workers is None:
        return f"{told}; one process, on one thread."
    return (
        f"{told}; on {counted(report.num_workers, 'worker')}, each on one thread: they share memory "
        "and caches, so compare this time only with one that was measured alike."
    )
