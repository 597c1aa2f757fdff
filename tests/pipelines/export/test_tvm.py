"""`nafnet export --to tvm`: libraries for here, objects for elsewhere, and loops that are measured."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nafnet_core import load_model
from nafnet_core.local_stats import local_statistics
from tests.nafnet_core.networks import photo_nchw
from tests.pipelines.export.conftest import PATCH_PX, export_weights

_PHONE = '{"kind": "llvm", "mtriple": "aarch64-linux-android"}'


def test_a_library_of_tvm_for_here_and_for_elsewhere(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from pipelines.export import tvm_format

    result = export_weights(weights, tmp_path / "lively.so", to="tvm", size_px=(72, 64))
    library, said = result.files
    assert result.parity.difference < 1e-5 and result.parity.timed_px == (72, 64)
    assert result.parity.sizes_px == ((72, 64),)
    model, _ = load_model(weights)
    lq = photo_nchw(72, 64)
    with torch.no_grad(), local_statistics(model, PATCH_PX):
        expected = model(lq)
    made = tvm_format.open(library, "fp32", num_threads=1)(lq.numpy())
    assert np.abs(made - expected.numpy()).max() < 1e-5 < np.abs(expected.numpy() - lq.numpy()).max()
    assert json.loads(said.read_text())["export"]["size_px"] == [72, 64]

    objects, _ = export_weights(
        weights, tmp_path / "lively.tar", to="tvm", size_px=(64, 64), target=_PHONE
    ).files
    members = _members(objects)
    assert members and all(each[:4] == b"\x7fELF" and each[18] == 183 for each in members)  # of AArch64


def _members(archive: Path) -> list[bytes]:
    with tarfile.open(archive) as opened:
        return [opened.extractfile(name).read() for name in opened.getnames()]  # type: ignore[union-attr]


class _Layer(torch.nn.Module):
    """What a network has most of, as `Exportable` gives it to TVM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.LayerNorm(16)
        for parameter in self.norm.parameters():
            torch.nn.init.normal_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def example(self) -> tuple[torch.Tensor, tuple[int, ...]]:
        return torch.zeros(1, 3, 64, 72), ()


@pytest.mark.slow
def test_loops_of_tvm_are_measured_here_and_taken_for_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from pipelines.export import tvm_format

    layer, lq = _Layer().eval(), photo_nchw(64, 72)
    told: list[tuple[int, int]] = []
    for name, num_trials in (("plain", 0), ("tuned", 4)):
        built = tvm_format.build(
            layer,  # type: ignore[arg-type]
            "fp32",
            target=_PHONE,
            num_trials=num_trials,
            on_trial=lambda done, total: told.append((done, total)),
        )
        here, there = tmp_path / f"{name}.so", tmp_path / f"{name}.tar"
        tvm_format.save(built, here, {})
        tvm_format.save(built, there, {"name": name})
        made = tvm_format.open(here, "fp32", num_threads=2)(lq.numpy())
        with torch.no_grad():
            np.testing.assert_allclose(made, layer(lq).numpy(), atol=1e-5)
        machines = here.read_bytes(), b"".join(_members(there))
        assert [b"ParallelLaunch" in machine for machine in machines] == [num_trials > 0] * 2
        assert bool(told) == (num_trials > 0)
    assert told == sorted(told) and told[-1][0] == told[-1][1] == 2 * 4  # candidates of two loops
