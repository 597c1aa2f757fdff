"""Muon against torch's own, which takes one matrix at a time; AdamW against torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nafnet_core.model import NAFNet
from nafnet_core.optim import MuonAdamW, orthogonalized
from tests.nafnet_core.networks import SMALL, lively_network

_LR, _BETAS, _DECAY, _NUM_STEPS = 0.01, (0.9, 0.99), 0.1, 3


def _gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        # In the parameter's strides, as autograd gives them: the fused AdamW takes no other ones.
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def _takes_muon(name: str, parameter: Tensor) -> bool:
    # As the docstring says: what mixes channels, but for the image's own.
    is_depthwise = name.endswith("conv2.weight")
    return parameter.dim() == 4 and parameter.shape[0] > 1 and not (
        is_depthwise or name.startswith(("intro", "ending"))
    )  # fmt: skip


def test_it_is_torchs_muon_and_torchs_adamw() -> None:
    ours = lively_network(SMALL)
    theirs = copy.deepcopy(ours)
    optimizer = MuonAdamW(
        ours.named_parameters(), lr=_LR, betas=_BETAS, weight_decay=_DECAY, dtype=torch.bfloat16
    )
    matrices = {
        name: nn.Parameter(parameter.detach().flatten(1).clone())
        for name, parameter in theirs.named_parameters()
        if _takes_muon(name, parameter)
    }
    others = [parameter for name, parameter in theirs.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(matrices.values(), lr=_LR, weight_decay=_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=_LR, betas=_BETAS, weight_decay=_DECAY)
    assert len(matrices) == 5 * 8 + 2 * 2  # 5 a block, one on each way down and up
    for step in range(_NUM_STEPS):
        _gradients(ours, step)
        _gradients(theirs, step)
        for name, parameter in theirs.named_parameters():
            if name in matrices:
                assert parameter.grad is not None
                matrices[name].grad = parameter.grad.flatten(1)
        optimizer.step()
        muon.step()
        adamw.step()
    expected = {name: parameter.detach() for name, parameter in theirs.named_parameters()} | matrices
    for name, parameter in ours.named_parameters():
        # bf16 keeps 8 bits of a step of at most 0.2 √16 learning rates.
        tolerance = 0.05 * _LR * _NUM_STEPS if name in matrices else 1e-6
        difference = (parameter.detach().flatten() - expected[name].detach().flatten()).abs().max()
        assert difference < tolerance, name


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 4), (2, 4, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalized(matrices, num_iterations=8)
    turned = left.mT @ result @ right.mT
    assert values.min() < 0.5 or values.max() > 2, "these were near one before"
    singular = turned.diagonal(dim1=1, dim2=2)
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert (turned - torch.diag_embed(singular)).abs().max() < 1e-6, "the directions stay"


def test_a_matrix_of_zeros_stays_finite() -> None:
    assert torch.equal(orthogonalized(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_parameters_without_gradients_stay() -> None:
    model = NAFNet(SMALL)
    optimizer = MuonAdamW(model.named_parameters(), lr=_LR)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_rate_of_the_groups_is_that_of_both_parts() -> None:
    model = lively_network(SMALL)
    optimizer = MuonAdamW(model.named_parameters(), lr=_LR)
    _gradients(model, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
