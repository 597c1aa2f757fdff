"""Muon for the matrices of a network, AdamW for the rest, as one optimiser.

    optimizer = MuonAdamW(model.named_parameters(), lr=2e-3)

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal one. Its length is then set to what AdamW's usually is (Liu et al. 2025, arXiv 2502.16982), so both
parts take one learning rate. `torch.optim.Muon` takes matrices only, one at a time; here 1×1 and 2×2
convolutions are matrices too, and those of one shape go through the iteration together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of x ← a x + b x³ + c x⁵, whose repetition sends all singular values to near 1 (Jordan 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_ADAMW_RMS = 0.2  # typical size of an entry of AdamW's step, in learning rates (Liu et al. 2025, section 2.2)


class MuonAdamW(torch.optim.Optimizer):
    """See the module. State is kept by parameter, in the parameter's shape.

    Args:
        named_parameters: of the network. Muon takes the convolution weights that mix channels, but for the
            first and the last layer, whose one side are the image's colours.
        lr: learning rate of both parts.
        betas, weight_decay: of AdamW; the decay, decoupled, is Muon's too.
        momentum: Muon's, of Nesterov's kind.
        dtype: of Muon's iteration; bf16 is enough (Jordan 2024), and three times as fast where it is native.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        matrices, others = [], []
        for name, parameter in named_parameters:
            (matrices if _is_matrix(name, parameter) else others).append(parameter)
        groups = [{"params": group, "is_muon": group is matrices} for group in (matrices, others) if group]
        super().__init__(
            groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "momentum": momentum}
        )
        self._dtype = dtype
        self._adamw = torch.optim.AdamW(others, betas=betas, weight_decay=weight_decay, fused=True)
        self._adamw.state = self.state  # one state for both, so that one checkpoint holds all of it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            if group["is_muon"]:
                self._muon_step(group)
            else:
                self._adamw.param_groups[0]["lr"] = group["lr"]
                self._adamw.step()

    def _muon_step(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        for (rows, *rest), parameters in by_shape.items():
            cols = math.prod(rest)
            grads = _stacked([parameter.grad for parameter in parameters])
            buffers = [self._buffer(parameter) for parameter in parameters]
            kept = _stacked(buffers).lerp_(grads, 1 - momentum)
            ahead = grads.lerp(kept, momentum).reshape(len(parameters), rows, cols)
            updates = orthogonalized(ahead.to(self._dtype)).to(ahead.dtype)
            size = _ADAMW_RMS * math.sqrt(max(rows, cols))
            for parameter, buffer, value, update in zip(parameters, buffers, kept, updates, strict=True):
                buffer.copy_(value)
                if group["weight_decay"]:
                    parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-lr * size)

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def orthogonalized(matrices: Tensor, *, num_iterations: int = _NUM_ITERATIONS) -> Tensor:
    """Nearly U Vᵀ of each matrix's U S Vᵀ, all singular values between some 0.7 and 1.2: (N, R, C) → same."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([tensor for tensor in tensors if tensor is not None])


def _is_matrix(name: str, parameter: Tensor) -> bool:
    mixes_channels = parameter.dim() >= 2 and min(parameter.shape[:2]) > 1
    return mixes_channels and name.split(".")[0] not in ("intro", "ending")
