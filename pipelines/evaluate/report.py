"""The report of one model on one data set: its fields, and where it is kept."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nafnet_core import InputError
from pipelines.evaluate.summary import BLUR_RULE, Distribution, Group
from pipelines.models import LoadedModel
from pipelines.scoring import ImageScore, Protocol
from pipelines.workspace import Workspace

SCHEMA_VERSION = 2
REPORT = "report.json"
PICTURE = "before_after.png"


class Report(BaseModel):
    """Scores of one model on one data set. Means are over images."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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
    sharpness_blurred: float | None = None
    """Without reference, 0 to 1: one minus the blur metric of Crete et al. 2007, on 8-bit luma. Noise and
    ringing count as sharp: of two models, the sharper one may be the worse."""
    sharpness_restored: float | None = None
    sharpness_truth: float | None = None
    perceptual_blurred: float | None = None
    """Distance of features to the truth's, 0 where equal: LPIPS-like, and not LPIPS. None: not asked for."""
    perceptual_restored: float | None = None
    perceptual_network: str | None = None
    """The network of these features, with the digest of its weights."""
    latency_s: float
    """Median seconds an image, the network and its conversions, on one thread, without reading."""
    peak_memory_mib: float
    """Largest resident size of a process that ran the network, its start-up included."""
    num_workers: int | None = None
    """Processes that scored at once, and so shared caches and memory while they were timed; None: one alone,
    the command's own."""
    distributions: dict[str, Distribution] = {}
    """Of PSNR and SSIM restored, and of the gain."""
    by_scene: tuple[Group, ...] = ()
    by_blur: tuple[Group, ...] = ()
    """The weakest blurs first."""
    blur_rule: str = BLUR_RULE
    """How images came into `by_blur`."""
    images: tuple[ImageScore, ...]

    @property
    def gain_db(self) -> float:
        """PSNR over that of the blurred input."""
        return self.psnr_restored_db - self.psnr_blurred_db


def report_path(workspace: Workspace, loaded: LoadedModel, data_digest: str) -> Path:
    """Where the report of this model on this data is kept; with and without local statistics are two.

    Its folder holds the pages, the table and the pictures as well.
    """
    statistics = "global" if loaded.train_patch_px is None else f"patch{loaded.train_patch_px}"
    return workspace.reports / f"{loaded.digest[:16]}-{data_digest[:16]}-{statistics}" / REPORT


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
    wanted = (loaded.digest, data_digest, loaded.train_patch_px, protocol_of(loaded))
    return report if found == wanted else None


def protocol_of(loaded: LoadedModel) -> Protocol:
    """Today's protocol for this model."""
    return Protocol(
        backend=loaded.backend,
        precision=loaded.fixed_precision or "fp32",
        local_statistics=loaded.train_patch_px is not None,
    )


def comparable(first: Report, second: Report) -> None:
    """Refuse two reports of different data or protocols. Raises `InputError`, which names the difference."""
    if first.data_digest != second.data_digest:
        raise InputError(
            "the two reports are of different data",
            expected=f"digest {first.data_digest[:12]}",
            got=f"digest {second.data_digest[:12]}",
            fix="Evaluate both on the same store",
        )
    difference = first.protocol.difference(second.protocol)
    if difference:
        raise InputError("the two reports follow different protocols", got=difference)
