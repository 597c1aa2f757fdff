"""The whole main job in minutes, on photos that scikit-image and scikit-learn ship.

    nafnet demo
    nafnet demo --minutes 1        # a glance: less training, a smaller gain
    nafnet demo --pretrained       # no training: the model that comes with this package

synth → prepare → train (two DDP workers) → evaluate → register → promote → restore. Every step is the
ordinary command's code on an ordinary folder; nothing here is special but the choice of photos.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.connect import connect
from nafnet_core import CapabilityError, GateError
from pipelines import evaluate, prepare, registry, restore, synth, train
from pipelines.config import load_config, with_stores
from pipelines.gate import GateSettings
from pipelines.models import BUNDLED_NAME, CHAMPION, open_model
from pipelines.sources import find_source
from pipelines.tracking import Row, tracking_uri
from pipelines.workspace import Workspace

# Split by photo. `motorcycle_left` and `_right` are one scene: one of them is enough. The best checkpoint is
# chosen on `val`, so that `test` has no part in the model at all.
_PHOTOS = {
    "train": (
        "skimage/data/chelsea.png",
        "skimage/data/coffee.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/brick.png",
        "skimage/data/grass.png",
        "skimage/data/gravel.png",
        "sklearn/datasets/images/flower.jpg",
    ),
    "val": ("skimage/data/rocket.jpg",),
    "test": ("skimage/data/astronaut.png", "sklearn/datasets/images/china.jpg"),
}
_VARIANTS = {"train": 20, "val": 4, "test": 4}
_SEEDS = {"train": 7, "val": 8, "test": 9}

Show = Callable[[str], AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured, and where its pictures are."""

    report: evaluate.Report
    train: train.TrainResult | None
    """None where nothing was trained."""
    champion_version: int
    refusal: str | None
    """Why the champion of an earlier demo stayed; None where the new model took its place."""
    pictures: tuple[Path, ...]
    minutes: float
    tracking_uri: str

    def to_dict(self) -> dict[str, Any]:
        """The figures for `--json`."""
        trained = (
            {}
            if self.train is None
            else {
                "num_workers": self.train.summary.num_workers,
                "samples_per_s": self.train.summary.samples_per_s,
            }
        )
        return {
            "psnr_blurred_db": self.report.psnr_blurred_db,
            "psnr_restored_db": self.report.psnr_restored_db,
            "ssim_blurred": self.report.ssim_blurred,
            "ssim_restored": self.report.ssim_restored,
            **trained,
            "champion_version": self.champion_version,
            "pictures": [str(picture) for picture in self.pictures],
            "minutes": self.minutes,
        }


def run(
    workspace: Workspace,
    *,
    recipe: str = "demo",
    minutes: float | None = None,
    pretrained: bool = False,
    show: Show,
    on_row: Callable[[Row], None] = lambda row: None,
) -> DemoResult:
    """Do the whole main job in the workspace.

    Args:
        workspace: everything goes below it.
        recipe: the training recipe.
        minutes: training time, instead of the recipe's.
        pretrained: take the bundled model instead of training one.
        show: makes a progress display from a label.
        on_row: called with each row of the training's journal.

    Raises:
        CapabilityError: the photos are not installed.
        GateError: the first trained model is no better than its blurred input.
    """
    begin = time.monotonic()
    photos = {split: [_photo(file) for file in files] for split, files in _PHOTOS.items()}
    folder = workspace.make().root / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    splits = ["test"] if pretrained else list(photos)
    stores = {split: _make_store(split, photos[split], folder, show) for split in splits}
    trained = None
    if not pretrained:
        overrides = [f"budget.minutes={minutes}"] if minutes else []
        config_of_run = load_config(recipe, overrides, name=_fresh_name(workspace))
        with connect():
            trained = train.run(
                with_stores(config_of_run, [stores["train"]], stores["val"]), workspace, on_row=on_row
            )
    spec = BUNDLED_NAME if trained is None else str(trained.run_dir)
    with show("evaluate") as progress:
        loaded = open_model(spec, workspace)
        scored = evaluate.run(loaded, evaluate.Pairs(stores["test"]), workspace, on_progress=progress)
    version = registry.register(spec, workspace, on=stores["test"])
    champion_version, refusal = _promote(workspace, version.version, stores["test"])
    with show("restore") as progress:
        blurred = folder / "pairs" / "test" / "blur"
        champion = open_model(CHAMPION, workspace)
        config = restore.RestoreConfig(inputs=[str(blurred)], out=str(folder / "restored"))
        restored = restore.run(config, champion, on_progress=progress)
    return DemoResult(
        report=scored.report,
        train=trained,
        champion_version=champion_version,
        refusal=refusal,
        pictures=(
            scored.picture,
            *(trained.pictures if trained else ()),
            folder / "restored" / restored.files[0].output,
        ),
        minutes=(time.monotonic() - begin) / 60,
        tracking_uri=tracking_uri(workspace),
    )


def _promote(workspace: Workspace, version: int, test: Path) -> tuple[int, str | None]:
    """Send a version to the gate. A second demo is hardly better than the first: then that one stays."""
    try:
        # Two of its eight images: some are hardly blurred, and minutes of training can make these worse.
        settings = GateSettings(max_regressed_share=0.25)
        registry.promote(workspace, version=version, on=test, settings=settings, reason="nafnet demo")
    except GateError as error:
        champion = registry.champion(workspace)
        if champion is None:
            raise
        return champion, str(error)
    return version, None


def _make_store(split: str, photos: list[Path], folder: Path, show: Show) -> Path:
    is_train = split == "train"
    pairs, store = folder / "pairs" / split, folder / "stores" / split
    with show(f"synth {split}") as progress:
        synth.run(
            synth.SynthConfig(
                sharp=photos,
                out=pairs,
                seed=_SEEDS[split],
                variants=_VARIANTS[split],
            ),
            on_progress=progress,
        )
    source = find_source(pairs, split=split)
    config = prepare.PrepareConfig(
        out=store,
        split=split,
        crop_px=192 if is_train else None,
        stride_px=128,
        # Raw crops cost disk and no decoding: right for a store as small as this.
        format="lmdb" if is_train else "parquet",
        codec="raw" if is_train else "png",
        pairs_per_shard=1024,
    )
    with show(f"prepare {split}") as progress:
        prepare.run(source, source.pairs(), config, on_progress=progress)
    return store


def _photo(file: str) -> Path:
    """Path of a photo that a package ships; found without importing it, which would take seconds."""
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CapabilityError(
            "the demo's photos are not installed", expected=package, fix="pip install 'nafnet-ray[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / rest


def _fresh_name(workspace: Workspace) -> str:
    """`demo`, or the next number: each demo is a run of its own."""
    taken = {path.name for path in workspace.runs.glob("demo*")}
    number = 1
    while (name := "demo" if number == 1 else f"demo-{number}") in taken:
        number += 1
    return name
