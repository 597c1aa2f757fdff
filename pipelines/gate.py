"""The gate in front of promotion: a candidate against the champion, on the same data by the same protocol."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nafnet_core import InputError
from nafnet_core.tiling import restore_image
from pipelines.evaluate import Pairs, Report
from pipelines.models import LoadedModel

_TIMED_IMAGES, _ROUNDS = 3, 3


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What a candidate must reach. Without a champion it is held against the blurred input."""

    min_gain_db: float = 0.05
    """PSNR over the champion's, at least. Below about 0.05 dB a difference is chance on a hundred images."""
    max_ssim_drop: float = 0.002
    max_latency_ratio: float = 1.2
    """Candidate's time over the champion's, both measured at promotion in turns."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the gate's table."""

    name: str
    champion: float | None
    candidate: float
    limit: str
    passed: bool

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def judge(
    candidate: Report,
    champion: Report | None,
    settings: GateSettings,
    *,
    latency_ratio: float | None,
) -> list[Check]:
    """Compare two reports, or a report with its own blurred input where there is no champion.

    Args:
        candidate, champion: reports on the same data by the same protocol.
        settings: the limits.
        latency_ratio: candidate over champion, interleaved on this machine; None without a champion.

    Raises:
        InputError: data or protocol differ; the difference is named.
    """
    if champion is not None:
        _comparable(candidate, champion)
    base_psnr = champion.psnr_restored_db if champion else candidate.psnr_blurred_db
    base_ssim = champion.ssim_restored if champion else candidate.ssim_blurred
    gain = candidate.psnr_restored_db - base_psnr
    checks = [
        Check(
            name="PSNR, dB",
            champion=base_psnr,
            candidate=candidate.psnr_restored_db,
            limit=f"gain ≥ {settings.min_gain_db:g}",
            passed=gain >= settings.min_gain_db,
        )
    ]
    if base_ssim is not None and candidate.ssim_restored is not None:
        checks.append(
            Check(
                name="SSIM",
                champion=base_ssim,
                candidate=candidate.ssim_restored,
                limit=f"drop ≤ {settings.max_ssim_drop:g}",
                passed=base_ssim - candidate.ssim_restored <= settings.max_ssim_drop,
            )
        )
    if latency_ratio is not None:
        checks.append(
            Check(
                name="time, ×",
                champion=1.0,
                candidate=latency_ratio,
                limit=f"≤ {settings.max_latency_ratio:g}",
                passed=latency_ratio <= settings.max_latency_ratio,
            )
        )
    return checks


def latency_ratio(candidate: LoadedModel, champion: LoadedModel, pairs: Pairs) -> float:
    """Median over images of candidate's over champion's seconds, the two taking turns on this machine."""
    ratios = []
    for index in range(min(_TIMED_IMAGES, len(pairs))):
        image = pairs[index].lq
        times: list[list[float]] = [[], []]
        for _ in range(_ROUNDS):
            for side, loaded in zip(times, (candidate, champion), strict=True):
                start = time.perf_counter()
                restore_image(loaded.model, image, train_patch_px=loaded.train_patch_px)
                side.append(time.perf_counter() - start)
        ratios.append(statistics.median(times[0]) / statistics.median(times[1]))
    return statistics.median(ratios)


def failed(checks: Sequence[Check]) -> list[str]:
    """Names of the checks that did not pass, each with its numbers."""
    return [
        f"{check.name.split(',')[0]} {check.candidate:.4g} against {check.champion:.4g} ({check.limit})"
        for check in checks
        if not check.passed
    ]


def _comparable(first: Report, second: Report) -> None:
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
