from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nafnet_core import InputError, NAFNet, NAFNetConfig, load_model, save_model
from nafnet_core.exportable import Exportable
from nafnet_core.int8 import Int8, grid, on_grid, weight_steps
from nafnet_core.losses import l1
from nafnet_core.model import Conv
from nafnet_core.quantization import Ranges, calibrate, quantize
from nafnet_core.strips import convolutions_in_bf16, forward_in_strips
from tests.nafnet_core.networks import DEEP, HOLLOW, SMALL, assert_network_acts, lively_network, photo_nchw


def _patches(number: int = 6, side: int = 64) -> list[Tensor]:
    whole = photo_nchw(512, 512)
    corners = [(40 * index, 31 * index) for index in range(number)]
    return [whole[..., top : top + side, left : left + side] for top, left in corners]


def _psnr_db(first: Tensor, second: Tensor) -> float:
    return -10 * float((first - second).square().mean().log10())


def test_values_go_to_the_nearest_of_256_steps() -> None:
    step, zero = grid(torch.tensor([-0.5, 1.0]))
    steps = (torch.arange(256) - zero) * step
    x = torch.linspace(-1, 2, 4001)
    rounded = on_grid(x, step, zero)
    nearest = steps[(x[:, None] - steps).abs().argmin(dim=1)]
    assert torch.allclose(rounded, nearest, atol=float(step) * 1.001)  # a tie goes to either side
    assert ((rounded - nearest).abs() > 1e-6).float().mean() < 0.01
    assert on_grid(torch.zeros(1), step, zero) == 0  # as around a map
    assert steps[0] == pytest.approx(-0.5, abs=float(step)) and steps[-1] == pytest.approx(1, abs=float(step))
    assert on_grid(x.bfloat16(), step, zero).dtype == torch.bfloat16


def test_a_grid_of_nothing_is_no_division_by_zero() -> None:
    assert torch.equal(on_grid(torch.zeros(3), *grid(torch.zeros(2))), torch.zeros(3))


@pytest.mark.parametrize("groups", [1, 8])
def test_a_convolution_computes_what_whole_numbers_do(groups: int) -> None:
    torch.manual_seed(0)
    conv, x = Conv(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 9, 11)
    conv.int8 = Int8()
    conv.int8.ranges.copy_(torch.tensor([[-2.0, 3.0], [-1.5, 2.5]]))
    (step, zero), (step_out, zero_out) = (grid(row) for row in conv.int8.ranges)
    steps = weight_steps(conv.weight)

    numbers = (x / step).round().add(zero).clamp(0, 255).long() - zero
    weights = (conv.weight / steps[:, None, None, None]).round().long()
    assert weights.abs().max() == 127
    sums = F.conv2d(numbers.double(), weights.double(), padding=1, groups=groups)  # exact
    values = sums * (step * steps)[:, None, None] + conv.bias[:, None, None]  # type: ignore[index]
    expected = ((values / step_out).round().add(zero_out).clamp(0, 255) - zero_out) * step_out
    with torch.no_grad():
        made = conv(x)
    assert (made - expected).abs().max() <= step_out * 1.001  # a value between two steps
    assert ((made - expected).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("config", [SMALL, DEEP, HOLLOW], ids=["small", "deep", "hollow"])
def test_a_calibrated_network_is_close_to_the_whole(config: NAFNetConfig) -> None:
    model, lq = lively_network(config), photo_nchw(96, 80)
    before = model(lq)
    quantized = quantize(model, calibrate(model, _patches()))
    assert_network_acts(quantized, lq)
    with torch.no_grad():
        assert torch.equal(model(lq), before)  # nothing stays behind
        made = quantized(lq)
        assert (made - before).abs().max() > 1e-3
        assert _psnr_db(made, before) > 30
        # Eight bits are no accident: with ranges ten times as wide there is little left.
        coarse = {name: 10 * values for name, values in calibrate(model, _patches()).items()}
        assert _psnr_db(quantize(model, coarse)(lq), before) < _psnr_db(made, before) - 10


def test_some_convolutions_alone() -> None:
    model, lq = lively_network(SMALL), photo_nchw(64, 64)
    ranges = calibrate(model, _patches())
    names = ["encoders.1.0.conv2", "ending"]
    quantized = quantize(model, {name: ranges[name] for name in names})
    assert set(quantized.config.int8_layers or ()) == set(names)
    assert {name for name, conv in quantized.convolutions.items() if conv.int8 is not None} == set(names)
    inside: dict[str, Tensor] = {}
    quantized.ending.register_forward_hook(lambda module, args, made: inside.update(made=made))
    with torch.no_grad():
        quantized(lq)
    assert len(inside["made"].unique()) <= 256
    assert quantize(model, {}).config.int8_layers == ()


def test_rare_values_are_cut_for_finer_steps() -> None:
    torch.manual_seed(0)
    model, lq = lively_network(SMALL), torch.distributions.Laplace(0.0, 1.0).sample((1, 3, 52, 52))
    ranges = calibrate(model, [lq])
    assert set(ranges) == set(model.convolutions)
    found, whole = ranges["intro"][0], torch.stack([lq.min(), lq.max()])
    assert (found.abs() < 0.99 * whole.abs()).all()
    errors = [(on_grid(lq, *grid(each)) - lq).square().mean() for each in (found, whole)]
    assert errors[0] < errors[1]


def test_zero_is_on_every_grid() -> None:
    ranges = calibrate(lively_network(SMALL), [0.5 + 0.5 * patch for patch in _patches(2)])
    assert ranges["intro"][0, 0] == 0 < ranges["intro"][0, 1]  # no pixel was black; zero stands around them


def test_nothing_to_calibrate_on() -> None:
    model = lively_network(SMALL)
    with pytest.raises(ValueError, match="no patches"):
        calibrate(model, [])
    assert all(conv.int8 is None for conv in model.convolutions.values())


@pytest.fixture(scope="module")
def ranges() -> Ranges:
    return calibrate(lively_network(SMALL), _patches())


def test_it_is_an_ordinary_weights_file(tmp_path: Path, ranges: Ranges) -> None:
    quantized = quantize(lively_network(SMALL), {name: ranges[name] for name in list(ranges)[2:]})
    save_model(quantized, tmp_path / "int8.safetensors", metadata={})
    loaded, metadata = load_model(tmp_path / "int8.safetensors")
    assert NAFNetConfig(**metadata["config"]) == quantized.config
    assert set(loaded.config.int8_layers or ()) == set(list(ranges)[2:])
    lq = photo_nchw(40, 56)
    with torch.no_grad():
        assert torch.equal(loaded(lq), quantized(lq))


def test_grids_of_what_is_no_convolution_are_refused(tmp_path: Path) -> None:
    model = lively_network(SMALL)
    save_model(model, tmp_path / "fine.safetensors", metadata={})
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "fine.safetensors")
    state["middle_blks.0.norm1.int8.ranges"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "strange.safetensors")
    with pytest.raises(InputError, match=r"not a NAFNet checkpoint.*middle_blks\.0\.norm1"):
        load_model(tmp_path / "strange.safetensors")


def test_strips_round_alike(ranges: Ranges) -> None:
    quantized = quantize(lively_network(SMALL), ranges)
    lq = photo_nchw(200, 120)
    with torch.no_grad():
        whole = quantized(lq)
        assert _psnr_db(forward_in_strips(quantized, lq), whole) > 45  # a value between two steps goes on


def test_grids_stay_in_fp32_beside_convolutions_in_bf16(ranges: Ranges) -> None:
    quantized = quantize(lively_network(SMALL), ranges)
    (lq,) = _patches(1)
    half = convolutions_in_bf16(quantized)
    grids = [conv.int8.ranges for conv in half.convolutions.values() if conv.int8 is not None]
    assert len(grids) == len(ranges) and all(each.dtype == torch.float32 for each in grids)
    assert _psnr_db(forward_in_strips(half, lq), forward_in_strips(quantized, lq)) > 40


@pytest.mark.parametrize("train_patch_px", [None, 32])
def test_the_graph_rounds_alike(ranges: Ranges, train_patch_px: int | None) -> None:
    from nafnet_core.local_stats import local_statistics

    quantized = quantize(lively_network(SMALL), ranges)
    lq = photo_nchw(57, 66)
    with torch.no_grad(), local_statistics(quantized, train_patch_px):
        made = Exportable(quantized, train_patch_px=train_patch_px)(lq)
        assert _psnr_db(made, quantized(lq)) > 45


def test_training_goes_through_the_rounding(ranges: Ranges) -> None:
    model = lively_network(SMALL)
    quantized = quantize(model, ranges).train()
    lq, gt = _patches(1)[0], _patches(1)[0].square()
    gradients = []
    for network in (model, quantized):
        network.zero_grad()
        l1(network(lq), gt).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))  # type: ignore[union-attr]
    assert F.cosine_similarity(*gradients, dim=0) > 0.9
    optimizer = torch.optim.Adam(quantized.parameters(), lr=1e-3)
    before = l1(quantized(lq), gt).item()
    for _ in range(20):
        optimizer.zero_grad()
        l1(quantized(lq), gt).backward()
        optimizer.step()
    assert l1(quantized(lq), gt).item() < 0.8 * before


def test_a_name_of_no_convolution() -> None:
    with pytest.raises(ValueError, match="no convolutions of this network: middle"):
        NAFNet(replace(SMALL, int8_layers=("intro", "middle")))
