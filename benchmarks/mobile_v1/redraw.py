"""Draw the blocks of some width of a network anew, and keep all else: what a run left untrained begins again.

python benchmarks/mobile_v1/redraw.py MODEL OUT.safetensors [--channels 128] [--workspace PATH]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nafnet_core import NAFNet, save_model
from pipelines.models import open_model
from pipelines.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="as `nafnet restore --model` takes it")
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=128, help="blocks of as many begin anew")
    parser.add_argument("--workspace", type=Path)
    options = parser.parse_args()

    loaded = open_model(options.model, Workspace.find(options.workspace))
    assert isinstance(loaded.model, NAFNet), "weights, and no exported file"
    torch.manual_seed(7)
    fresh = NAFNet(loaded.model.config)
    redrawn = 0
    for block, new in zip(loaded.model.blocks, fresh.blocks, strict=True):
        if block.beta.shape[1] == options.channels:
            block.load_state_dict(new.state_dict())
            redrawn += 1
    metadata = {name: value for name, value in loaded.metadata.items() if name != "config"}
    save_model(loaded.model, options.out, metadata=metadata)
    print(f"{redrawn} of {len(fresh.blocks)} blocks drawn anew: {options.out}")


if __name__ == "__main__":
    main()
