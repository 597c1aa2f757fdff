"""Structured pruning: channels behind a block's two gates leave, with all that makes and reads them.

    evidence = gather(model, batches, loss)                     # what each channel is worth, on real pairs
    kept = keep_share(evidence.taylor, 0.8)                     # or keep_within_macs(…)
    pruned = prune(model, kept, evidence)                       # an ordinary, narrower NAFNet

A channel behind the first gate is the product of two channels of `conv1` and `conv2`, one from either half;
channel attention averages and scales it, and `conv3` reads it. One behind the second gate is the product of
two channels of `conv4`, and `conv5` reads it. All of these leave together, so the halves stay in step. The
stream between blocks, on which the residual scales act, keeps its width: skips tie it to the whole network.

What read the channels that left is fitted anew to those that stay, by least squares on the same pairs
(He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nafnet_core.losses import Loss
from nafnet_core.model import NAFNet, NAFNetConfig

Gates = list[Tensor]
"""Something of each gate: the first of a block, then its second, blocks in the order of the forward pass."""

_ATTENTION = "sca.1"
_READERS = (f".{_ATTENTION}", ".conv3", ".conv5")
_RIDGE = 1e-3  # of the mean second moment: some hundred means decide little about as many channels


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What pairs tell of the channels."""

    taylor: Gates
    """(C,) fp32 each: mean over the pairs of (∂loss/∂m)², m being a factor of 1 on the channel (Molchanov et
    al. 2019, "Importance Estimation for Neural Network Pruning", equation 8, for a gate). Comparable between
    gates."""
    moments: dict[str, Tensor]
    """Of each convolution that reads gated channels, by name: (C + 1, C + 1) fp64, the mean of y yᵀ over
    pixels, y being its input and a 1."""


def gather(model: NAFNet, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss) -> Evidence:
    """Run pairs forward and backward.

    Args:
        model: the network, in eval mode; its gradients are left as they are.
        batches: (N, 3, H, W) float in 0…1, blurred and sharp.
        loss: of `nafnet_core.losses`.

    Raises:
        ValueError: there are no pairs.
    """
    readers = {name: module for name, module in model.named_modules() if name.endswith(_READERS)}
    sizes = {name: int(module.in_channels) for name, module in readers.items()}  # type: ignore[arg-type]
    moments = {name: torch.zeros(size + 1, size + 1, dtype=torch.float64) for name, size in sizes.items()}
    gate_readers = _gate_readers(model)
    squares = {name: torch.zeros(sizes[name]) for name in gate_readers}
    masks: dict[str, Tensor] = {}
    num_pairs = 0

    def watch(name: str, y: Tensor) -> Tensor | None:
        flat = y.detach().flatten(0, -2).double().cpu()
        flat = torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
        moments[name] += flat.T @ flat * (len(y) / len(flat))
        if name not in squares:
            return None
        # A factor for each image: its gradient is that image's own.
        masks[name] = y.new_ones(len(y), 1, 1, y.shape[-1], requires_grad=True)
        return y * masks[name]

    with _watched(readers, watch), torch.enable_grad():
        for lq, gt in batches:
            gradients = torch.autograd.grad(loss(model(lq), gt).sum(), [masks[name] for name in gate_readers])
            for name, gradient in zip(gate_readers, gradients, strict=True):
                squares[name] += gradient.flatten(1).square().sum(dim=0).cpu()
            num_pairs += len(lq)
    if num_pairs == 0:
        raise ValueError("no pairs to measure on")
    return Evidence(
        taylor=[squares[name] / num_pairs for name in gate_readers],
        moments={name: moment / num_pairs for name, moment in moments.items()},
    )


def magnitudes(model: NAFNet) -> Gates:
    """(C,) fp32 for each gate: the product of the norms of all weights that make and read a channel.

    It stays the same where one of them is made larger and another smaller, which leaves the network as it
    was. Divided by the gate's mean, for the weights of one block say nothing about those of another.
    """
    gates = []
    for block in model.blocks:
        beta, gamma = block.beta.flatten(), block.gamma.flatten()
        made = _norms(block.conv1.weight) * _norms(block.conv2.weight)
        read = _norms((block.conv3.weight.flatten(1) * beta[:, None]).T)
        gates.append(_halves_product(made) * read)
        read = _norms((block.conv5.weight.flatten(1) * gamma[:, None]).T)
        gates.append(_halves_product(_norms(block.conv4.weight)) * read)
    return [scores / scores.mean().clamp_min(1e-30) for scores in gates]


def keep_share(scores: Gates, share: float, *, multiple: int = 8) -> Gates:
    """The best channels of each gate, the same share everywhere.

    Args:
        scores: (C,) each, more is better.
        share: 0…1, what stays.
        multiple: channels that stay are rounded to a multiple of this, which vector units want, and are at
            least as many; a gate of fewer keeps all.

    Returns:
        Indices of what stays, in ascending order.

    Raises:
        ValueError: a share outside 0…1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected a share in 0…1, got {share}")
    return [_best(gate, max(multiple, round(len(gate) * share / multiple) * multiple)) for gate in scores]


def keep_within_macs(config: NAFNetConfig, scores: Gates, share: float, *, multiple: int = 8) -> Gates:
    """The channels whose loss is cheapest leave, whichever gate they are behind, until a budget is met.

    Args:
        config: the network's.
        scores: (C,) each, comparable between gates.
        share: 0…1, of the multiply-accumulates that the whole network takes.
        multiple: channels leave in groups, so that what stays is a multiple of this, and at least as many.

    Returns:
        Indices of what stays, in ascending order.

    Raises:
        ValueError: a budget that cannot be met: the rest of the network takes more.
    """
    sizes = [len(gate) for gate in scores]
    ordered = [gate.sort().values.double() for gate in scores]
    side = config.stride_px * 8
    target = config.num_macs(side, side) * share

    def macs(sizes: Sequence[int]) -> int:
        return _with_gates(config, sizes).num_macs(side, side)

    def cheapest() -> int | None:
        """The gate whose next group is worth least a multiply-accumulate; None where all are at the end."""
        now, worth = macs(sizes), {}
        for index, size in enumerate(sizes):
            fewer = (size - 1) // multiple * multiple
            if fewer >= multiple:
                gone = len(ordered[index]) - size
                lost = float(ordered[index][gone : gone + size - fewer].sum())
                worth[index] = lost / (now - macs([*sizes[:index], fewer, *sizes[index + 1 :]]))
        return min(worth, key=worth.__getitem__) if worth else None

    while macs(sizes) > target:
        index = cheapest()
        if index is None:
            least = macs(sizes) / config.num_macs(side, side)
            raise ValueError(f"at least {least:.2f} of the multiply-accumulates stay, not {share}")
        sizes[index] = (sizes[index] - 1) // multiple * multiple
    return [_best(gate, size) for gate, size in zip(scores, sizes, strict=True)]


def prune(model: NAFNet, kept: Gates, evidence: Evidence | None = None) -> NAFNet:
    """The same network without the channels that are not kept.

    Args:
        model: the network; it is left as it is.
        kept: indices of what stays, ascending, of each gate.
        evidence: to fit the convolutions that read the channels to what stays; None leaves their weights.

    Returns:
        A network of its own, in eval mode on the CPU in fp32. `config.dw_channels` and `config.ffn_channels`
        say its widths.
    """
    state = {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    names = [name.removesuffix(".conv3") for name in _gate_readers(model)[::2]]
    for block, first, second in zip(names, kept[::2], kept[1::2], strict=True):
        for made, stays in (("conv1", first), ("conv2", first), ("conv4", second)):
            weight, bias = f"{block}.{made}.weight", f"{block}.{made}.bias"
            both = torch.cat([stays, stays + len(state[bias]) // 2])
            state[weight], state[bias] = state[weight][both], state[bias][both]
        for read, stays in ((_ATTENTION, first), ("conv3", first), ("conv5", second)):
            name = f"{block}.{read}"
            moment = None if evidence is None else evidence.moments[name]
            weight, bias = _fitted(state[f"{name}.weight"], state[f"{name}.bias"], stays, moment)
            if read == _ATTENTION:  # of as many outputs as inputs
                weight, bias = weight[stays], bias[stays]
            state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
    pruned = NAFNet(_with_gates(model.config, [len(stays) for stays in kept]))
    pruned.load_state_dict(state)
    return pruned.eval()


def _gate_readers(model: NAFNet) -> list[str]:
    """Names of `conv3` and `conv5` of each block, in the order of the forward pass."""
    names = {module: name for name, module in model.named_modules()}
    return [f"{names[block]}.{reader}" for block in model.blocks for reader in ("conv3", "conv5")]


@contextmanager
def _watched(
    modules: Mapping[str, nn.Module], watch: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Show `watch` what each module is given; what it returns goes in instead."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = watch(name, args[0])
            return None if changed is None else (changed, *args[1:])

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norms(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).norm(dim=1).cpu()


def _halves_product(values: Tensor) -> Tensor:
    first, second = values.chunk(2)
    return first * second


def _best(scores: Tensor, number: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:number].sort().values


def _with_gates(config: NAFNetConfig, sizes: Sequence[int]) -> NAFNetConfig:
    return replace(config, dw_channels=tuple(sizes[::2]), ffn_channels=tuple(sizes[1::2]))


def _fitted(weight: Tensor, bias: Tensor, stays: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """A 1×1 convolution of the channels that stay, and what it takes from them in place of those that left.

    The change of its weights is what least squares gives for the part that left; a ridge holds the change
    down where the pairs say little.
    """
    size, matrix = weight.shape[1], weight.flatten(1)
    left = torch.ones(size, dtype=torch.bool).index_fill_(0, stays, False).nonzero().flatten()
    kept = matrix[:, stays]
    if moment is not None and len(left):
        with_constant = torch.cat([stays, torch.tensor([size])])
        normal = moment[with_constant][:, with_constant]
        ridge = _RIDGE * normal.diagonal()[:-1].mean()
        normal = normal + torch.diag(torch.cat([ridge.expand(len(stays)), ridge.new_zeros(1)]))
        lost = matrix[:, left].double() @ moment[left][:, with_constant]
        change = torch.linalg.solve(normal, lost.T).T.float()
        kept, bias = kept + change[:, :-1], bias + change[:, -1]
    return kept[..., None, None], bias
