"""The network against a plain implementation of it: training step and inference, in turns, in one process.

    python benchmarks/core.py
    python benchmarks/core.py --device cuda --preset width64

The peer is what users otherwise run: NCHW fp32 eager, with a hand-written autograd LayerNorm. Needs torch,
numpy and OpenCV only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nafnet_core import PRESETS, NAFNet, randomize_residual_scales  # noqa: E402
from nafnet_core.losses import psnr_loss  # noqa: E402
from tests.reference import ReferenceNAFNet  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="width32", choices=sorted(PRESETS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = measure(torch.device(options.device), options.preset, options.rounds)
    if options.json:
        machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        print(json.dumps({"rows": rows, "machine": machine, "versions": versions}))
        return
    for name, row in rows.items():
        print(f"{name:55} {row['value']:8.3g} {row['unit']}")


def measure(device: torch.device, preset: str, rounds: int) -> dict[str, dict[str, object]]:
    """Medians of `rounds` rounds, each of which takes every variant once."""
    config = PRESETS[preset]
    ours, peer = NAFNet(config), ReferenceNAFNet(**config.to_dict())
    randomize_residual_scales(ours, seed=0, scale=0.1)
    peer.load_state_dict(ours.state_dict())
    ours, peer = ours.to(device), peer.to(device)
    gt = torch.rand(2, 3, 128, 128, device=device)
    lq = (gt + 0.05 * torch.randn_like(gt)).clamp(0, 1)
    variants: dict[str, Callable[[], float]] = {
        "peer step": lambda: _step(peer, lq, gt, bf16=False),
        "fp32 step": lambda: _step(ours, lq, gt, bf16=False),
        "bf16 step": lambda: _step(ours, lq, gt, bf16=True),
        "peer forward": lambda: _forward(peer, lq[:1], bf16=False),
        "fp32 forward": lambda: _forward(ours, lq[:1], bf16=False),
        "bf16 forward": lambda: _forward(ours, lq[:1], bf16=True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:  # the first round warms caches and primitives
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    rows: dict[str, dict[str, object]] = {}
    for label, kind, floors in (
        ("training step 2×128×128", "step", (1.25, 1.9)),
        ("inference 128×128", "forward", (None, None)),
    ):
        for precision, at_least in zip(("fp32", "bf16"), floors, strict=True):
            ratio = median[f"peer {kind}"] / median[f"{precision} {kind}"]
            at_least = at_least if device.type == "cpu" and preset == "width32" else None
            rows[f"{preset} {label}, {precision}, against plain eager fp32"] = {
                "value": ratio,
                "at_least": at_least,
                "unit": "×",
                "holds": None if at_least is None else ratio >= at_least,
            }
        rows[f"{preset} {label}, plain eager fp32"] = {
            "value": median[f"peer {kind}"],
            "at_least": None,
            "unit": "s",
            "holds": None,
        }
    return rows


def _step(model: nn.Module, lq: torch.Tensor, gt: torch.Tensor, *, bf16: bool) -> float:
    model.train()
    with torch.autocast(lq.device.type, dtype=torch.bfloat16, enabled=bf16):
        restored = model(lq)
    loss = psnr_loss(restored.float(), gt).mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return float(loss.detach())


@torch.inference_mode()
def _forward(model: nn.Module, lq: torch.Tensor, *, bf16: bool) -> float:
    model.eval()
    with torch.autocast(lq.device.type, dtype=torch.bfloat16, enabled=bf16):
        return float(model(lq).float().mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
