"""The demo, shortened: the figures are measured, the gain is real, and stdout is one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_a_short_demo_gains_on_photos_it_has_not_seen(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", "pipelines", "demo", "--minutes", "2", "--json"]
    done = subprocess.run(
        [*command, "--workspace", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["psnr_restored_db"] > result["psnr_blurred_db"] + 0.05
    assert result["ssim_restored"] > result["ssim_blurred"]
    assert result["num_workers"] == 2 and result["samples_per_s"] > 1
    assert result["champion_version"] == 1
    assert len(result["pictures"]) >= 4
    assert all(Path(picture).stat().st_size > 1000 for picture in result["pictures"])
    # What `evaluate` says of the champion is what the demo printed.
    command = [sys.executable, "-m", "pipelines", "evaluate", "models:/nafnet-deblur@champion"]
    again = subprocess.run(
        [*command, str(tmp_path / "demo" / "stores" / "test"), "--workspace", str(tmp_path), "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["psnr_restored_db"] == pytest.approx(result["psnr_restored_db"], abs=1e-9)
