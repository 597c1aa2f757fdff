"""What the model predicts of clusters of GPUs, which are not here to be measured."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._course import course  # noqa: E402
from benchmarks._rows import Rows, row  # noqa: E402
from benchmarks._scaling_model import MIB, Cluster, Link, Step  # noqa: E402
from nafnet_core.model import PRESETS, NAFNet  # noqa: E402
from pipelines.config import load_config  # noqa: E402

_GPUS = (8, 64, 512)
_GBITS = (10, 25, 100, 400)
_STATED_GBIT = 100
# Where the network breaks first, and what moves it.
_WEAK_GPUS, _WEAK_GBIT = 64, 10
# A backward pass costs two forward ones: by inputs, and by weights.
_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What predictions rest on beside measurements: no GPU is here."""

    tflops: float
    """Sustained by one GPU in bf16, of the network's convolutions: a fifteenth of an A100's peak, as maps go
    through its memory for each norm, gate and depthwise convolution."""
    patch_px: int
    batch: int
    """Samples a GPU and pass; the paper's recipe has 4."""
    gpus_a_node: int = 8
    nvlink_bytes_per_s: float = 200e9
    nvlink_latency_s: float = 5e-6
    nic_share: float = 0.9
    """Of a link's stated bandwidth, one card a node."""
    nic_latency_s: float = 15e-6
    jitter: float = 0.01

    def cluster(self, num_gpus: int, gbit_s: float) -> Cluster:
        return Cluster(
            num_nodes=-(-num_gpus // self.gpus_a_node),
            workers_a_node=min(num_gpus, self.gpus_a_node),
            inside=Link(bytes_per_s=self.nvlink_bytes_per_s, latency_s=self.nvlink_latency_s),
            between=Link(bytes_per_s=self.nic_share * gbit_s * 1e9 / 8, latency_s=self.nic_latency_s),
            jitter=self.jitter,
        )

    def step(self, preset: str) -> Step:
        """Gradients ready in the order and proportions of a core here, in the time of a GPU."""
        recipe = {"width32": "gopro_width32", "width64": "gopro_width64", "mobile": "mobile"}[preset]
        stages = f"stages=[{{patch_px: {self.patch_px}, batch: 1}}]"
        config = load_config(recipe, [stages, "precision=bf16", "scaling={num_workers: 1}"], train=[])
        flops = self.batch * _PASSES * forward_flops(preset, self.patch_px)
        seconds = flops / (self.tflops * 1e12)
        step = course(config, self.patch_px, 1)
        backward_s = seconds * (_PASSES - 1) / _PASSES
        return replace(
            step,
            forward_s=seconds / _PASSES,
            backward_s=backward_s,
            rest_s=0.0,  # clipping and AdamW go through the weights' few bytes once
            ready_s=tuple(at / step.backward_s * backward_s for at in step.ready_s),
        )


def forward_flops(preset: str, patch_px: int) -> int:
    """Of one image, two a multiplication with its addition."""
    network = NAFNet(PRESETS[preset])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, patch_px, patch_px))
    return counter.get_total_flops()


def cluster_rows(assumed: Assumed) -> Rows:
    """Predicted efficiency, where it breaks, and what moves it."""
    rows: Rows = {}
    steps = {preset: assumed.step(preset) for preset in PRESETS}
    for preset, step in steps.items():
        size = sum(step.sizes_bytes)
        rows[f"{preset}: gradient"] = row(size / MIB, "MiB")
        rows[
            f"{preset}: step of a GPU, {assumed.batch}×{assumed.patch_px}² at {assumed.tflops:g} TFLOP/s"
        ] = row(1000 * step.seconds, "ms")
        for num_gpus in _GPUS:
            efficiency = assumed.cluster(num_gpus, _STATED_GBIT).efficiency(step)
            rows[f"{preset}: predicted efficiency, {num_gpus} GPUs, {_STATED_GBIT} Gbit/s a node"] = row(
                efficiency, ""
            )
    step = steps["width32"]
    for gbit_s in _GBITS:
        efficiency = assumed.cluster(_WEAK_GPUS, gbit_s).efficiency(step)
        rows[f"width32: {_WEAK_GPUS} GPUs, {gbit_s} Gbit/s a node"] = row(efficiency, "")
    for num_gpus, gbit_s in ((_WEAK_GPUS, _WEAK_GBIT), (_WEAK_GPUS, _STATED_GBIT), (_GPUS[-1], _STATED_GBIT)):
        cluster, where = assumed.cluster(num_gpus, gbit_s), f"width32: {num_gpus} GPUs, {gbit_s} Gbit/s"
        rows[f"{where}, gradients in bf16"] = row(cluster.efficiency(step, bytes_share=0.5), "")
        for bucket_mib in (5, 100):
            rows[f"{where}, buckets of {bucket_mib} MiB"] = row(
                cluster.efficiency(step, bucket_mib=bucket_mib), ""
            )
        rows[f"{where}, gradients in bf16, buckets of 5 MiB"] = row(
            cluster.efficiency(step, bucket_mib=5, bytes_share=0.5), ""
        )
    weak, where = assumed.cluster(_WEAK_GPUS, _WEAK_GBIT), f"width32: {_WEAK_GPUS} GPUs, {_WEAK_GBIT} Gbit/s"
    for count in (4, 16):
        more = step.accumulating(count)
        rows[f"{where}, {count} passes a step"] = row(weak.efficiency(more), "")
        rows[f"{where}, {count} passes a step, gradients in bf16"] = row(
            weak.efficiency(more, bytes_share=0.5), ""
        )
    return rows
