"""What each way to run a model costs and gives: back end × precision × pruning, as one table and a picture.

    NAFNET_DATA=~/data python benchmarks/deploy.py --work work --build    # stores and exports, beforehand
    NAFNET_DATA=~/data python benchmarks/deploy.py --work work --out docs/deploy     # on a machine at rest
    python benchmarks/deploy.py --images 2 --runs 1 --only mobile-v1                 # a try

`mobile-v1`, whole, pruned and in int8, is scored on the last 50 photos of `bsds500/val` under shakes of 3 to
18 px; on the first 50 channels are judged and int8 is calibrated, and the exports' gate looks at them.
Without NAFNET_DATA: photos that scikit-image ships. `width32` has random weights, so that only its size, time
and memory tell; each of its graphs takes minutes to build, so there is one a runtime. It is held against what
users otherwise run, an eager NCHW network in fp32 with the same weights. All by the code of
`nafnet compress report`, with threads that wait as they do in every command.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines.openmp import spin_briefly

spin_briefly()  # as commands do, before torch is there

import torch  # noqa: E402

from benchmarks import _peers as peers  # noqa: E402
from benchmarks._photos import Image, blurred, photos_of  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from nafnet_core import PRESETS, GateError, NAFNet, load_model, randomize_residual_scales, save_model  # noqa: E402
from nafnet_core.foreign import ForeignNetwork  # noqa: E402
from pipelines import compress, export, prepare  # noqa: E402
from pipelines.compress.measuring import SIZES_PX, latencies, speedups  # noqa: E402
from pipelines.compress.table import Row  # noqa: E402
from pipelines.models import BUNDLED_NAME, open_model  # noqa: E402
from pipelines.png import encode_png  # noqa: E402
from pipelines.scoring.pairs import Pairs  # noqa: E402
from pipelines.sources import find_source  # noqa: E402
from pipelines.workspace import Workspace  # noqa: E402

_SHAKES_PX = (3, 18)
_MACS_LEFT = 0.65
_PATCH_PX = 256
_NOT_QUANTISED = ("fp32", "fp16", "bf16")
_WIDTH32_FLOOR = 2.6
_WIDTH32_PRECISIONS = {"onnx": "fp32", "openvino": "bf16"}
_LEAST_GAIN_DB = 1.0
_ORIGINAL = "width32, the original network"


def main() -> None:
    options = _arguments()
    wanted = [name for name in (BUNDLED_NAME, "width32") if options.only in (None, name)]
    with _work_folder(options.work) as work:
        root = os.environ.get("NAFNET_DATA")
        choosing, photos = photos_of(Path(root) if root else None)
        judged_by = _store(work, "choosing", choosing)
        test = _store(work, f"shakes-{options.images}", photos[-options.images :])
        specs = {name: _build(name, work, judged_by) for name in wanted}
        for weights in options.also:
            specs[BUNDLED_NAME] += [str(weights), *_exports(str(weights), weights.stem, work, judged_by)]
        if options.build:
            return
        tables, rows = [], {}
        for name in wanted:
            print(f"measuring {name}", file=sys.stderr)
            contenders = compress.find_contenders(specs[name], Workspace(work / "workspace"))
            if name == "width32":
                contenders.insert(0, _original(Path(specs[name][0])))
            pairs = Pairs(test) if name == BUNDLED_NAME else None
            table = compress.measure(contenders, pairs, runs=options.runs)
            tables.append(table)
            rows |= _rows_of(name, table)
            if name == "width32":
                rows |= _row_alone(contenders, table, runs=options.runs)
        files = compress.write(options.out or work / "report", tables)
        if not options.json:
            print(files[0].read_text())
    versions = {name: version(name) for name in ("torch", "onnxruntime", "openvino") if find_spec(name)}
    machine = f"{tables[0].threads} threads"
    show(rows, as_json=options.json, versions=versions, machine=machine)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for report.md, report.csv and report.png")
    parser.add_argument(
        "--work", type=Path, help="folder for stores and exports, kept; what is there is taken"
    )
    parser.add_argument("--build", action="store_true", help="only make what is to be measured; needs --work")
    parser.add_argument("--only", choices=(BUNDLED_NAME, "width32"))
    parser.add_argument(
        "--also", type=Path, action="append", default=[], metavar="WEIGHTS",
        help="a file of yours, held against mobile-v1; as often as you like",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=50, help="photos to score on")
    parser.add_argument("--runs", type=int, default=15, help="rounds of timing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.also and options.only == "width32":
        parser.error("--also is held against mobile-v1")
    return options


@contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _store(work: Path, name: str, photos: Sequence[tuple[str, Image]]) -> str:
    """A store of photos, whole, each under a shake of its own; one that is there is kept."""
    store, pairs = work / "stores" / name, work / "pairs" / name
    if (store / prepare.MANIFEST).is_file():
        return str(store)
    for pair in blurred(photos, "shake", _SHAKES_PX):
        for side, image in (("blur", pair.lq), ("sharp", pair.gt)):
            (pairs / side).mkdir(parents=True, exist_ok=True)
            (pairs / side / f"{pair.key}.png").write_bytes(encode_png(image))
    source = find_source(pairs, split="test")
    prepare.run(source, source.pairs(), prepare.PrepareConfig(out=store, crop_px=None, use_ray=False))
    return str(store)


def _build(name: str, work: Path, store: str) -> list[str]:
    """Everything of one network that is compared, as `find_contenders` takes it; what is there is kept."""
    if name == BUNDLED_NAME:
        pruned = work / f"{name}-pruned.safetensors"
        if not pruned.is_file():
            config = compress.PruneConfig(out=pruned, macs=_MACS_LEFT, on=store)
            compress.run_prune(config, open_model(name, Workspace(work)))
        rounded = work / f"{name}-int8.safetensors"
        if not rounded.is_file():
            config = compress.QuantizeConfig(out=rounded, on=store)
            compress.run_quantize(config, open_model(name, Workspace(work)))
        return [
            name, *_exports(name, name, work, store),
            str(pruned), *_exports(str(pruned), pruned.stem, work, store),
            *_exports(str(rounded), name, work, store),
        ]  # fmt: skip
    weights = work / f"{name}.safetensors"
    if not weights.is_file():
        torch.manual_seed(0)
        network = NAFNet(PRESETS[name])
        # A fresh network is the identity; with these scales it changes photos as a trained one does.
        randomize_residual_scales(network, seed=0, scale=0.1)
        save_model(network, weights, metadata={"train_patch_px": _PATCH_PX})
    return [str(weights), *_exports(str(weights), name, work, store, only=_WIDTH32_PRECISIONS)]


def _exports(
    spec: str, stem: str, work: Path, store: str, *, only: Mapping[str, str] | None = None
) -> list[str]:
    """Files for each runtime that is installed, in each precision, or the `only` one, that holds."""
    files = []
    loaded = open_model(spec, Workspace(work))
    for form in export.FORMATS.values():
        if form.runtime is None or not all(map(find_spec, (*form.to_write, *form.to_run))):
            continue
        is_int8 = bool(loaded.model.config.int8_layers)
        for precision in form.precisions:
            if (precision == "int8") != is_int8 or (only and only[form.name] != precision):
                continue
            out = work / f"{stem}-{precision}{form.suffix}"
            if not out.is_file():
                print(f"exporting {out.name}", file=sys.stderr)
                try:
                    config = export.ExportConfig(to=form.name, out=out, precision=precision, on=store)
                    export.run(config, loaded)
                except GateError as error:
                    print(f"left out: {error}", file=sys.stderr)
                    continue
            files.append(str(out))
    return files


def _original(weights: Path) -> compress.Contender:
    """The network that users otherwise run, with the same weights."""
    (ours,) = compress.find_contenders([str(weights)], Workspace(weights.parent), precisions=("fp32",))
    lq = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (ours.opener(1)(lq) - _open_original(weights, 1)(lq)).abs().max()
    assert difference < 1e-3, f"the two networks differ by {difference}"
    return compress.Contender(
        name=_ORIGINAL,
        backend="eager NCHW torch",
        precision="fp32",
        config=ours.config,
        files=ours.files,
        train_patch_px=ours.train_patch_px,
        opener=partial(_open_original, weights),
    )


def _open_original(weights: Path, num_threads: int) -> ForeignNetwork:
    ours, metadata = load_model(weights)
    network = peers.load_weights(peers.plain(ours.config), ours).eval()
    peers.localize(network, metadata["train_patch_px"])
    return ForeignNetwork(ours.config, lambda images: network(torch.from_numpy(images)).numpy())


def _rows_of(name: str, table: compress.DeployTable) -> Rows:
    """The figures that something is asked of, and the fastest way beside them."""
    fastest = _fastest(table)
    at_frame = max(_not_quantised(table), key=lambda each: each.speedup_720p)
    floor = _WIDTH32_FLOOR if name == "width32" else None
    reference = table.reference.label
    rows = {
        f"256×256, {fastest.label} against {reference}": row(fastest.speedup_256, "×", at_least=floor),
        f"1280×720, {at_frame.label} against {reference}": row(at_frame.speedup_720p, "×"),
    }
    if table.gain_db is not None:
        gain = row(table.gain_db, "dB", at_least=_LEAST_GAIN_DB)
        rows[f"{name}: PSNR over the blurred photos, by which losses are measured"] = gain
    return rows


def _row_alone(contenders: Sequence[compress.Contender], table: compress.DeployTable, *, runs: int) -> Rows:
    """The fastest and the original network in turns, in a fresh process, where nothing else was open."""
    label = _fastest(table).label
    pair = [contenders[0], next(each for each in contenders if each.label == label)]
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        _, ratio = speedups(pool.submit(latencies, pair, SIZES_PX[0], runs=5 * runs).result())
    return {f"256×256, {label}, the two alone": row(ratio, "×", at_least=_WIDTH32_FLOOR)}


def _fastest(table: compress.DeployTable) -> Row:
    return max(_not_quantised(table), key=lambda each: each.speedup_256)


def _not_quantised(table: compress.DeployTable) -> list[Row]:
    return [each for each in table.rows[1:] if each.precision in _NOT_QUANTISED]


if __name__ == "__main__":
    main()
