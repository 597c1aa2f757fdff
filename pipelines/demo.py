"""The whole main job in minutes, on photos that scikit-image and scikit-learn ship.

    nafnet demo
    nafnet demo --minutes 1        # a glance: less training, a smaller gain

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
from nafnet_core import CapabilityError
from pipelines import evaluate, prepare, registry, restore, synth, train
from pipelines.config import load_config
from pipelines.gate import GateSettings
from pipelines.models import CHAMPION, open_model
from pipelines.sources import find_source
from pipelines.tracking import Row, tracking_uri
from pipelines.workspace import Workspace

# `motorcycle_left` and `_right` are one scene: one of them is enough, and none may stand on both sides.
_TRAIN_PHOTOS = {
    "skimage": ("data/chelsea.png", "data/coffee.png", "data/rocket.jpg", "data/motorcycle_left.png"),
    "sklearn": ("datasets/images/flower.jpg",),
}
_TEST_PHOTOS = {"skimage": ("data/astronaut.png",), "sklearn": ("datasets/images/china.jpg",)}
_TRAIN_VARIANTS, _TEST_VARIANTS = 24, 4
_SEED = 7

Show = Callable[[str], AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured, and where its pictures are."""

    report: evaluate.Report
    train: train.TrainResult
    champion_version: int
    pictures: tuple[Path, ...]
    minutes: float
    tracking_uri: str

    def to_dict(self) -> dict[str, Any]:
        """The figures for `--json`."""
        return {
            "psnr_blurred_db": self.report.psnr_blurred_db,
            "psnr_restored_db": self.report.psnr_restored_db,
            "ssim_blurred": self.report.ssim_blurred,
            "ssim_restored": self.report.ssim_restored,
            "num_workers": self.train.num_workers,
            "samples_per_s": self.train.samples_per_s,
            "champion_version": self.champion_version,
            "pictures": [str(picture) for picture in self.pictures],
            "minutes": self.minutes,
        }


def run(
    workspace: Workspace,
    *,
    recipe: str = "demo",
    minutes: float | None = None,
    show: Show,
    on_row: Callable[[Row], None] = lambda row: None,
) -> DemoResult:
    """Do the whole main job in the workspace.

    Args:
        workspace: everything goes below it.
        recipe: the training recipe.
        minutes: training time, instead of the recipe's.
        show: makes a progress display from a label.
        on_row: called with each row of the training's journal.

    Raises:
        CapabilityError: the photos are not installed.
        GateError: the trained model is no better than its blurred input.
    """
    begin = time.monotonic()
    sides = {"train": _photos(_TRAIN_PHOTOS), "test": _photos(_TEST_PHOTOS)}
    folder = workspace.make().root / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    stores = {split: _make_store(split, photos, folder, show) for split, photos in sides.items()}
    name = _fresh_name(workspace)
    overrides = [f"name={name}", *([f"budget.minutes={minutes}"] if minutes else [])]
    config = load_config(recipe, overrides)
    data = config.data.model_copy(update={"train": ({"path": stores["train"]},), "val": stores["test"]})
    config = type(config).model_validate({**config.model_dump(), "data": data.model_dump()})
    with connect():
        trained = train.run(config, workspace, on_row=on_row)
    with show("evaluate") as progress:
        loaded = open_model(str(trained.run_dir), workspace)
        scored = evaluate.run(loaded, evaluate.Pairs(stores["test"]), workspace, on_progress=progress)
    version = registry.register(str(trained.run_dir), workspace, on=stores["test"])
    registry.promote(
        workspace,
        version=version.version,
        on=stores["test"],
        settings=GateSettings(),
        reason="nafnet demo",
    )
    test_photo = folder / "pairs" / "test" / "blur" / "astronaut" / "0.png"
    restored = restore.run(str(test_photo), open_model(CHAMPION, workspace), folder / "restored")
    return DemoResult(
        report=scored.report,
        train=trained,
        champion_version=version.version,
        pictures=(scored.picture, *trained.pictures, Path(restored.files[0].output or "")),
        minutes=(time.monotonic() - begin) / 60,
        tracking_uri=tracking_uri(workspace),
    )


def _make_store(split: str, photos: list[Path], folder: Path, show: Show) -> Path:
    is_test = split == "test"
    pairs, store = folder / "pairs" / split, folder / "stores" / split
    with show(f"synth {split}") as progress:
        synth.run(
            synth.SynthConfig(
                sharp=photos,
                out=pairs,
                seed=_SEED + is_test,
                variants=_TEST_VARIANTS if is_test else _TRAIN_VARIANTS,
            ),
            on_progress=progress,
        )
    source = find_source(pairs, split=split)
    config = prepare.PrepareConfig(
        out=store,
        split=split,
        crop_px=None if is_test else 192,
        stride_px=128,
        # Raw crops cost disk and no decoding: right for a store as small as this.
        format="parquet" if is_test else "lmdb",
        codec="png" if is_test else "raw",
        pairs_per_shard=1024,
    )
    with show(f"prepare {split}") as progress:
        prepare.run(source, source.pairs(), config, on_progress=progress)
    return store


def _photos(wanted: dict[str, tuple[str, ...]]) -> list[Path]:
    found = []
    for package, files in wanted.items():
        # Found without importing: scikit-learn takes a second that nobody needs.
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise CapabilityError(
                "the demo's photos are not installed",
                expected=package,
                fix="pip install 'nafnet-ray[demo]'",
            )
        found += [Path(spec.submodule_search_locations[0]) / file for file in files]
    return found


def _fresh_name(workspace: Workspace) -> str:
    """`demo`, or the next number: each demo is a run of its own."""
    taken = {path.name for path in workspace.runs.glob("demo*")}
    number = 1
    while (name := "demo" if number == 1 else f"demo-{number}") in taken:
        number += 1
    return name
