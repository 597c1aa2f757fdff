"""The gate in front of promotion: a candidate against the champion, on the same data by the same protocol."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from nafnet_core import GateError, InputError
from nafnet_core.tiling import restore_image
from pipelines.evaluate import Pairs, Report, comparable
from pipelines.models import LoadedModel
from pipelines.scoring.work import one_thread

_TIMED_IMAGES, _TIMED_SIDE_PX, _ROUNDS, _ATTEMPTS = 3, 512, 5, 3
_MIN_ROUNDS, _ENOUGH_S = 2, 6.0  # of one image: large networks take seconds a turn


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What a candidate must reach. Without a champion it is held against the blurred input."""

    min_gain_db: float = 0.05
    """PSNR over the champion's, at least. Below about 0.05 dB a difference is chance on a hundred images."""
    max_ssim_drop: float = 0.002
    max_latency_ratio: float = 1.2
    """Candidate's time over the champion's, both measured at promotion in turns."""
    max_regressed_share: float = 0.1
    """Images that may be worse than the champion's by more than `max_image_drop_db`, of all, 0…1. A mean
    hides a kind of photo that got worse; a few always do, where a network trades one blur for another."""
    max_image_drop_db: float = 0.5
    """PSNR of one image below the champion's that counts as worse. Half a decibel is where a trained eye
    begins to see it; two trainings that differ in their seed alone differ by less on most images."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_regressed_share <= 1:
            raise InputError("a share of images", expected="0 to 1", got=self.max_regressed_share)
        if self.max_image_drop_db < 0:
            raise InputError("max_image_drop_db", expected="0 or more", got=self.max_image_drop_db)
        if self.max_latency_ratio <= 0:
            raise InputError("max_latency_ratio", expected="more than 0", got=self.max_latency_ratio)


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


class PromotionRefusedError(GateError):
    """The gate said no to a version; `checks` is its table."""

    def __init__(self, version: int, before: int | None, checks: Sequence[Check]) -> None:
        super().__init__(f"version {version} is not promoted: {'; '.join(failed(checks))}")
        self.version, self.before, self.checks = version, before, tuple(checks)

    def to_dict(self) -> dict[str, object]:
        checks = [check.to_dict() for check in self.checks]
        return {"version": self.version, "before": self.before, "checks": checks}


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
        comparable(candidate, champion)
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
    gains = image_gains(candidate, champion)
    if gains:
        regressed = sum(gain < -settings.max_image_drop_db for gain in gains.values())
        limit = f"≤ {settings.max_regressed_share:g} by {settings.max_image_drop_db:g} dB"
        checks.append(
            Check(
                name="share worse",
                champion=None,
                candidate=regressed / len(gains),
                limit=limit,
                passed=regressed <= settings.max_regressed_share * len(gains),
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


def latency_ratio(candidate: LoadedModel, champion: LoadedModel, pairs: Pairs, limit: float) -> float:
    """Candidate's over champion's seconds an image, the two taking turns on this machine.

    The fastest of several turns is compared, since what else the machine does only ever adds time. A ratio
    over `limit` is measured again, up to twice, and the smallest counts: two equal networks on a busy machine
    must not be told apart. On one thread: several wait for each other in every layer, and where something
    else takes a core, that wait is all that is measured (two equal networks on two busy cores came to 0.06).

    Args:
        candidate, champion: the two.
        pairs: what they run on; the first images, of each the middle of up to 512 px a side.
        limit: what the gate allows.
    """
    images = [_middle(pairs[index].lq) for index in range(min(_TIMED_IMAGES, len(pairs)))]
    ratio = math.inf
    with one_thread():
        for _ in range(_ATTEMPTS):
            ratio = min(ratio, statistics.median(_ratio(candidate, champion, image) for image in images))
            if ratio <= limit:
                break
    return ratio


def _ratio(candidate: LoadedModel, champion: LoadedModel, image: NDArray[np.uint8]) -> float:
    fastest = {"candidate": math.inf, "champion": math.inf}
    sides = [("candidate", candidate), ("champion", champion)]
    begin = time.perf_counter()
    for number in range(_ROUNDS):
        if number >= _MIN_ROUNDS and time.perf_counter() - begin > _ENOUGH_S:
            break
        for name, loaded in sides:
            start = time.perf_counter()
            restore_image(loaded.model, image, train_patch_px=loaded.train_patch_px, tile_px=None)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
        sides.reverse()  # whoever runs second finds warm caches
    return fastest["candidate"] / fastest["champion"]


def _middle(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    top, left = (max(0, side - _TIMED_SIDE_PX) // 2 for side in image.shape[:2])
    return image[top : top + _TIMED_SIDE_PX, left : left + _TIMED_SIDE_PX]


def failed(checks: Sequence[Check]) -> list[str]:
    """Names of the checks that did not pass, each with its numbers."""
    return [
        f"{check.name.partition(',')[0]} {check.candidate:.4g}"
        + ("" if check.champion is None else f" against {check.champion:.4g}")
        + f" ({check.limit})"
        for check in checks
        if not check.passed
    ]


def image_gains(candidate: Report, champion: Report | None) -> dict[str, float]:
    """Image → PSNR, dB, over the champion's of the same image, or over the blurred input's without one."""
    if champion is None:
        return {image.key: image.gain_db for image in candidate.images}
    base = {image.key: image.psnr_restored_db for image in champion.images}
    return {image.key: image.psnr_restored_db - base[image.key] for image in candidate.images}
