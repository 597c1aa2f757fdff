from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import data

from nafnet_core.blur import degrade, draw_degradation, sample_rng
from pipelines import prepare
from pipelines.images import read_rgb_u8
from pipelines.png import encode_png
from pipelines.prepare import PrepareConfig, PrepareResult
from pipelines.screening import MAX_SHIFT_PX, MIN_PSNR_DB, MIN_RESPONSE, alignment
from pipelines.sources import FolderPairs
from pipelines.store import SUSPECTS, PairStore
from tests.pipelines.pairs import blurred, write_pairs

PHOTOS = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]


def shaken(sharp: NDArray[np.uint8], seed: int, max_size_px: float = 15.0) -> NDArray[np.uint8]:
    rng = sample_rng(seed, 0)
    drawn = draw_degradation(
        rng, kinds=("shake", "varying", "defocus"), min_size_px=3.0, max_size_px=max_size_px,
        max_noise=0.004, min_jpeg_quality=None,
    )  # fmt: skip
    return degrade(sharp, drawn, rng, measured_kernels=[])


def moved(image: NDArray[np.uint8], by_px: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two views of one image, the one `by_px` to the right of the other."""
    return np.ascontiguousarray(image[:, by_px:]), np.ascontiguousarray(image[:, : image.shape[1] - by_px])


# One pair


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("seed", range(3))
def test_blurred_photos_are_not_suspect(number: int, seed: int) -> None:
    found = alignment(shaken(PHOTOS[number], seed), PHOTOS[number])
    assert found.reason() == "", found


@pytest.mark.parametrize("number", range(4))
def test_wrong_partners_are_suspect(number: int) -> None:
    sharp = PHOTOS[number]
    height, width = sharp.shape[:2]
    other = cv2.resize(PHOTOS[number - 1], (width, height), interpolation=cv2.INTER_AREA)
    lq = shaken(sharp, 1)
    wrong = {
        "another photo": (lq, other),
        "upside down": (lq[::-1].copy(), sharp),
        "another crop": (lq[: height // 2, : width // 2].copy(), sharp[-(height // 2) :, -(width // 2) :]),
    }
    if number < 3:  # the rocket and its tower are their own mirror image, nearly
        wrong["mirrored"] = (lq[:, ::-1].copy(), sharp)
    for name, pair in wrong.items():
        assert alignment(*pair).reason().startswith(("hardly a pair", "misaligned")), name


@pytest.mark.parametrize("by_px", [0, 3, 9, 20])
@pytest.mark.parametrize("scale", [1, 3])
def test_shift_is_told_in_pixels_of_the_pair(by_px: int, scale: int) -> None:
    # At three times the size the pair is looked at reduced.
    photo = cv2.resize(PHOTOS[0], None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    lq, gt = moved(photo, by_px)
    found = alignment(blurred(lq), gt)
    assert found.shift_px == pytest.approx(by_px, abs=0.5)
    assert found.reason().startswith("misaligned") == (by_px > MAX_SHIFT_PX)


def test_identical_images_are_suspect_and_nearly_identical_ones_are_not() -> None:
    sharp = PHOTOS[1]
    assert "identical" in alignment(sharp, sharp.copy()).reason()
    nearly = sharp.copy()
    nearly[0, 0] ^= 1
    assert alignment(nearly, sharp).reason() == ""


def test_dark_pairs_that_are_none_are_seen_by_their_correlation() -> None:
    lq, gt = (PHOTOS[0] // 16), (PHOTOS[3][:427, :512] // 16)
    found = alignment(lq[:427], gt)
    assert found.psnr_db is not None and found.psnr_db > MIN_PSNR_DB
    assert found.response is not None and found.response < MIN_RESPONSE
    assert "phase correlation" in found.reason()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (15, 400), (16, 16), (600, 1), (300, 700)])
def test_flat_and_tiny_images_are_not_judged_by_their_noise(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    lq, gt = ((90 + rng.integers(-1, 2, (*shape, 3))).astype(np.uint8) for _ in range(2))
    lq[0, 0] = 92  # not identical
    found = alignment(lq, gt)
    assert found.reason() == "" and found.shift_px is None and found.response is None


def test_figures_repeat() -> None:
    lq = shaken(PHOTOS[2], 5)
    assert alignment(lq, PHOTOS[2]) == alignment(lq.copy(), PHOTOS[2].copy())


# In a store


def prepared(source: FolderPairs, out: Path) -> PrepareResult:
    config = PrepareConfig(out=out, crop_px=32, stride_px=32, pairs_per_shard=2, use_ray=False)
    return prepare.run(source, source.pairs(), config)


def test_suspects_are_kept_and_listed(tmp_path: Path) -> None:
    names = [f"s{number // 2}/{number}" for number in range(6)]
    source = write_pairs(tmp_path / "pairs", names, height=120, width=160)
    before = prepared(source, tmp_path / "before")
    assert before.manifest.num_suspect == 0 and (before.out / SUSPECTS).read_text() == ""
    refs = source.pairs()
    one, other = (read_rgb_u8(refs[number].lq) for number in (1, 4))
    refs[1].lq.write_bytes(encode_png(other))
    refs[4].lq.write_bytes(encode_png(one))
    refs[5].lq.write_bytes(encode_png(read_rgb_u8(refs[5].gt)))
    result = prepared(source, tmp_path / "store")
    rows = [json.loads(line) for line in (result.out / SUSPECTS).read_text().splitlines()]
    assert rows == list(result.suspects) and result.manifest.num_suspect == 3
    assert [row["key"] for row in rows] == ["s0/1", "s2/4", "s2/5"]
    assert rows[0]["reason"].startswith(("hardly a pair", "misaligned")) and rows[0]["psnr_db"] < 20
    assert rows[0]["lq"] == str(refs[1].lq) and "identical" in rows[2]["reason"]
    # Kept all the same.
    assert result.manifest.num_refused == 0 and result.manifest.num_pairs == before.manifest.num_pairs
    assert PairStore(result.out).pair(0).key == "s0/0@0,0"


def test_real_pairs_are_not_suspect(tmp_path: Path) -> None:
    place = os.environ.get("NAFNET_DATA")
    if not place:
        pytest.skip("NAFNET_DATA is not set")
    folder = Path(place) / "gopro/GOPRO_Large/train/GOPR0372_07_00"
    pairs = [
        (read_rgb_u8(path), read_rgb_u8(folder / "sharp" / path.name))
        for path in sorted((folder / "blur").iterdir())
    ]
    assert [alignment(*pair).reason() for pair in pairs] == [""] * 17
    shuffled = [alignment(lq, pairs[index - 1][1]).reason() for index, (lq, _) in enumerate(pairs)]
    assert all(shuffled)
    shifted = [bool(alignment(lq[:, 10:], gt[:, :-10]).reason()) for lq, gt in pairs]
    assert sum(shifted) >= 15
