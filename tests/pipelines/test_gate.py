"""The gate: what passes, what is refused, what cannot be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from nafnet_core import InputError, NAFNetConfig, save_model
from pipelines.evaluate import Pairs, Report
from pipelines.gate import GateSettings, failed, image_gains, judge, latency_ratio
from pipelines.models import open_model
from pipelines.png import encode_png
from pipelines.scoring import ImageScore, Protocol
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, lively_network
from tests.pipelines.pairs import piece


def _report(
    psnr_db: float, ssim: float, *, data: str = "d", precision: str = "fp32", images_db: Sequence[float] = ()
) -> Report:
    return Report(
        model="m",
        weights_digest="w",
        data="store",
        data_digest=data,
        protocol=Protocol(precision=precision),
        num_images=3,
        psnr_blurred_db=25.0,
        psnr_restored_db=psnr_db,
        ssim_blurred=0.8,
        ssim_restored=ssim,
        latency_s=0.1,
        peak_memory_mib=100.0,
        images=tuple(
            ImageScore(
                key=f"image{number}",
                scene="",
                height_px=64,
                width_px=64,
                psnr_blurred_db=25.0,
                psnr_restored_db=score,
                ssim_blurred=None,
                ssim_restored=None,
            )
            for number, score in enumerate(images_db)
        ),
    )


@pytest.mark.parametrize(
    ("psnr_db", "ssim", "ratio", "refused_for"),
    [
        (27.06, 0.85, 1.0, []),
        (27.04, 0.85, 1.0, ["PSNR"]),
        (27.10, 0.847, 1.0, ["SSIM"]),
        (27.10, 0.85, 1.3, ["time"]),
        (26.00, 0.80, 2.0, ["PSNR", "SSIM", "time"]),
    ],
)
def test_each_limit_refuses_by_itself(
    psnr_db: float, ssim: float, ratio: float, refused_for: list[str]
) -> None:
    checks = judge(_report(psnr_db, ssim), _report(27.0, 0.85), GateSettings(), latency_ratio=ratio)
    assert [fault.split()[0] for fault in failed(checks)] == refused_for


def test_without_a_champion_the_blurred_input_is_to_be_beaten() -> None:
    settings = GateSettings()
    assert not failed(judge(_report(25.1, 0.81), None, settings, latency_ratio=None))
    assert failed(judge(_report(25.0, 0.81), None, settings, latency_ratio=None))


@pytest.mark.parametrize(
    ("images_db", "passes"),
    [
        ([27.0] * 10, True),
        ([26.4] + [27.0] * 9, True),
        ([26.4] * 2 + [27.0] * 8, False),
        ([26.6] * 10, True),
        ([30.0] * 8 + [26.0] * 2, False),
    ],
)
def test_a_better_mean_does_not_hide_images_that_get_worse(images_db: list[float], passes: bool) -> None:
    champion = _report(27.0, 0.85, images_db=[27.0] * 10)
    candidate = _report(27.1, 0.85, images_db=images_db)
    checks = judge(candidate, champion, GateSettings(), latency_ratio=1.0)
    assert failed(checks) == ([] if passes else ["share worse 0.2 (≤ 0.1 by 0.5 dB)"])
    loose = GateSettings(max_regressed_share=0.2)
    assert not failed(judge(candidate, champion, loose, latency_ratio=1.0))


def test_images_are_matched_by_name_and_held_against_the_input_without_a_champion() -> None:
    candidate, champion = (_report(27.0, 0.85, images_db=scores) for scores in ([28.0, 26.0], [26.0, 28.0]))
    turned = champion.model_copy(update={"images": champion.images[::-1]})
    assert image_gains(candidate, turned) == {"image0": 2.0, "image1": -2.0}
    assert image_gains(candidate, None) == {"image0": 3.0, "image1": 1.0}


@pytest.mark.parametrize(
    "wrong", [{"max_regressed_share": 1.5}, {"max_image_drop_db": -1}, {"max_latency_ratio": 0}]
)
def test_a_limit_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        GateSettings(**wrong)


def test_other_data_or_protocol_is_not_compared() -> None:
    first = _report(27.0, 0.85)
    with pytest.raises(InputError, match="different data"):
        judge(first, _report(26.0, 0.85, data="other"), GateSettings(), latency_ratio=1.0)
    with pytest.raises(InputError, match="precision fp32 ≠ bf16"):
        judge(first, _report(26.0, 0.85, precision="bf16"), GateSettings(), latency_ratio=1.0)


def test_latency_tells_a_larger_network_and_not_an_equal_one(tmp_path: Path) -> None:
    for side in ("blur", "sharp"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "0.png").write_bytes(encode_png(piece(0, 200, 300)))
    wider = NAFNetConfig(**{**dataclasses.asdict(SMALL), "width": SMALL.width * 6})
    for name, config in (("small", SMALL), ("wide", wider)):
        save_model(lively_network(config), tmp_path / f"{name}.safetensors", metadata={"train_patch_px": 64})
    small, wide = (
        open_model(str(tmp_path / f"{name}.safetensors"), Workspace.find(tmp_path))
        for name in ("small", "wide")
    )
    pairs = Pairs(tmp_path / "blur", tmp_path / "sharp")
    assert latency_ratio(wide, small, pairs, 1.2) > 1.2
    assert latency_ratio(small, small, pairs, 1.2) <= 1.2
