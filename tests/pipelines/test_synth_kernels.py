"""Measured kernels: what is one, what is none, and that the records name it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from nafnet_core import CapabilityError, InputError
from nafnet_core.kernels import disc_kernel, gaussian_kernel, shake_kernel
from pipelines.files import sha256
from pipelines.png import encode_png
from pipelines.synth.kernels import read_kernels
from tests.pipelines.test_synth import outputs, run, write_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", [f"{name}.png" for name in "abcdef"])


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    return folder


def write_kernel(path: Path, kernel: np.ndarray) -> Path:
    Image.fromarray(np.rint(kernel / kernel.max() * 255).astype(np.uint8)).save(path)
    return path


def test_kernel_is_applied_centred(photos: Path, kernels: Path, tmp_path: Path) -> None:
    # One bright dot off the middle: centred, it moves nothing. Left where it is, it would shift each pair,
    # and the network would learn to shift.
    kernel = np.zeros((15, 15, 3), np.uint8)
    kernel[2, 11] = 255
    (kernels / "dot.png").write_bytes(encode_png(kernel))
    run(photos, tmp_path / "out", kinds=("measured",), kernels=kernels, max_noise=0)
    blur, sharp = outputs(tmp_path / "out"), outputs(tmp_path / "out", "sharp")
    for key, image in blur.items():
        # Highlights are taken to have been brighter than white, and are clipped again.
        assert np.abs(image.astype(int) - sharp[key]).max() <= 1


def test_records_name_the_kernel(photos: Path, kernels: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        write_kernel(kernels / f"k{number}.png", shake_kernel(rng, 12))
    run(photos, tmp_path / "out", kinds=("measured",), kernels=kernels, max_noise=0)
    lines = (tmp_path / "out" / "degradations.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["kernel"] for record in records}) > 1
    for record in records:
        assert record["kernel_sha256"] == sha256(kernels / record["kernel"])
    # Another photo with the named kernel alone is what the record says.
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "k.png").write_bytes((kernels / records[0]["kernel"]).read_bytes())
    run(photos / "a.png", tmp_path / "again", kinds=("measured",), kernels=alone, max_noise=0)
    # The draw of a kernel takes nothing from the noise, and there is none.
    assert np.array_equal(outputs(tmp_path / "again")["a/0"], outputs(tmp_path / "out")["a/0"])
    write_kernel(kernels / "k3.png", shake_kernel(rng, 12))
    with pytest.raises(InputError, match="expected kernels 3 files, got kernels 4 files"):
        run(photos, tmp_path / "out", kinds=("measured",), kernels=kernels, max_noise=0)


def test_photos_are_no_kernels(kernels: Path) -> None:
    photo = data.chelsea()
    gray = photo[100:160, 100:160].mean(axis=2).astype(np.uint8)
    for image, line in (
        (photo[:60, :60], "expected a gray image, got a colour image"),
        (photo.mean(axis=2).astype(np.uint8), "451×300, and a kernel is up to 101 px"),
        (gray, "light all over, as a photo's"),
        (np.zeros((5, 5), np.uint8), "not all zero"),
    ):
        Image.fromarray(image).save(kernels / "photo.png")
        with pytest.raises(InputError, match=f"not a blur kernel: .*photo.png.*{line}"):
            read_kernels(kernels)


@pytest.mark.parametrize(
    "kernel",
    [disc_kernel(31), disc_kernel(5), gaussian_kernel(2.5), np.ones((3, 3)), np.ones((1, 15)), np.eye(41)],
    ids=["disc", "small disc", "gaussian", "box", "line", "diagonal"],
)
def test_kernels_of_every_shape_are_taken(kernels: Path, kernel: np.ndarray) -> None:
    write_kernel(kernels / "k.png", kernel)
    (found,) = read_kernels(kernels)
    assert found.kernel.sum() == pytest.approx(1) and found.name == "k.png"
    assert read_kernels(kernels / "k.png")[0].sha256 == found.sha256


def test_matlab_files(kernels: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    cells = np.empty((1, 3), object)
    cells[0] = [gaussian_kernel(sigma).astype(float) for sigma in (1.0, 2.0, 3.0)]
    scipy_io.savemat(kernels / "many.mat", {"kernels": cells})
    scipy_io.savemat(kernels / "one.mat", {"f": disc_kernel(9)})
    write_kernel(kernels / "a.png", disc_kernel(7))
    found = read_kernels(kernels)
    assert [kernel.name for kernel in found] == [
        "a.png",
        "many.mat:kernels[0]",
        "many.mat:kernels[1]",
        "many.mat:kernels[2]",
        "one.mat:f",
    ]
    middle = [float(kernel.kernel.max()) for kernel in found[1:4]]
    assert middle == sorted(middle, reverse=True)
    scipy_io.savemat(kernels / "one.mat", {"f": -disc_kernel(9)})
    with pytest.raises(InputError, match="one.mat:f.*non-negative"):
        read_kernels(kernels)
    (kernels / "one.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(50))
    with pytest.raises(InputError, match="a damaged MATLAB file: .*one.mat"):
        read_kernels(kernels)


def test_matlab_file_without_scipy(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernels / "one.mat").write_bytes(b"MATLAB")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(CapabilityError, match="need SciPy: .*one.mat.*pip install scipy"):
        read_kernels(kernels)


def test_files_that_hold_no_kernels(photos: Path, kernels: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--kernels"):
        run(photos, tmp_path / "out", kinds=("measured",))
    with pytest.raises(InputError, match="Add --kind measured"):
        run(photos, tmp_path / "out", kernels=kernels)
    with pytest.raises(InputError, match="no kernels in this folder"):
        run(photos, tmp_path / "out", kinds=("measured",), kernels=kernels)
    with pytest.raises(InputError, match="no such folder"):
        run(photos, tmp_path / "out", kinds=("measured",), kernels=tmp_path / "nowhere")
    np.save(kernels / "k.npy", np.ones((3, 3)))
    with pytest.raises(InputError, match="a format that is not read: .*k.npy"):
        run(photos, tmp_path / "out", kinds=("measured",), kernels=kernels)
    with pytest.raises(InputError, match="not a file of kernels"):
        read_kernels(kernels / "k.npy")


def test_published_kernels_are_taken() -> None:
    folder = os.environ.get("NAFNET_DATA")
    if not folder:
        pytest.skip("NAFNET_DATA is not set")
    found = read_kernels(Path(folder) / "kernels")
    assert sum(kernel.name.startswith("levin2009/") for kernel in found) == 8
    assert sum(kernel.name.startswith("kernels_12.mat:kernels[") for kernel in found) == 12
