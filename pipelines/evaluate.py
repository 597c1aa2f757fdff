"""Score a model on pairs that it was not trained on.

    nafnet evaluate runs/mine stores/test
    nafnet evaluate models:/nafnet-deblur@champion blurred/ sharp/

The protocol is pinned and written into the report: whole images, one at a time, fp32, local statistics on.
Reports are kept in the workspace under the digests of weights and data, where promotion finds them. Each says
whether local statistics were on; `--train-patch 0` makes the other one, to compare.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from nafnet_core.tiling import restore_image
from pipelines.files import make_folder, write_json
from pipelines.models import LoadedModel
from pipelines.pictures import before_after, scored_panels
from pipelines.scoring import ImageScore, Protocol, score_image
from pipelines.shards import Pair
from pipelines.sources import PairRef, find_source, place, two_sides
from pipelines.store import PairStore, digest_of, is_store, refuse_sharp_only
from pipelines.urls import local_path, public
from pipelines.workspace import Workspace

SCHEMA_VERSION = 1
_MAKE_PAIRS = "Make pairs of the photos with `nafnet synth`, and prepare these with --crop 0 --split test"


class Report(BaseModel):
    """Scores of one model on one data set. Means are over images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    model: str
    weights_digest: str
    train_patch_px: int | None = None
    """Sets the window of local statistics; None where they were off."""
    data: str
    """Path of the store or folders, as a hint to people; the digest is what counts."""
    data_digest: str
    protocol: Protocol
    num_images: int
    psnr_blurred_db: float
    psnr_restored_db: float
    ssim_blurred: float | None
    ssim_restored: float | None
    latency_s: float
    """Median seconds an image, the network and its conversions, without reading."""
    peak_memory_mib: float
    """Largest resident size of the process, its start-up included."""
    images: tuple[dict[str, Any], ...]

    @property
    def gain_db(self) -> float:
        """PSNR over that of the blurred input."""
        return self.psnr_restored_db - self.psnr_blurred_db


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """A report and where it lies."""

    report: Report
    path: Path
    picture: Path


class Pairs:
    """Pairs to score: a PairStore, a folder of pairs, or two folders."""

    def __init__(self, first: Path | str, second: Path | str | None = None) -> None:
        """Open `first` as a store or a folder of pairs, or `first` and `second` as blurred and sharp folders.

        Raises:
            InputError: no store and no pairs, a store of sharp photos alone, or folders that do not match.
        """
        first = local_path(first)
        self.label = public(first) if second is None else f"{public(first)} and {public(second)}"
        self._store: PairStore | None = None
        self._refs: list[PairRef] = []
        if second is not None:
            self._refs = two_sides(place(first), place(second)).pairs()
        elif is_store(first) or not place(first).is_dir():
            self._store = PairStore(first)
            refuse_sharp_only(first, self._store.manifest, fix=_MAKE_PAIRS)
        else:
            self._refs = find_source(place(first), split="test").pairs()

    def __len__(self) -> int:
        return len(self._refs) if self._store is None else len(self._store)

    def __iter__(self) -> Iterator[Pair]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> Pair:
        if self._store is not None:
            return self._store.pair(index)
        ref = self._refs[index]
        lq, gt = ref.read()
        return Pair(key=ref.key, scene=ref.scene, lq=lq, gt=gt)

    @property
    def digest(self) -> str | None:
        """Known beforehand of a store only; of folders it comes with reading them."""
        return None if self._store is None else self._store.digest


def run(
    loaded: LoadedModel,
    pairs: Pairs,
    workspace: Workspace,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluateResult:
    """Score every pair, and keep report and picture in the workspace.

    The picture shows the image of the median gain, which is a rule and not a choice.

    Raises:
        InputError: an image is unreadable, or the workspace cannot be written.
    """
    scores: list[ImageScore] = []
    seconds: list[float] = []
    digests = bytearray()
    for index, pair in enumerate(pairs):
        start = time.perf_counter()
        restored = restore_image(loaded.model, pair.lq, train_patch_px=loaded.train_patch_px, tile_px=None)
        seconds.append(time.perf_counter() - start)
        assert restored.dtype == np.uint8
        scores.append(score_image(pair.key, pair.scene, pair.lq, restored, pair.gt))
        if pairs.digest is None:
            digests += pair.digest()
        on_progress(index + 1, len(pairs))
    report = Report(
        model=loaded.label,
        weights_digest=loaded.digest,
        train_patch_px=loaded.train_patch_px,
        data=pairs.label,
        data_digest=pairs.digest or digest_of(digests),
        protocol=_protocol(loaded),
        num_images=len(scores),
        psnr_blurred_db=statistics.fmean(score.psnr_blurred_db for score in scores),
        psnr_restored_db=statistics.fmean(score.psnr_restored_db for score in scores),
        ssim_blurred=_mean([score.ssim_blurred for score in scores]),
        ssim_restored=_mean([score.ssim_restored for score in scores]),
        latency_s=statistics.median(seconds),
        peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        images=tuple(score.to_dict() for score in scores),
    )
    path = report_path(workspace, loaded, report.data_digest)
    make_folder(path.parent)
    write_json(path, report.model_dump())
    return EvaluateResult(report=report, path=path, picture=_draw(loaded, pairs, scores, path))


def report_path(workspace: Workspace, loaded: LoadedModel, data_digest: str) -> Path:
    """Where the report of this model on this data is kept; with and without local statistics are two."""
    statistics = "global" if loaded.train_patch_px is None else f"patch{loaded.train_patch_px}"
    return workspace.reports / f"{loaded.digest[:16]}-{data_digest[:16]}-{statistics}.json"


def find_report(workspace: Workspace, loaded: LoadedModel, data_digest: str) -> Report | None:
    """The report of exactly this model, data and schema by today's protocol, if it was made before."""
    path = report_path(workspace, loaded, data_digest)
    if not path.is_file():
        return None
    return read_report(path, loaded, data_digest)


def read_report(path: Path, loaded: LoadedModel, data_digest: str) -> Report | None:
    """The report in a file, if it is of exactly this model, data and schema by today's protocol."""
    content = json.loads(path.read_text())
    if content.get("schema_version") != SCHEMA_VERSION:
        return None
    report = Report.model_validate(content)
    found = (report.weights_digest, report.data_digest, report.train_patch_px, report.protocol)
    wanted = (loaded.digest, data_digest, loaded.train_patch_px, _protocol(loaded))
    return report if found == wanted else None


def _protocol(loaded: LoadedModel) -> Protocol:
    return Protocol(local_statistics=loaded.train_patch_px is not None)


def _draw(loaded: LoadedModel, pairs: Pairs, scores: list[ImageScore], path: Path) -> Path:
    order = sorted(range(len(scores)), key=lambda i: scores[i].psnr_restored_db - scores[i].psnr_blurred_db)
    index = order[len(order) // 2]
    score, pair = scores[index], pairs[index]
    restored = restore_image(loaded.model, pair.lq, train_patch_px=loaded.train_patch_px, tile_px=None)
    assert restored.dtype == np.uint8
    return before_after(path.with_suffix(".png"), scored_panels(score, pair, restored))  # type: ignore[arg-type]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
