"""The table of a deployment report: the Pareto front, CSV, Markdown, the picture."""

from __future__ import annotations

import csv
import io
import itertools
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.compress.chart import draw_chart, place_labels
from pipelines.compress.table import (
    DeployTable,
    Row,
    as_csv,
    as_markdown,
    front_of,
    front_told,
    pareto_front,
    score_cells,
)

_ROW = Row(
    model="mobile-v1",
    preset="compact",
    macs_share=1.0,
    backend="torch",
    precision="fp32",
    parameters=780_371,
    file_mib=3.0,
    gmacs=24.5,
    psnr_db=25.08,
    loss_db=0.0,
    ssim=0.75,
    latency_256_ms=50.0,
    speedup_256=1.0,
    latency_720p_ms=700.0,
    speedup_720p=1.0,
    peak_memory_mib=250.0,
)
_OTHER = replace(
    _ROW, model="a|b.onnx", preset=None, backend="onnxruntime", precision="fp16", psnr_db=25.0, loss_db=0.08,
    latency_720p_ms=350.0, speedup_720p=2.0,
)  # fmt: skip
_UNSCORED = replace(_ROW, model="width32", psnr_db=None, loss_db=None, ssim=None)
_TABLE = DeployTable(
    rows=(_ROW, _OTHER), threads=2, runs=7, data="/data/test-store", num_images=50, psnr_blurred_db=23.68,
    ssim_blurred=0.7,
)  # fmt: skip


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 20.0)], [0]),
        ([(1.0, 20.0), (2.0, 25.0)], [0, 1]),  # better, and slower
        ([(2.0, 25.0), (1.0, 20.0)], [1, 0]),  # the fastest first
        ([(1.0, 25.0), (2.0, 20.0)], [0]),  # beaten in both
        ([(1.0, 25.0), (2.0, 25.0)], [0]),  # as good, and faster
        ([(1.0, 25.0), (1.0, 20.0)], [0]),  # as fast, and better
        ([(1.0, 20.0), (1.0, 25.0)], [1]),
        ([(1.0, 25.0), (1.0, 25.0)], [0, 1]),  # equal ones do not beat each other
        ([(3.0, 26.0), (1.0, 20.0), (2.0, 25.0), (2.5, 24.0), (2.0, 25.0)], [1, 2, 4, 0]),
        ([(1.0, 20.0), (math.nan, 30.0), (0.5, math.nan)], [0]),
        ([(1.0, math.inf), (2.0, math.inf), (0.5, 20.0)], [2, 0]),
    ],
)
def test_the_pareto_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front


_VALUES = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(_VALUES, _VALUES), max_size=12))
def test_the_front_is_what_no_point_dominates(points: list[tuple[float, float]]) -> None:
    def beats(first: tuple[float, float], second: tuple[float, float]) -> bool:
        return first[0] <= second[0] and first[1] >= second[1] and first != second

    front = pareto_front(points)
    unbeaten = {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}
    assert len(front) == len(set(front)) and set(front) == unbeaten
    for first, second in itertools.pairwise(points[index] for index in front):
        assert first == second or (first[0] < second[0] and first[1] < second[1])


def test_what_the_table_cannot_tell_apart_is_no_reason_to_be_slower() -> None:
    faster = replace(_ROW, psnr_db=25.0796, latency_720p_ms=350.0)
    assert front_of([_ROW, faster, _UNSCORED]) == [1]
    assert front_of([_ROW, replace(faster, psnr_db=25.079)]) == [1, 0]
    assert front_told([_UNSCORED]) is None


def test_csv_has_every_figure_in_full() -> None:
    unscored = DeployTable(rows=(_UNSCORED,), threads=2, runs=7)
    rows = list(csv.DictReader(io.StringIO(as_csv([_TABLE, unscored]))))
    assert [row["model"] for row in rows] == ["mobile-v1", "a|b.onnx", "width32"]
    assert [row["reference"] for row in rows] == ["mobile-v1, torch fp32"] * 2 + ["width32, torch fp32"]
    assert rows[1]["psnr_db"] == "25.0" and rows[1]["psnr_blurred_db"] == "23.68" and rows[1]["preset"] == ""
    assert rows[2]["psnr_db"] == rows[2]["loss_db"] == rows[2]["psnr_blurred_db"] == ""
    assert rows[0]["parameters"] == "780371"


def test_markdown_tells_what_was_measured() -> None:
    page = as_markdown([_TABLE], machine="a processor", picture=True)
    assert "means over 50 images of test-store. Blurred input: 23.68 dB, SSIM 0.7000" in page
    assert "Reference: mobile-v1, torch fp32. Times: 7 rounds on 2 threads. a processor." in page
    assert "On the Pareto front of PSNR and time at 1280×720: 1, 2." in page
    assert "say little" not in page and "](report.png)" in page
    line = next(line for line in page.splitlines() if line.startswith("| 2 "))
    cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
    assert cells == [
        "2", "a/b.onnx", "–", "1.00", "onnxruntime", "fp16", "780,371", "3.00", "24.50", "25.00", "0.080",
        "0.7500", "50.0", "1.00", "350", "2.00", "250",
    ]  # fmt: skip


def test_several_tables_are_numbered_through() -> None:
    unscored = DeployTable(rows=(_UNSCORED,), threads=1, runs=1)
    page = as_markdown([_TABLE, unscored], machine="a processor", picture=False)
    assert "## mobile-v1" in page and "## width32" in page and "Not scored." in page
    assert "| 3 | width32 |" in page and "report.png" not in page
    assert "1 round on 1 thread" in page


@pytest.mark.parametrize(("blurred_db", "is_told"), [(24.09, True), (24.07, False), (26.0, True)])
def test_a_reference_that_gains_little_is_told(blurred_db: float, is_told: bool) -> None:
    table = replace(_TABLE, psnr_blurred_db=blurred_db)
    assert (table.warning() is not None) == is_told
    assert ("say little here" in as_markdown([table], machine="", picture=False)) == is_told
    assert table.to_dict()["gain_db"] == _ROW.psnr_db - blurred_db


def test_nothing_is_no_negative_loss() -> None:
    assert score_cells(replace(_ROW, loss_db=-1e-5)) == ["25.08", "0.000", "0.7500"]
    assert score_cells(replace(_ROW, loss_db=-0.0123))[1] == "-0.012"
    assert score_cells(_UNSCORED) == ["–", "–", "–"]


@pytest.mark.parametrize(("number", "slowest_ms"), [(1, 700.0), (14, 701.0), (14, 20_000.0)])
def test_the_picture_is_drawn(number: int, slowest_ms: float) -> None:
    times = [700.0, slowest_ms]
    rows = [replace(_ROW, model=f"$m${n}", latency_720p_ms=times[n % 2]) for n in range(number)]
    content = draw_chart(list(enumerate(rows, 1)), title="$a$ store")
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None and min(image.shape[:2]) > 400 and image.std() > 5


def test_labels_of_points_in_one_place_are_apart() -> None:
    points = np.array([(200.0, 150.0)] * 12 + [(5.0, 5.0), (395.0, 295.0)])
    offsets = place_labels(points, [12.0] * len(points), (0.0, 0.0, 400.0, 300.0))
    middles = points + np.array(offsets)
    assert (np.array(offsets) ** 2).sum(axis=1).max() < 80**2
    assert (middles > 0).all() and (middles < (400, 300)).all()
    for first, second in itertools.combinations(middles, 2):
        across, down = np.abs(first - second)
        assert across >= 12 or down >= 9, "two numbers on top of each other"
    for middle, point in itertools.product(middles, points):
        across, down = np.abs(middle - point)
        assert across > 6 or down > 4.5, "a number on a point"


def test_where_there_is_no_room_labels_are_written_all_the_same() -> None:
    assert len(place_labels(np.full((3, 2), 5.0), [12.0] * 3, (0.0, 0.0, 10.0, 10.0))) == 3
