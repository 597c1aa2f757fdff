"""Networks that restore a little, without training, and a store to score them on: its images are too dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nafnet_core import NAFNet, NAFNetConfig, save_model
from pipelines.png import encode_png
from pipelines.sources import FolderPairs
from pipelines.store import PairStore
from tests.nafnet_core.networks import SMALL
from tests.pipelines.pairs import blurred, make_store, piece

_PATCH_PX = 64
_DARKER = 12  # levels of 255


def brightener(strength: float, config: NAFNetConfig = SMALL) -> NAFNet:
    """A network that undoes this share of the darkening, and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NAFNet(config).eval()
    with torch.no_grad():
        model.ending.weight.zero_()
        model.ending.bias.fill_(strength * _DARKER / 255)
    return model


def write_brightener(
    path: Path, strength: float, *, train_patch_px: int | None = _PATCH_PX, config: NAFNetConfig = SMALL
) -> Path:
    """A weights file of `brightener`; without a patch, local statistics are off."""
    save_model(brightener(strength, config), path, metadata={"train_patch_px": train_patch_px})
    return path


def dark_store(root: Path, *, num_pairs: int = 4) -> PairStore:
    """Whole images of 96×72, a little blurred, and darker by 12 levels."""
    for number in range(num_pairs):
        sharp = piece(number)
        dark = np.clip(blurred(sharp).astype(int) - _DARKER, 0, 255).astype(np.uint8)
        for side, image in (("blur", dark), ("sharp", sharp)):
            path = root / "pairs" / side / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(image))
    source = FolderPairs(lq_dir=root / "pairs" / "blur", gt_dir=root / "pairs" / "sharp")
    return make_store(source, root / "store", crop_px=None, split="test")
