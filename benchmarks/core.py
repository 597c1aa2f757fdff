"""The network against what users otherwise run: training step, inference, memory; in turns, in one process.

    python benchmarks/core.py
    python benchmarks/core.py --device cuda --preset width64
    python benchmarks/core.py --quick --compile     # training steps only, and through torch.compile

Peers: a plain NCHW eager fp32 network with a hand-written autograd LayerNorm, and spandrel's, if it is there
(`pip install --no-deps spandrel`). Ratios are against the faster of them. Memory is the peak of a process of
its own, its start-up included. Needs torch, numpy and OpenCV only.

On a GPU ours are CUDA graphs, as in `nafnet train` and `nafnet restore`; peers are launched as they are.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _peers as peers  # noqa: E402
from benchmarks._rows import Rows, row, show  # noqa: E402
from nafnet_core import PRESETS, NAFNet, randomize_residual_scales, restore_image  # noqa: E402
from nafnet_core.forward import Forward, forward_of  # noqa: E402
from nafnet_core.local_stats import local_statistics  # noqa: E402
from nafnet_core.losses import psnr_loss  # noqa: E402

_TRAIN_PATCH_PX = 256
_FRAME = (1, 3, 720, 1280)
# Floors on two CPU cores, width 32.
_STEP_FLOORS = {"fp32": 1.25, "bf16": 1.9}
_FRAME_FLOORS = {"fp32": 2.0, "bf16": 3.5}
_MEMORY_FLOOR = 2.0
_PHOTO_48_MP_LIMIT_MIB = 1536.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="width32", choices=sorted(PRESETS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="training steps only")
    parser.add_argument("--compile", action="store_true", help="also the step through torch.compile; minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":  # as training has it, for all of them
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.memory_of:
        _memory_of(options.memory_of, options.preset, device)
        return
    rows = training_rows(device, options.preset, options.rounds, compiled=options.compile)
    if not options.quick:
        rows |= inference_rows(device, options.preset, max(3, options.rounds // 4))
        rows |= memory_rows(device, options.preset)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    show(rows, as_json=options.json, versions={"torch": torch.__version__}, machine=machine)


def training_rows(device: torch.device, preset: str, rounds: int, *, compiled: bool = False) -> Rows:
    """One step, forward and backward: of two patches of 128×128 on a CPU, of eight of 256×256 on a GPU."""
    networks = _networks(preset, device)
    count, side = (8, 256) if device.type == "cuda" else (2, 128)
    gt = torch.rand(count, 3, side, side, device=device)
    lq = (gt + 0.05 * torch.randn_like(gt)).clamp(0, 1)
    runs: dict[str, Callable[[], Any]] = {
        name: partial(_step, model, lq, gt, bf16=False) for name, model in networks.items()
    }
    runs["bf16"] = partial(_step, networks["fp32"], lq, gt, bf16=True)
    if device.type == "cuda":
        runs |= {
            name: _recorded_step(networks["fp32"], lq, gt, bf16=name == "bf16") for name in ("fp32", "bf16")
        }
        runs["plain, bf16"] = partial(_step, networks["plain"], lq, gt, bf16=True)
    losses = {name: run() for name, run in runs.items()}
    tolerance = 1e-5 if device.type == "cpu" else 1e-3  # TF32 there
    assert abs(losses["fp32"] - losses["plain"]) < tolerance * abs(losses["plain"]), losses
    label, rows = f"{preset} training step {count}×{side}×{side}", {}
    if compiled:
        runs["bf16 compiled"] = partial(_step, torch.compile(networks["fp32"]), lq, gt, bf16=True)
        start = time.perf_counter()
        runs["bf16 compiled"]()
        rows[f"{label}, compiling"] = row(time.perf_counter() - start, "s")
    return rows | _ratios(label, _timed(runs, device, rounds), device, _STEP_FLOORS)


def inference_rows(device: torch.device, preset: str, rounds: int) -> Rows:
    """A whole frame with local statistics."""
    networks = _networks(preset, device)
    lq = torch.rand(_FRAME, device=device)
    forwards = {name: _forward(model, device, bf16=False) for name, model in networks.items()}
    forwards["bf16"] = _forward(networks["fp32"], device, bf16=True)
    if device.type == "cuda":
        forwards["plain, bf16"] = _forward(networks["plain"], device, bf16=True)
    runs = {name: partial(_infer, forward, lq, bf16="bf16" in name) for name, forward in forwards.items()}
    difference = (runs["fp32"]() - runs["plain"]()).abs().max()
    # The peers sum a whole map in fp32; ours does not, and is the more exact one.
    assert difference < 1e-2, f"the two networks differ by {difference}"
    label = f"{preset} inference 1280×720, local statistics"
    return _ratios(label, _timed(runs, device, rounds), device, _FRAME_FLOORS)


def memory_rows(device: torch.device, preset: str) -> Rows:
    """Peak memory of that inference, and of a 48-megapixel photo through `mobile`."""
    if device.type != "cpu":
        return {}
    names = ("plain", "fp32", "step plain", "step fp32", "step checkpointed")
    peak = {name: _peak_mib(name, preset) for name in names}
    rows: Rows = {}
    step = "training step 2×256×256"
    for kind, label, floor in (("", "inference 1280×720", _MEMORY_FLOOR), ("step ", step, None)):
        before, after = peak[f"{kind}plain"], peak[f"{kind}fp32"]
        rows[f"{preset} {label}, fp32: peak of plain"] = row(before, "MiB")
        rows[f"{preset} {label}, fp32: peak of ours"] = row(after, "MiB")
        floor = floor if preset == "width32" else None
        rows[f"{preset} {label}, fp32: peak, plain over ours"] = row(before / after, "×", at_least=floor)
    checkpointed = row(peak["step checkpointed"], "MiB")
    rows[f"{preset} {step}, fp32: peak of ours, activations checkpointed"] = checkpointed
    photo = _peak_mib("photo", "mobile")
    rows["mobile, 48-megapixel photo, fp32: peak"] = row(photo, "MiB", at_most=_PHOTO_48_MP_LIMIT_MIB)
    return rows


def _networks(preset: str, device: torch.device) -> dict[str, nn.Module]:
    """`fp32` is ours; the same weights in all."""
    config = PRESETS[preset]
    ours = NAFNet(config)
    randomize_residual_scales(ours, seed=0, scale=0.1)
    ours = ours.to(device)
    networks: dict[str, nn.Module] = {"fp32": ours, "plain": peers.load_weights(peers.plain(config), ours)}
    other = peers.spandrel(config)
    if other is not None:
        networks["spandrel"] = peers.load_weights(other, ours)
    return networks


def _step(model: nn.Module, lq: Tensor, gt: Tensor, *, bf16: bool) -> float:
    model.train()
    with torch.autocast(lq.device.type, dtype=torch.bfloat16, enabled=bf16):
        restored = model(lq)
    loss = psnr_loss(restored.float(), gt).mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return float(loss.detach())


def _recorded_step(model: nn.Module, lq: Tensor, gt: Tensor, *, bf16: bool) -> Callable[[], float]:
    """The same as `_step`, of uint8, as training has it. Needs Ray and all else."""
    from pipelines.train.graphed import GraphedPasses

    model.train()

    def run(lq_u8: Tensor, gt_u8: Tensor, global_batch: int) -> tuple[Tensor, Tensor]:
        lq, gt = (image.permute(0, 3, 1, 2).float().div_(255) for image in (lq_u8, gt_u8))
        with torch.autocast(lq.device.type, dtype=torch.bfloat16, enabled=bf16):
            restored = model(lq)
        loss = psnr_loss(restored.float(), gt).sum() / global_batch
        loss.backward()
        return loss.detach(), loss.detach()

    passes = GraphedPasses(list(model.parameters()), run)
    images = [(255 * image).round().byte().permute(0, 2, 3, 1).cpu().numpy() for image in (lq, gt)]

    def step() -> float:
        passes.begin()
        loss = float(passes(*images, len(lq))[0])
        model.zero_grad(set_to_none=True)
        return loss

    return step


def _forward(model: nn.Module, device: torch.device, *, bf16: bool) -> Forward:
    """A peer's with local pools; ours as `restore_image` runs it."""
    model.eval()
    if isinstance(model, NAFNet):
        forward = forward_of(model, device, autocast=bf16, bytes_per_px=1)

        def with_windows(lq: Tensor) -> Tensor:
            with local_statistics(model, _TRAIN_PATCH_PX):
                return forward(lq)

        return with_windows
    if not any(isinstance(module, peers.IntegralPool) for module in model.modules()):
        peers.localize(model, _TRAIN_PATCH_PX)
    return model


@torch.inference_mode()
def _infer(forward: Forward, lq: Tensor, *, bf16: bool) -> Tensor:
    with torch.autocast(lq.device.type, dtype=torch.bfloat16, enabled=bf16):
        return forward(lq)


def _timed(runs: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round, after one that warms caches and primitives."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def _ratios(
    label: str, times: dict[str, list[float]], device: torch.device, floors: dict[str, float]
) -> Rows:
    """Medians, and the median over the rounds of each ratio: a machine's speed drifts between rounds."""
    seconds = {name: statistics.median(values) for name, values in times.items()}
    others = [name for name in ("plain", "spandrel", "plain, bf16") if name in times]
    peer = times[min(others, key=seconds.__getitem__)]
    has_floor = device.type == "cpu" and label.startswith("width32 ")
    rows = {f"{label}, {name}": row(value, "s") for name, value in seconds.items()}
    for name in [name for name in times if name not in others]:
        ratio = statistics.median(theirs / ours for theirs, ours in zip(peer, times[name], strict=True))
        floor = floors.get(name) if has_floor else None
        rows[f"{label}, {name} against the faster peer"] = row(ratio, "×", at_least=floor)
    return rows


def _peak_mib(name: str, preset: str) -> float:
    command = [sys.executable, __file__, "--preset", preset, "--memory-of", name]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _memory_of(name: str, preset: str, device: torch.device) -> None:
    """Run one thing and print this process's peak in MiB."""
    kind, _, side = name.rpartition(" ")
    config = PRESETS[preset]
    model = peers.plain(config) if side == "plain" else NAFNet(config)
    randomize_residual_scales(model, seed=0, scale=0.1)
    if side == "photo":
        assert isinstance(model, NAFNet)
        photo = np.random.default_rng(0).integers(0, 256, (6000, 8000, 3), np.uint8)
        restore_image(model.eval(), photo, train_patch_px=_TRAIN_PATCH_PX, tile_px=1024)
    elif kind == "step":
        if side == "checkpointed":
            assert isinstance(model, NAFNet)
            model.checkpoint_activations = True
        _step(model, torch.rand(2, 3, 256, 256), torch.rand(2, 3, 256, 256), bf16=False)
    else:
        _infer(_forward(model, device, bf16=False), torch.rand(_FRAME), bf16=False)
    # Not `ru_maxrss`, which a child inherits from the process that started it.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
