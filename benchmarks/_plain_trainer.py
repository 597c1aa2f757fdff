"""The trainer that users otherwise write: a plain NCHW fp32 network, PNG in LMDBs, DistributedDataParallel.

    torchrun --standalone --nproc_per_node 2 benchmarks/_plain_trainer.py --lmdbs FOLDER --pairs 48 ...

In BasicSR's style, with the recipe of the paper's GoPro run (Chen et al. 2022; the official
options/train/GoPro/NAFNet-width32.yml), but for the size of network, patch and batch. `FOLDER` holds
`lq.lmdb` and `gt.lmdb`. The cosine follows the clock, so that it ends when the time does. Prints one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._loaders import PngLmdbPairs  # noqa: E402
from benchmarks._peers import plain  # noqa: E402
from nafnet_core.model import PRESETS  # noqa: E402

# All from the official recipe, but for the fused step: it computes the same sooner.
_LR, _FINAL_LR, _BETAS, _WEIGHT_DECAY, _CLIP_NORM = 1e-3, 1e-7, (0.9, 0.9), 1e-3, 0.01
_WARM_UP_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lmdbs", type=Path, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--preset", default="mobile", choices=sorted(PRESETS))
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8, help="over both processes")
    parser.add_argument("--loaders", type=int, default=1, help="loading processes of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the weights")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(options.seed)
    model = plain(PRESETS[options.preset])
    result = train(model, loader(options), options)
    if dist.get_rank() == 0:
        if options.out:
            torch.save(model.state_dict(), options.out)
        print(json.dumps(result))
    dist.destroy_process_group()


def loader(options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of this process, without end."""
    sides = options.lmdbs / "lq.lmdb", options.lmdbs / "gt.lmdb"
    pairs = PngLmdbPairs(sides, options.pairs, options.patch)
    sampler = DistributedSampler(pairs, seed=options.seed, drop_last=True)
    batches = DataLoader(
        pairs,
        batch_size=options.batch // dist.get_world_size(),
        sampler=sampler,
        num_workers=options.loaders,
        persistent_workers=options.loaders > 0,
        prefetch_factor=4 if options.loaders else None,
        drop_last=True,
    )
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from batches
        epoch += 1


def train(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], options: argparse.Namespace
) -> dict[str, float]:
    """Train until the time is over, the first steps not counted."""
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LR, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
    )
    start, steps, waited_s, share = math.inf, 0, 0.0, 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = _FINAL_LR + (_LR - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * share))
        asked = time.perf_counter()
        lq, gt = (image.float() / 255 for image in next(batches))
        waited_s += time.perf_counter() - asked
        restored = replica(lq)
        loss = 10 / math.log(10) * ((restored - gt).square().mean(dim=(1, 2, 3)) + 1e-8).log().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps == _WARM_UP_STEPS:
            start, waited_s = time.perf_counter(), 0.0
        share = _agreed(max(0.0, time.perf_counter() - start) / options.seconds)
    seconds = time.perf_counter() - start
    samples = (steps - _WARM_UP_STEPS) * options.batch
    return {
        "samples": samples,
        "seconds": seconds,
        "samples_per_s": samples / seconds,
        "data_wait": waited_s / seconds,
    }


def _agreed(share: float) -> float:
    """What rank 0's clock says, for both stop at the same step."""
    value = torch.tensor([share])
    dist.broadcast(value, src=0)
    return float(value)


if __name__ == "__main__":
    main()
