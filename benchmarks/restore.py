"""`nafnet restore` against a plain loop, what it costs beside the network, and how much memory it takes.

    NAFNET_DATA=~/data python benchmarks/restore.py                   # 12 minutes on two cores
    python benchmarks/restore.py --only folder --photos 12            # a try
    python benchmarks/restore.py --only scale --model runs/mine       # when --scale helps, of a trained model

The folder: 60 photos of five sizes, from 481×321 to 1920×1280, every third a PNG, made of NAFNET_DATA's, else
of those that scikit-image ships. The plain loop is what one would otherwise write: OpenCV
reads, the eager NCHW fp32 network with the usual local pool takes the whole image, OpenCV writes. It and the
command are whole processes, start-up included, in turns. The bare network is ours, called on decoded photos.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._rows import Rows, row, show  # noqa: E402
from benchmarks._stores import sharp_photos  # noqa: E402
from nafnet_core import PRESETS, NAFNet, randomize_residual_scales, save_model  # noqa: E402
from pipelines.openmp import spinning  # noqa: E402

_ROOT = Path(__file__).resolve().parent.parent
# Width and height, and how many in sixty.
_SIZES = {(481, 321): 20, (800, 600): 15, (1280, 720): 13, (1600, 1067): 8, (1920, 1280): 4}
_PATCH_PX = 160
_LARGE = (8000, 6000)
_ROUNDS = 3

_PLAIN_LOOP = """
import sys
sys.path.insert(0, {root!r})
import cv2, torch
from pathlib import Path
from benchmarks import _peers
from nafnet_core import load_model
ours, _ = load_model({model!r})
model = _peers.load_weights(_peers.plain(ours.config), ours).eval()
_peers.localize(model, {patch})
torch.set_grad_enabled(False)
for name in sys.argv[2:]:
    image = cv2.cvtColor(cv2.imread(name), cv2.COLOR_BGR2RGB)
    restored = model(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    restored = restored[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    cv2.imwrite(str(Path(sys.argv[1]) / Path(name).name), cv2.cvtColor(restored, cv2.COLOR_RGB2BGR))
"""
_BARE_NETWORK = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from nafnet_core.tiling import TileOptions, restore_images
from pipelines import Restorer
from pipelines.images import read_rgb_u8
restorer = Restorer({model!r})
images = [read_rgb_u8(Path(name)) for name in sys.argv[1:]]
options = TileOptions(train_patch_px={patch}, tile_px=1024, autocast=restorer.precision == "bf16")
start = time.perf_counter()
for _ in restore_images(restorer.network, images, options):
    pass
print(time.perf_counter() - start)
"""


def main() -> None:
    options = _arguments()
    rows: Rows = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        folder = Path(temporary)
        model = folder / "mobile.safetensors"
        network = NAFNet(PRESETS["mobile"])
        # A fresh network is the identity; with these scales it changes photos as a trained one does.
        randomize_residual_scales(network, seed=0, scale=0.1)
        save_model(network, model, metadata={"train_patch_px": _PATCH_PX})
        parts = {"folder": _folder, "cluster": _cluster, "memory": _memory}
        for name, part in parts.items():
            if options.only in (None, name):
                place = folder / name
                place.mkdir()
                rows |= part(place, model, options.photos)
    if options.model and options.only in (None, "scale"):
        with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
            rows |= _scale(options.model, Path(temporary))
    versions = {name: version(name) for name in ("torch", "ray", "opencv-python-headless", "pillow")}
    show(rows, as_json=options.json, versions=versions)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["folder", "cluster", "memory", "scale"])
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--model", help="a trained one, for --only scale")
    parser.add_argument("--scratch", help="where photos and results lie meanwhile")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _folder(place: Path, model: Path, number: int) -> Rows:
    """Images/s of the command and of the loop, and the command's time over the bare network's."""
    photos = _make_photos(place / "photos", number)
    parts = [photos[part::_ROUNDS] for part in range(_ROUNDS)]
    ours, bare, loop = [], [], 0.0
    for turn, part in enumerate(parts):
        ours.append(_restored_s(place / "photos", place / f"ours{turn}", model))
        loop += _loop_s(part, place / "loop", model)
        bare.append(_bare_s(photos, model))
        print(f"turn {turn}: {ours[-1]:.1f} s, network {bare[-1]:.1f} s, loop {loop:.1f} s", file=sys.stderr)
    loop_a_photo = loop / len(photos)
    rate, overheads = (
        len(photos) / statistics.median(ours),
        [a / b - 1 for a, b in zip(ours, bare, strict=True)],
    )
    return {
        f"nafnet restore of {len(photos)} photos, mobile": row(rate, "images/s"),
        "the same, against a plain loop over the eager network": row(rate * loop_a_photo, "×", at_least=2.5),
        "whole command, over the bare network's time": row(
            100 * statistics.median(overheads), "%", at_most=10
        ),
    }


def _cluster(place: Path, model: Path, number: int) -> Rows:
    """Files of an 8-worker Ray job that differ from those of one process."""
    _make_photos(place / "photos", number)
    pinned = ["--tile", "512"]
    _restored_s(place / "photos", place / "one", model, *pinned)
    seconds = _restored_s(place / "photos", place / "many", model, *pinned, "--workers", "8")
    names = [path.name for path in (place / "photos").iterdir()]
    differing = sum(
        (place / "one" / name).read_bytes() != (place / "many" / name).read_bytes() for name in names
    )
    return {
        f"8 Ray workers on {os.cpu_count()} cores, whole command": row(seconds, "s"),
        "files of theirs that differ from one process's": row(differing, "of " + str(len(names)), at_most=0),
    }


def _memory(place: Path, model: Path, number: int) -> Rows:
    """Peak of the command over a folder with one photo of 48 megapixels."""
    _make_photos(place / "photos", 10)
    large = cv2.resize(cv2.imread(str(place / "photos" / "00.jpg")), _LARGE, interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(place / "photos" / "04-large.jpg"), large)
    del large
    command = [*_command(place / "photos", place / "out", model)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    peak_gib = usage.ru_maxrss / 2**20
    return {
        "peak memory, 48 megapixels among small ones, start-up included": row(peak_gib, "GiB", at_most=1.5)
    }


def _scale(model: str, place: Path) -> Rows:
    """PSNR over the blurred input of photos under shakes of several extents, at several scales."""
    from nafnet_core.kernels import shake_kernel
    from pipelines import Restorer
    from pipelines.restorer import RestoreSettings

    sharp = [cv2.resize(photo, (960, 640), interpolation=cv2.INTER_AREA) for photo in _photos(place, 8)]
    rows: Rows = {}
    restorers = {scale: Restorer(model, RestoreSettings(scale=scale)) for scale in (1.0, 0.5, 0.25)}
    for extent_px in (8, 16, 32, 64):
        rng = np.random.default_rng(extent_px)
        blurred = [_blurred(photo, shake_kernel(rng, extent_px)) for photo in sharp]
        for scale, restore in restorers.items():
            gains = [
                _psnr_db(restore(lq), gt) - _psnr_db(lq, gt) for lq, gt in zip(blurred, sharp, strict=True)
            ]
            rows[f"gain, shakes of {extent_px} px, --scale {scale:g}"] = row(statistics.fmean(gains), "dB")
    return rows


def _blurred(sharp: NDArray[np.uint8], kernel: NDArray[np.float32]) -> NDArray[np.uint8]:
    linear = (sharp / 255.0) ** 2.2
    blurred = cv2.filter2D(linear.astype(np.float32), -1, kernel, borderType=cv2.BORDER_REFLECT)
    return np.rint(255 * blurred.clip(0, 1) ** (1 / 2.2)).astype(np.uint8)


def _psnr_db(image: NDArray[np.uint8], gt: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((image.astype(float) - gt) ** 2)))


def _photos(folder: Path, number: int) -> list[NDArray[np.uint8]]:
    """Sharp photos, (H, W, 3) RGB."""
    files = sharp_photos(folder, number)
    return [cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files]  # type: ignore[misc]


def _make_photos(folder: Path, number: int) -> list[str]:
    """So many photos in the shares of `_SIZES`, shuffled."""
    folder.mkdir()
    originals = sharp_photos(folder.with_name(f"{folder.name}-originals"), number)
    sizes = [size for size, share in _SIZES.items() for _ in range(share)]
    np.random.default_rng(0).shuffle(sizes)
    names = []
    for index in range(number):
        path = folder / f"{index:02}.{'png' if index % 3 == 2 else 'jpg'}"
        photo = cv2.imread(str(originals[index % len(originals)]))
        fitted = cv2.resize(photo, tuple(sizes[index % len(sizes)]), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(path), fitted)
        names.append(str(path))
    return names


def _command(photos: Path, out: Path, model: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pipelines", "restore", str(photos), "--out", str(out)]
    return [*command, "--model", str(model), *options]


def _restored_s(photos: Path, out: Path, model: Path, *options: str) -> float:
    return _timed(_command(photos, out, model, *options))[0]


def _loop_s(photos: list[str], out: Path, model: Path) -> float:
    out.mkdir(exist_ok=True)
    program = _PLAIN_LOOP.format(root=str(_ROOT), model=str(model), patch=_PATCH_PX)
    return _timed([sys.executable, "-c", program, str(out), *photos])[0]


def _bare_s(photos: list[str], model: Path) -> float:
    program = _BARE_NETWORK.format(root=str(_ROOT), model=str(model), patch=_PATCH_PX)
    return float(_timed([sys.executable, "-c", program, *photos])[1])


def _timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    environment = {**os.environ, **spinning()}  # the bare network's threads wait as the command's do
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return seconds, done.stdout


if __name__ == "__main__":
    main()
