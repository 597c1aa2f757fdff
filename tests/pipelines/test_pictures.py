from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nafnet_core import InputError
from pipelines.images import read_rgb_u8
from pipelines.pictures import before_after, curves
from tests.pipelines.pairs import blurred, piece

LABEL, GAP = 28, 6


def panels(height: int, width: int) -> dict[str, NDArray[np.uint8]]:
    sharp = piece(0, height, width)
    return {"blurred": blurred(sharp), "restored": piece(1, height, width), "sharp": sharp}


def columns(picture: NDArray[np.uint8], num: int) -> list[NDArray[np.uint8]]:
    width = (picture.shape[1] - (num - 1) * GAP) // num
    return [picture[:, i * (width + GAP) : i * (width + GAP) + width] for i in range(num)]


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [
        (72, 96, (96, 72)),
        (96, 72, (72, 96)),
        (200, 400, (400, 200)),
        (250, 440, (300, 170)),  # shrunk to `max_width_px`
        (1, 1, (1, 1)),
    ],
)
def test_size_and_panels_of_before_and_after(
    tmp_path: Path, height: int, width: int, shown: tuple[int, int]
) -> None:
    images = panels(height, width)
    limit = 300 if width == 440 else 480
    path = before_after(tmp_path / "deep" / "picture.png", images, max_width_px=limit)
    assert path == tmp_path / "deep" / "picture.png"
    picture = read_rgb_u8(path)
    shown_width, shown_height = shown
    # A label, the image, and below it its detail as a square of the same width.
    assert picture.shape == (LABEL + shown_height + GAP + shown_width, 3 * shown_width + 2 * GAP, 3)
    for column, image in zip(columns(picture, 3), images.values(), strict=True):
        small = cv2.resize(image, shown, interpolation=cv2.INTER_AREA)
        assert np.array_equal(column[LABEL : LABEL + shown_height], small)
    assert [path.name for path in path.parent.iterdir()] == ["picture.png"]


def test_labels_are_written(tmp_path: Path) -> None:
    picture = read_rgb_u8(before_after(tmp_path / "picture.png", panels(72, 160)))
    bars = [column[:LABEL] for column in columns(picture, 3)]
    assert all((bar == 255).mean() > 0.5 and bar.min() < 100 for bar in bars)
    assert len({bar.tobytes() for bar in bars}) == 3


def test_detail_is_the_same_place_in_each_where_first_and_last_differ(tmp_path: Path) -> None:
    # Equal everywhere but in one place: there is what deblurring is about.
    sharp = piece(0, 200, 300).copy()
    lq = sharp.copy()
    lq[120:160, 200:240] = 255 - lq[120:160, 200:240]
    others = {"a": lq, "b": piece(1, 200, 300)}
    picture = read_rgb_u8(before_after(tmp_path / "p.png", {**others, "sharp": sharp}, zoom_px=40))
    details = [column[LABEL + 200 + GAP :] for column in columns(picture, 3)]
    corners = [(top, left) for top in range(0, 161, 10) for left in range(0, 261, 10)]

    def detail_at(image: NDArray[np.uint8], corner: tuple[int, int]) -> NDArray[np.uint8]:
        crop = image[corner[0] : corner[0] + 40, corner[1] : corner[1] + 40]
        return cv2.resize(np.ascontiguousarray(crop), (300, 300), interpolation=cv2.INTER_NEAREST)

    assert np.array_equal(details[2], detail_at(sharp, (120, 200)))
    for detail, image in zip(details, others.values(), strict=False):
        assert [corner for corner in corners if np.array_equal(detail, detail_at(image, corner))] == [
            (120, 200)
        ]
    # Or where it is told to be.
    path = before_after(tmp_path / "p.png", {**others, "sharp": sharp}, zoom_px=40, corner=(30, 70))
    details = [column[LABEL + 200 + GAP :] for column in columns(read_rgb_u8(path), 3)]
    assert np.array_equal(details[2], detail_at(sharp, (30, 70)))


def test_a_jpeg_by_its_name_is_smaller_and_looks_the_same(tmp_path: Path) -> None:
    panels = {"a": piece(0, 200, 300), "b": piece(1, 200, 300)}
    png, jpeg = (before_after(tmp_path / f"p.{kind}", panels) for kind in ("png", "jpg"))
    assert jpeg.read_bytes()[:2] == b"\xff\xd8" and jpeg.stat().st_size < png.stat().st_size / 2
    assert np.abs(read_rgb_u8(png).astype(int) - read_rgb_u8(jpeg)).mean() < 3


def test_picture_is_replaced(tmp_path: Path) -> None:
    first = read_rgb_u8(before_after(tmp_path / "p.png", panels(72, 96)))
    second = read_rgb_u8(before_after(tmp_path / "p.png", {"only": piece(3)}))
    assert first.shape[1] == 3 * 96 + 2 * GAP and second.shape[1] == 96


def test_curves(tmp_path: Path) -> None:
    falling = [(float(n), 1.0 / (n + 1)) for n in range(50)]
    series = {"loss": falling, "psnr_db": [(0.0, 20.0), (50.0, 25.0)]}
    picture = read_rgb_u8(curves(tmp_path / "deep" / "curves.png", series, title="a run"))
    assert picture.shape == (352, 924, 3)  # 3.2 in and 2 × 4.2 in at 110 dpi
    for half in (picture[:, :462], picture[:, 462:]):
        # Axes and ink, and mostly paper.
        assert half.std() > 10 and (half == 255).mean() > 0.5
    # The data are drawn: other data, another picture.
    rising = {**series, "loss": [(x, -y) for x, y in falling]}
    assert not np.array_equal(picture, read_rgb_u8(curves(tmp_path / "2.png", rising, title="a run")))


def test_long_curves_are_smoothed_and_levels_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = [(float(n), float(value)) for n, value in enumerate(rng.normal(20, 1, 200))]
    plain = read_rgb_u8(curves(tmp_path / "1.png", {"psnr": noisy}, title="a run"))
    # The running mean is drawn in the full colour, the points below it in a pale one.
    full = (np.abs(plain.astype(int) - (31, 119, 180)) < 12).all(axis=2).sum()
    pale = (np.abs(plain.astype(int) - (188, 214, 232)) < 12).all(axis=2).sum()
    assert full > 200 and pale > 200
    lines = {"psnr": ("blurred input", 20.0)}
    lined = read_rgb_u8(curves(tmp_path / "2.png", {"psnr": noisy}, title="a run", lines=lines))
    assert not np.array_equal(plain, lined)


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(0.0, float("nan")), (1.0, 2.0)]])
def test_curves_of_little_data(tmp_path: Path, points: list[tuple[float, float]]) -> None:
    # A run that ended early has a point or none; one that diverged has NaN.
    picture = read_rgb_u8(curves(tmp_path / "curves.png", {"loss": points}, title="a run"))
    assert picture.shape == (352, 462, 3) and picture.std() > 5


def test_curves_leave_no_figure_behind(tmp_path: Path) -> None:
    from matplotlib import pyplot

    curves(tmp_path / "curves.png", {"loss": [(0.0, 1.0)]}, title="a run")
    assert pyplot.get_fignums() == []


def test_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write into this folder"):
        before_after(tmp_path / "file" / "picture.png", panels(72, 96))
    with pytest.raises(InputError, match="cannot write into this folder"):
        curves(tmp_path / "file" / "curves.png", {"loss": [(0.0, 1.0)]}, title="a run")
