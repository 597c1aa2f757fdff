"""A network that another runtime runs, in the place of one in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nafnet_core.model import NAFNet, NAFNetConfig


class ForeignNetwork(nn.Module):
    """What `nafnet_core.tiling` runs like a NAFNet, on the CPU.

    Precision and local statistics are as they were when it was exported.

    Args:
        config: shape of the network that it was made of.
        run: (N, 3, H, W) fp32, RGB in 0…1 → the same, restored.
    """

    def __init__(self, config: NAFNetConfig, run: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        super().__init__()
        self.config, self._run = config, run
        self.in_torch: Callable[[], NAFNet] | None = None
        """The same network, where its weights are at hand: a tile that is broken with local statistics is run
        again without, which no graph can be told to leave out. By a call: as a module it would be a part of
        this one."""

    def forward(self, lq: Tensor) -> Tensor:
        """(N, 3, H, W) fp32 → same shape."""
        return torch.from_numpy(self._run(lq.contiguous().numpy()))
