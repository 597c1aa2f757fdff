"""`nafnet restore` on several hosts with addresses and disks of their own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nafnet_core import save_model
from pipelines.png import encode_png
from pipelines.restore import RECORD
from tests.cluster.host_cluster import host_cluster
from tests.cluster.hosts import Nafnet, Network
from tests.nafnet_core.networks import SMALL, lively_network, photo

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

_NUM_PHOTOS = 30


def _restore(network: Network, photos: Path, out: Path, log: str, *options: object) -> Nafnet:
    model = network.shared / "model.safetensors"
    if not model.exists():
        save_model(lively_network(SMALL), model, metadata={"train_patch_px": 64})
    command = ("restore", photos, "--out", out, "--model", model, "--tile", "256", "--tta", *options)
    environment = {"NAFNET_WORKSPACE": str(network.shared / "workspace")}
    return network["head"].nafnet(*command, log=network.folder / log, env=environment)


def _photos(folder: Path) -> Path:
    folder.mkdir()
    for number in range(_NUM_PHOTOS):
        (folder / f"{number:02}.png").write_bytes(encode_png(np.roll(photo(300, 400), number, axis=1)))
    return folder


def _record(out: Path) -> list[dict[str, Any]]:
    path = out / RECORD
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_job_survives_a_lost_host_and_says_where_a_folder_is_missing() -> None:
    with host_cluster("one", "two", "three") as network:
        photos = _photos(network.shared / "photos")
        alone = _restore(network, photos, network.shared / "alone", "alone.log")
        alone.finish()
        job = ("--address", network.ray, "--workers", "3")
        out = network.shared / "out"
        running = _restore(network, photos, out, "job.log", *job)
        running.wait_for(lambda: len(_record(out)) >= 6)
        network["two"].kill()
        printed = running.finish()
        assert f"{_NUM_PHOTOS} restored, 0 skipped, 0 failed" in printed
        assert "Traceback" not in printed
        names = sorted(path.name for path in photos.iterdir())
        assert sorted(path.name for path in out.glob("*.png")) == names
        levels = [
            np.abs(_read(out / name).astype(int) - _read(network.shared / "alone" / name)) for name in names
        ]
        # The head has another number of threads, which changes a last bit.
        assert max(level.max() for level in levels) <= 1 and np.mean(levels) < 1e-4
        assert not (out / ".restore").exists()
        start = time.monotonic()
        again = _restore(network, photos, out, "again.log", *job).finish()
        assert f"0 restored, {_NUM_PHOTOS} skipped" in again and time.monotonic() - start < 60
        # The head's own disk, which no other host sees.
        hidden = _restore(network, photos, network.disk / "out", "hidden.log", *job)
        assert "not every node of the cluster" in hidden.finish(code=2)


def _read(path: Path) -> np.ndarray:
    from pipelines.images import read_rgb_u8

    return read_rgb_u8(path)
