"""What the bundled model does to photos that it was not trained on: beside the input, and classic methods.

    NAFNET_DATA=~/data python benchmarks/bundled.py --out report      # 10 minutes on two cores
    python benchmarks/bundled.py --beside runs/demo --images 10       # against another model too; a try
    python benchmarks/bundled.py --only pictures --out docs/mobile-v1
    python benchmarks/bundled.py --only blocks --images 16            # what each block is worth

Blur is made of the last 50 photos of `bsds500/val`, kind by kind and strength by strength, each photo with
a blur of its own in each; the first 50 chose recipe and settings, those of the classic methods as well. The
pairs of GoPro (`blur`) are of a street that was not trained on. Without NAFNET_DATA: photos that scikit-image
ships. All is run as `nafnet restore` runs it, and scored by the protocol of `nafnet evaluate`.

The classic methods know no kernel, as we do not: unsharp masking, and Richardson–Lucy and Wiener with a
gaussian. They are run on shakes of 3 to 18 px, for which their settings have the highest mean PSNR on other
photos. On a megapixel they take seconds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage import data, filters, restoration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._photos import Image, blurred, photos_of, shipped  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from nafnet_core.blur import BlurKind  # noqa: E402
from nafnet_core.kernels import gaussian_kernel  # noqa: E402
from nafnet_core.model import NAFNet  # noqa: E402
from pipelines import Restorer  # noqa: E402
from pipelines.images import read_rgb_u8  # noqa: E402
from pipelines.models import BUNDLED  # noqa: E402
from pipelines.pictures import before_after, scored_panels  # noqa: E402
from pipelines.restorer import RestoreSettings  # noqa: E402
from pipelines.scoring.image import score_image  # noqa: E402
from pipelines.shards import Pair  # noqa: E402
from pipelines.synth.kernels import read_kernels  # noqa: E402

Method = Callable[[Image], Image]

_SHAKES = ((1, 5), (5, 10), (10, 15), (15, 20), (20, 28))
_OTHERS: dict[str, tuple[BlurKind, tuple[int, int]]] = {
    "shake with roll, 3 to 18 px": ("varying", (3, 18)),
    "defocus, discs of 1.5 to 9 px": ("defocus", (3, 18)),
    "gaussian, σ 0.5 to 3 px": ("gaussian", (3, 18)),
    "measured kernels (Levin 2009)": ("measured", (0, 0)),
}
_TRAINED = "shake, 3 to 18 px"
_SHARP, _GOPRO, _SMALL = "sharp photos", "GoPro, 1280×720", "GoPro, 320×180"
_SMALL_SIZE = (320, 180)
_SETTINGS_ON = 16
_CASES: tuple[BlurKind, ...] = ("shake", "varying", "defocus")
_CASE_SIZES_PX = (6, 12)
_FRONT_PAGE = ("astronaut", "china")
_SPEED_SIZE = (1280, 720)


@dataclass(frozen=True)
class Scores:
    """Means of one method on one set."""

    psnr_db: float
    ssim: float
    each_psnr_db: tuple[float, ...]


def main() -> None:
    options = _arguments()
    if options.only == "pictures":
        _draw_cases(Restorer(options.model), options.out or Path("."))
        return
    root = os.environ.get("NAFNET_DATA")
    choosing, photos = photos_of(Path(root) if root else None)
    if options.only == "blocks":
        _tell_blocks(options.model, list(blurred(choosing[: options.images], "shake", (3, 18))))
        return
    choosing, photos = choosing[: options.images], photos[-options.images :]
    classic = _classic(choosing[:_SETTINGS_ON])
    methods: dict[str, Method] = {"blurred": lambda image: image, "mobile-v1": Restorer(options.model)}
    methods |= {Path(spec).name: Restorer(spec) for spec in options.beside}
    sets = _sets(photos, Path(root) if root else None)
    table = {
        name: _scored(pairs, methods | classic if name == _TRAINED else methods)
        for name, pairs in sets.items()
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        _write(options.out, table)
    rows = _rows(table, Restorer(options.model))
    versions = {name: version(name) for name in ("torch", "scikit-image", "opencv-python-headless")}
    if not options.json:
        print("\n".join(_markdown(table)), end="\n\n")
    show(rows, as_json=options.json, versions=versions)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    # By its file: a run in the workspace may have its name.
    parser.add_argument("--model", default=str(BUNDLED), help="instead of the bundled one")
    parser.add_argument("--beside", action="append", default=[], help="another model; repeatable")
    parser.add_argument("--images", type=int, default=50, help="photos of each set")
    parser.add_argument("--only", choices=("scores", "pictures", "blocks"), default="scores")
    parser.add_argument(
        "--out", type=Path, help="folder for scores.csv and by_strength.png, or for the cases"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _sets(photos: Sequence[tuple[str, Image]], root: Path | None) -> dict[str, Iterator[Pair]]:
    sets: dict[str, Iterator[Pair]] = {_TRAINED: blurred(photos, "shake", (3, 18))}
    sets |= {f"shake, {low} to {high} px": blurred(photos, "shake", (low, high)) for low, high in _SHAKES}
    kernels = [found.kernel for found in read_kernels(root / "kernels" / "levin2009")] if root else []
    sets |= {
        name: blurred(photos, kind, sizes, kernels)
        for name, (kind, sizes) in _OTHERS.items()
        if kernels or kind != "measured"
    }
    sets[_SHARP] = (Pair(key=key, scene="", lq=photo, gt=photo) for key, photo in photos)
    if root:
        gopro = sorted((root / "gopro" / "GOPRO_Large" / "train").glob("*/blur/*.png"))
        sets[_GOPRO] = (_of_gopro(file) for file in gopro)
        sets[_SMALL] = (_of_gopro(file, _SMALL_SIZE) for file in gopro)
    return sets


def _of_gopro(blur: Path, size: tuple[int, int] | None = None) -> Pair:
    sharp = blur.parent.parent / "sharp" / blur.name
    images = [read_rgb_u8(file) for file in (blur, sharp)]
    if size is not None:
        images = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in images]  # type: ignore[misc]
    return Pair(key=blur.stem, scene=blur.parts[-3], lq=images[0], gt=images[1])


def _scored(pairs: Iterator[Pair], methods: dict[str, Method]) -> dict[str, Scores]:
    psnr: dict[str, list[float]] = {name: [] for name in methods}
    ssim: dict[str, list[float]] = {name: [] for name in methods}
    for pair in pairs:
        for name, method in methods.items():
            score = score_image(pair.key, "", pair.lq, method(pair.lq), pair.gt)
            psnr[name].append(score.psnr_restored_db)
            ssim[name].append(score.ssim_restored or 0.0)
    return {
        name: Scores(statistics.fmean(psnr[name]), statistics.fmean(ssim[name]), tuple(psnr[name]))
        for name in methods
    }


def _tell_blocks(spec: str, pairs: Sequence[Pair]) -> None:
    """PSNR with one block after the other turned off: its input goes through as it is."""
    restorer = Restorer(spec, RestoreSettings(precision="fp32"))
    network = restorer.network
    assert isinstance(network, NAFNet)

    def psnr_db() -> float:
        return _scored(iter(pairs), {"": restorer})[""].psnr_db

    whole = psnr_db()
    print(f"all blocks: {whole:.3f} dB")
    for number, block in enumerate(network.blocks):
        scales = block.beta.data.clone(), block.gamma.data.clone()
        block.beta.data.zero_()
        block.gamma.data.zero_()
        print(f"without block {number}, of {block.beta.numel()} channels: {psnr_db() - whole:+.3f} dB")
        block.beta.data, block.gamma.data = scales


def _classic(choosing: Sequence[tuple[str, Image]]) -> dict[str, Method]:
    """Unsharp masking, Richardson–Lucy and Wiener, each at its best settings on the photos to choose on."""
    pairs = list(blurred(choosing, "shake", (3, 18)))
    families: dict[str, list[Method]] = {
        "unsharp masking": [
            partial(_unsharp, radius=radius, amount=amount)
            for radius, amount in itertools.product((1.0, 2.0, 3.0), (0.25, 0.5, 1.0))
        ],
        "Richardson–Lucy": [
            partial(_richardson_lucy, sigma=sigma, rounds=rounds)
            for sigma, rounds in itertools.product((0.7, 1.0, 1.5), (2, 5, 10))
        ],
        "Wiener": [
            partial(_wiener, sigma=sigma, balance=balance)
            for sigma, balance in itertools.product((0.7, 1.0, 1.5), (0.03, 0.1, 0.3))
        ],
    }
    chosen = {}
    for name, candidates in families.items():
        scores = [_scored(iter(pairs), {name: method})[name].psnr_db for method in candidates]
        chosen[name] = candidates[int(np.argmax(scores))]
        print(f"{name}: {chosen[name].keywords}", file=sys.stderr)  # type: ignore[attr-defined]
    return chosen


def _as_u8(image: NDArray[np.floating]) -> Image:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _unsharp(image: Image, *, radius: float, amount: float) -> Image:
    return _as_u8(filters.unsharp_mask(image, radius=radius, amount=amount, channel_axis=2))


def _richardson_lucy(image: Image, *, sigma: float, rounds: int) -> Image:
    def of(plane: NDArray[np.floating], kernel: NDArray[np.floating]) -> NDArray[np.floating]:
        return restoration.richardson_lucy(plane, kernel, num_iter=rounds)

    return _by_plane(image, sigma, of)


def _wiener(image: Image, *, sigma: float, balance: float) -> Image:
    def of(plane: NDArray[np.floating], kernel: NDArray[np.floating]) -> NDArray[np.floating]:
        return restoration.wiener(plane, kernel, balance)

    return _by_plane(image, sigma, of)


def _by_plane(image: Image, sigma: float, of: Callable[..., NDArray[np.floating]]) -> Image:
    """Each colour by itself, with a mirrored border that is cut off again: both methods ring at borders."""
    kernel, reach = gaussian_kernel(sigma).astype(np.float64), 16
    padded = cv2.copyMakeBorder(image, reach, reach, reach, reach, cv2.BORDER_REFLECT_101) / 255.0
    planes = [of(padded[..., channel], kernel) for channel in range(3)]
    return _as_u8(np.stack(planes, axis=2)[reach:-reach, reach:-reach])


def _rows(table: dict[str, dict[str, Scores]], restorer: Restorer) -> Rows:
    def gain(name: str, method: str = "mobile-v1") -> float:
        return table[name][method].psnr_db - table[name]["blurred"].psnr_db

    rows: Rows = {}
    rows[f"{_TRAINED}: PSNR over the blurred photo"] = row(gain(_TRAINED), "dB", at_least=1.5)
    rows[f"{_SHARP}: PSNR against themselves"] = row(table[_SHARP]["mobile-v1"].psnr_db, "dB", at_least=40)
    if _GOPRO in table:
        rows[f"{_GOPRO}: PSNR over the blurred photo"] = row(gain(_GOPRO), "dB", at_least=0.7)
        rows[f"{_SMALL}: PSNR over the blurred photo"] = row(gain(_SMALL), "dB", at_least=0)
    for method in table[_TRAINED]:
        if method not in ("blurred", "mobile-v1"):
            rows[f"{_TRAINED}: the same of {method}"] = row(gain(_TRAINED, method), "dB")
    rows["1280×720 on this machine, as `nafnet restore` runs it"] = row(_seconds(restorer), "s", at_most=2.0)
    return rows


def _seconds(restorer: Restorer) -> float:
    # A photo: noise looks broken when it comes out, and is done again.
    image = cv2.resize(data.astronaut(), _SPEED_SIZE, interpolation=cv2.INTER_CUBIC)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        restorer(image)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _draw_cases(restorer: Restorer, folder: Path) -> None:
    """Shipped photos with three kinds of blur: lowest gain, middle and highest; and two photos, shaken."""
    cases = {}
    for kind in _CASES:
        for pair in blurred(shipped(), kind, _CASE_SIZES_PX):
            restored = restorer(pair.lq)
            score = score_image(pair.key, kind, pair.lq, restored, pair.gt)
            cases[pair.key, kind] = (score, pair, restored)
    ordered = sorted(cases.values(), key=lambda case: case[0].gain_db)
    for score, *_ in ordered:
        print(f"{score.key:10} {score.scene:8} {score.gain_db:+.2f} dB")
    chosen = {"worst": ordered[0], "middle": ordered[len(ordered) // 2], "best": ordered[-1]}
    chosen |= {name: cases[name, "shake"] for name in _FRONT_PAGE}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (score, pair, restored) in chosen.items():
        before_after(folder / f"{name}.jpg", scored_panels(score, pair, restored), max_width_px=400)


def _markdown(table: dict[str, dict[str, Scores]]) -> list[str]:
    methods = list(table[_TRAINED])
    lines = ["| PSNR, dB (SSIM) | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for name, scores in table.items():
        cells = [
            f"{scores[method].psnr_db:.2f} ({scores[method].ssim:.3f})" if method in scores else ""
            for method in methods
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _write(folder: Path, table: dict[str, dict[str, Scores]]) -> None:
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "method", "images", "psnr_db", "ssim"])
        for name, scores in table.items():
            for method, score in scores.items():
                number = len(score.each_psnr_db)
                writer.writerow([name, method, number, f"{score.psnr_db:.4f}", f"{score.ssim:.5f}"])
    (folder / "scores.md").write_text("\n".join(_markdown(table)) + "\n")
    _draw(folder / "by_strength.png", table)


def _draw(path: Path, table: dict[str, dict[str, Scores]]) -> None:
    """Gain over the blurred photo by the extent of a shake."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    names = [f"shake, {low} to {high} px" for low, high in _SHAKES]
    middles = [(low + high) / 2 for low, high in _SHAKES]
    for method in table[names[0]]:
        gains = [table[name][method].psnr_db - table[name]["blurred"].psnr_db for name in names]
        is_ours = method == "mobile-v1"
        axes.plot(middles, gains, marker="o", label=method, linewidth=2.5 if is_ours else 1.2)
    axes.set_xlabel("extent of the shake, px")
    axes.set_ylabel("PSNR over the blurred photo, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
