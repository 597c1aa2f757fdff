"""Post-training quantisation to int8: which convolutions round, and on what grids.

    ranges = calibrate(model, patches)                  # of every convolution, on real patches
    quantized = quantize(model, ranges)                 # an ordinary NAFNet, whose configuration says so

In torch the result computes what int8 arithmetic computes, in floating point: its loss can be scored, and
training goes on from there with the rounding in the forward pass (quantisation-aware training). Exported, it
is int8 in earnest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from nafnet_core.int8 import Int8, grid, on_grid
from nafnet_core.model import NAFNet

Ranges = dict[str, Tensor]
"""Of convolutions by name: (2, 2) fp32, lowest and highest value of the input, and of the output."""

_NUM_VALUES = 8192  # kept of each map
_SHARES = tuple(share / 40 for share in range(12, 41))  # of the whole range: what is tried


@torch.inference_mode()
def calibrate(model: NAFNet, batches: Iterable[Tensor], *, seed: int = 0) -> Ranges:
    """Find the grids of every convolution: of least squared error on what it is given and makes.

    To cut the few largest values costs less than coarse steps for all others (Choukroun et al. 2019, "Low-bit
    Quantization of Neural Networks for Efficient Inference", section 3): `mobile-v1` lost 0.06 dB on photos
    that it was not calibrated on, and 0.14 dB with the whole range of what was seen.

    Args:
        model: the network, in eval mode, of which nothing is quantised; it is left as it is.
        batches: (N, 3, H, W) float in 0…1, blurred.
        seed: of the choice of values that the error is taken on.

    Raises:
        ValueError: there are no batches.
    """
    generator = torch.Generator().manual_seed(seed)
    with _observed(model, generator) as observers:
        for lq in batches:
            model(lq)
    if not all(observer.kept for observer in observers.values()):
        raise ValueError("no patches to calibrate on")
    return {name: observer.found() for name, observer in observers.items()}


def quantize(model: NAFNet, ranges: Mapping[str, Tensor]) -> NAFNet:
    """The same network, with some of its convolutions on grids of 8 bits.

    Args:
        model: the network; it is left as it is.
        ranges: of the convolutions that round, by name.

    Returns:
        A network of its own, in eval mode on the CPU in fp32. `config.int8_layers` says which do.
    """
    names = tuple(name for name in model.convolutions if name in ranges)
    state = {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    state |= {f"{name}.int8.ranges": ranges[name] for name in names}
    quantized = NAFNet(replace(model.config, int8_layers=names))
    quantized.load_state_dict(state)
    return quantized.eval()


class _Observer(Int8):
    """Stands where grids will be, and rounds nothing."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.ranges.zero_()
        self.kept: list[tuple[Tensor, Tensor]] = []
        self._generator, self._input = generator, torch.empty(0)

    def input(self, x: Tensor) -> Tensor:
        self._input = self._seen(x, 0)
        return x

    def output(self, y: Tensor) -> Tensor:
        self.kept.append((self._input, self._seen(y, 1)))
        return y

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    def found(self) -> Tensor:
        """(2, 2): what suits all that was seen."""
        both = zip(self.ranges, zip(*self.kept, strict=True), strict=True)
        return torch.stack([_best_range(whole, torch.cat(values)) for whole, values in both])

    def _seen(self, x: Tensor, row: int) -> Tensor:
        """Some of the values."""
        values = x.detach().float().flatten().cpu()
        low, high = self.ranges[row]
        self.ranges[row] = torch.stack([torch.minimum(low, values.min()), torch.maximum(high, values.max())])
        if len(values) <= _NUM_VALUES:
            return values
        return values[torch.randint(len(values), (_NUM_VALUES,), generator=self._generator)]


@contextmanager
def _observed(model: NAFNet, generator: torch.Generator) -> Iterator[dict[str, _Observer]]:
    convolutions = model.convolutions
    observers = {name: _Observer(generator) for name in convolutions}
    for name, conv in convolutions.items():
        conv.int8 = observers[name]
    try:
        yield observers
    finally:
        for conv in convolutions.values():
            conv.int8 = None


def _best_range(whole: Tensor, values: Tensor) -> Tensor:
    """(2,): the share of the whole range that leaves the least squared error."""
    tried = [whole * share for share in _SHARES]
    errors = torch.stack([(on_grid(values, *grid(each)) - values).square().mean() for each in tried])
    return tried[int(errors.argmin())]
