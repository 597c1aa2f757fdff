"""What users otherwise run: a plain NAFNet, and spandrel's, with the usual local pool."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from nafnet_core import NAFNetConfig
from tests.reference import ReferenceNAFNet


class IntegralPool(nn.Module):
    """Local mean from an integral image in the map's own dtype, replicated to its size: the usual way."""

    def __init__(self, window_px: int) -> None:
        super().__init__()
        self.window_px = window_px

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows, cols = min(self.window_px, height), min(self.window_px, width)
        if (rows, cols) == (height, width):  # as the official one: a window that covers the map is no window
            return x.mean(dim=(-2, -1), keepdim=True)
        sums = F.pad(x.cumsum(dim=-1).cumsum(dim=-2), (1, 0, 1, 0))
        means = (
            sums[:, :, rows:, cols:]
            - sums[:, :, :-rows, cols:]
            - sums[:, :, rows:, :-cols]
            + sums[:, :, :-rows, :-cols]
        ) / (rows * cols)
        top, left = (rows - 1) // 2, (cols - 1) // 2
        return F.pad(means, (left, cols - 1 - left, top, rows - 1 - top), mode="replicate")


def plain(config: NAFNetConfig) -> nn.Module:
    """NCHW, eager, a layer norm with a hand-written backward pass."""
    return ReferenceNAFNet(**config.to_dict())  # type: ignore[arg-type]


def spandrel(config: NAFNetConfig) -> nn.Module | None:
    """spandrel's network, without its package, which wants torchvision; None where it is not installed.

    `pip install --no-deps spandrel` puts the file there.
    """
    found = importlib.util.find_spec("spandrel")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "architectures" / "NAFNet" / "__arch"
    util = types.ModuleType("spandrel.util")
    util.store_hyperparameters = lambda **_: lambda kind: kind  # type: ignore[attr-defined]
    package = types.ModuleType("peer")
    package.__path__ = [str(folder)]
    sys.modules.update({"spandrel.util": util, "peer": package})
    spec = importlib.util.spec_from_file_location("peer.NAFNet_arch", folder / "NAFNet_arch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["spandrel.util"]
    return module.NAFNet(
        img_channel=config.img_channel,
        width=config.width,
        middle_blk_num=config.middle_blk_num,
        enc_blk_nums=list(config.enc_blk_nums),
        dec_blk_nums=list(config.dec_blk_nums),
    )


def localize(model: nn.Module, train_patch_px: int) -> None:
    """Give every attention of a peer a local pool, as the official `NAFNetLocal` does."""
    levels = len(model.encoders)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if name.endswith(".sca"):
            part, _, rest = name.partition(".")
            stage = int(rest.split(".", 1)[0])
            level = {"encoders": stage, "middle_blks": levels, "decoders": levels - 1 - stage}[part]
            module[0] = IntegralPool(int(1.5 * train_patch_px) // 2**level)  # type: ignore[operator]


def load_weights(peer: nn.Module, ours: nn.Module) -> nn.Module:
    """The same weights in both."""
    peer.load_state_dict(ours.state_dict())
    return peer.to(next(ours.parameters()).device)
