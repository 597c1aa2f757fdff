from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from nafnet_core import InputError, restore_image, tiling
from pipelines.encoding import write_photo
from pipelines.images import Photo, read_photo
from pipelines.models import LoadedModel
from pipelines.png import encode_png
from tests.pipelines.pairs import piece
from tests.pipelines.restore.conftest import RestoreFiles

# Kinds of photos


def test_photo_keeps_its_kind(restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path) -> None:
    sharp = piece(0, 32, 40)
    deep = sharp.astype(np.uint16) * 257 + 100
    gray = np.repeat(sharp[..., :1], 3, axis=2)
    kinds = {
        "deep.png": Photo(rgb_hwc=deep, alpha_hw=deep[..., 2].copy(), is_gray=False, exif=None, icc=None),
        "deep.tif": Photo(rgb_hwc=deep, alpha_hw=None, is_gray=False, exif=None, icc=None),
        "gray.png": Photo(rgb_hwc=gray, alpha_hw=sharp[..., 1].copy(), is_gray=True, exif=None, icc=None),
        "alpha.png": Photo(rgb_hwc=sharp, alpha_hw=sharp[..., 1].copy(), is_gray=False, exif=None, icc=None),
    }
    (tmp_path / "in").mkdir()
    for name, photo in kinds.items():
        write_photo(tmp_path / "in" / name, photo)
    assert restore_files(tmp_path / "in", loaded, tmp_path / "out").count("restored") == 4
    for name, photo in kinds.items():
        again = read_photo(tmp_path / "out" / name)
        expected = restore_image(loaded.model, photo.rgb_hwc, train_patch_px=64)
        if photo.is_gray:
            expected = np.repeat(expected.mean(axis=2, keepdims=True).round().astype(np.uint8), 3, axis=2)
        assert again.rgb_hwc.dtype == photo.rgb_hwc.dtype and again.is_gray == photo.is_gray
        assert np.array_equal(again.rgb_hwc, expected)
        assert (again.alpha_hw is None) == (photo.alpha_hw is None)
        assert photo.alpha_hw is None or np.array_equal(again.alpha_hw, photo.alpha_hw)
    # 16 bit is restored as such, and not by way of 8.
    assert len(np.unique(read_photo(tmp_path / "out" / "deep.png").rgb_hwc % 257)) > 100


def test_turned_photo_comes_out_upright(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    Image.fromarray(piece(0, 32, 40)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    (file,) = restore_files(tmp_path / "photo.jpg", loaded, tmp_path / "out").files
    assert (file.height_px, file.width_px) == (40, 32)
    with Image.open(tmp_path / "out" / "photo.jpg") as image:
        assert image.size == (32, 40)
        assert image.getexif()[0x0112] == 1 and image.getexif()[0x010F] == "Maker"


def test_one_pixel(restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "dot.png").write_bytes(encode_png(np.full((1, 1, 3), 90, np.uint8)))
    assert restore_files(tmp_path / "dot.png", loaded, tmp_path / "out").count("restored") == 1
    assert read_photo(tmp_path / "out" / "dot.png").rgb_hwc.shape == (1, 1, 3)


# Tiles, precision, memory


def test_tiles_give_the_same_picture(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path
) -> None:
    sharp = cv2.resize(piece(0, 200, 300), (330, 220))
    (tmp_path / "photo.png").write_bytes(encode_png(sharp))
    (whole,) = restore_files(tmp_path / "photo.png", loaded, tmp_path / "whole", tile_px=1024).files
    (tiled,) = restore_files(tmp_path / "photo.png", loaded, tmp_path / "tiled", tile_px=192).files
    assert (whole.tile_px, tiled.tile_px) == (None, 192)
    one, other = (read_photo(tmp_path / way / "photo.png").rgb_hwc.astype(int) for way in ("whole", "tiled"))
    assert np.abs(one - sharp).mean() > 2
    assert np.abs(one - other).mean() < 0.1 * np.abs(one - sharp).mean()


def test_tile_follows_from_free_memory(
    restore_files: RestoreFiles,
    photos: Path,
    loaded: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def tile_px_for(model: torch.nn.Module, memory_mib: float) -> int:
        asked.append(memory_mib)
        return 192

    monkeypatch.setattr(tiling, "free_memory_mib", lambda device: 1000.0)
    monkeypatch.setattr(tiling, "tile_px_for", tile_px_for)
    (tmp_path / "wide.png").write_bytes(encode_png(piece(0, 32, 220)))
    (file,) = restore_files(tmp_path / "wide.png", loaded, tmp_path / "out").files
    assert file.tile_px == 192
    # Half, since an overrun is no error but the end of the process.
    assert asked == [500.0]


def test_too_small_a_tile_is_refused_at_once(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="tiles too small.*more than 128 px.*got 64"):
        restore_files(photos, loaded, tmp_path / "out", tile_px=64)
    assert not (tmp_path / "out").exists()


def test_bf16_is_close_and_said(
    restore_files: RestoreFiles, photos: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    restore_files(photos / "a.png", loaded, tmp_path / "fp32")
    (file,) = restore_files(photos / "a.png", loaded, tmp_path / "bf16", precision="bf16").files
    assert file.settings is not None and file.settings["precision"] == "bf16"
    one, other = (read_photo(tmp_path / way / "a.png").rgb_hwc.astype(int) for way in ("fp32", "bf16"))
    assert 0 < np.abs(one - other).mean() < 3


def test_progress_counts_tiles_of_a_large_photo(
    restore_files: RestoreFiles, loaded: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(encode_png(piece(0, 200, 330)))
    steps: list[tuple[int, int, str]] = []
    restore_files(
        tmp_path / "photo.png",
        loaded,
        tmp_path / "out",
        tile_px=192,
        on_progress=lambda *step: steps.append(step),
    )
    # Two rows; three columns, which start every 128 px.
    assert steps == [*((0, 1, f"photo.png tile {number}/6") for number in range(1, 7)), (1, 1, "")]
