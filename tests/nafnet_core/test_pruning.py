from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nafnet_core import NAFNet, NAFNetConfig, load_model, save_model
from nafnet_core.losses import l1, psnr_loss
from nafnet_core.pruning import gather, keep_share, keep_within_macs, magnitudes, prune
from tests.nafnet_core.networks import DEEP, HOLLOW, SMALL, assert_network_acts, lively_network, photo_nchw


def _pairs(number: int = 6, side: int = 48) -> list[tuple[Tensor, Tensor]]:
    """Corners of a photo, and the same made darker: something to lose."""
    whole = photo_nchw(512, 512)
    corners = [(40 * index, 31 * index) for index in range(number)]
    patches = [whole[..., top : top + side, left : left + side] for top, left in corners]
    return [(patch, patch.square()) for patch in patches]


def _without(model: NAFNet, kept: list[Tensor]) -> NAFNet:
    """The whole network, of which nothing reads the channels that are not kept."""
    copy = NAFNet(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for block, first, second in zip(copy.blocks, kept[::2], kept[1::2], strict=True):
            for reader, stays in ((block.sca[1], first), (block.conv3, first), (block.conv5, second)):
                mask = torch.zeros(reader.in_channels)
                mask[stays] = 1
                reader.weight.mul_(mask[:, None, None])
    return copy


@pytest.mark.parametrize("config", [SMALL, DEEP, HOLLOW], ids=["small", "deep", "hollow"])
@pytest.mark.parametrize("size", [(64, 48), (37, 53)])
def test_a_pruned_network_is_the_whole_without_the_channels_that_left(
    config: NAFNetConfig, size: tuple[int, int]
) -> None:
    model = lively_network(config)
    kept = keep_share(magnitudes(model), 0.6, multiple=1)
    pruned = prune(model, kept)
    lq = photo_nchw(*size)
    assert_network_acts(pruned, lq)
    with torch.no_grad():
        assert (pruned(lq) - model(lq)).abs().max() > 1e-3  # it is another network
        torch.testing.assert_close(pruned(lq), _without(model, kept)(lq), atol=2e-6, rtol=0)
    assert pruned.num_parameters < model.num_parameters
    assert pruned.config.num_macs(64, 64) < 0.75 * model.config.num_macs(64, 64)


def test_a_pruned_network_is_an_ordinary_weights_file(tmp_path: Path) -> None:
    model = lively_network(SMALL)
    scores = magnitudes(model)
    pruned = prune(model, keep_within_macs(SMALL, scores, 0.7, multiple=2))
    assert len(set(pruned.config.dw_channels or ())) > 1  # blocks differ
    save_model(pruned, tmp_path / "pruned.safetensors", metadata={"train_patch_px": 64})
    loaded, metadata = load_model(tmp_path / "pruned.safetensors")
    assert loaded.config == pruned.config == NAFNetConfig(**metadata["config"])
    lq = photo_nchw(40, 56)
    with torch.no_grad():
        assert torch.equal(loaded(lq), pruned(lq))


def test_the_same_share_everywhere_is_no_more_than_another_expansion(tmp_path: Path) -> None:
    model = lively_network(SMALL)
    pruned = prune(model, keep_share(magnitudes(model), 0.5, multiple=1))
    save_model(pruned, tmp_path / "pruned.safetensors", metadata={})
    config = load_model(tmp_path / "pruned.safetensors")[0].config
    assert (config.dw_expand, config.ffn_expand, config.dw_channels) == (1, 1, None)
    assert config.gated_channels() == pruned.config.gated_channels()


@pytest.mark.parametrize("index", [0, 3, 9])
def test_taylor_is_the_square_of_what_a_factor_on_the_channel_does(index: int) -> None:
    model = lively_network(SMALL).double()
    pairs = [(lq.double(), gt.double()) for lq, gt in _pairs(3)]
    taylor = gather(model, pairs, l1).taylor
    block, step, channel = model.blocks[index // 2], 1e-5, 2
    reader = block.conv5 if index % 2 else block.conv3
    squares = []
    with torch.no_grad():
        for lq, gt in pairs:
            losses = []
            for factor in (1 + step, 1 - step):
                before = reader.weight[:, channel].clone()
                reader.weight[:, channel] *= factor
                losses.append(l1(model(lq), gt).item())
                reader.weight[:, channel] = before
            squares.append(((losses[0] - losses[1]) / (2 * step)) ** 2)
    assert taylor[index][channel].item() == pytest.approx(sum(squares) / len(squares), rel=1e-3)


def test_batches_are_taken_as_their_images() -> None:
    model = lively_network(SMALL)
    pairs = _pairs(4)
    together = gather(model, [tuple(torch.cat(side) for side in zip(*pairs, strict=True))], psnr_loss)  # type: ignore[list-item]
    alone = gather(model, pairs, psnr_loss)
    for first, second in zip(together.taylor, alone.taylor, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-9)
    for name, moment in alone.moments.items():
        torch.testing.assert_close(together.moments[name], moment, rtol=1e-5, atol=1e-7)
        assert moment[-1, -1].item() == pytest.approx(1)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="no pairs"):
        gather(model, [], psnr_loss)


def test_a_channel_that_another_repeats_is_not_missed() -> None:
    model = lively_network(SMALL)
    lq = photo_nchw(48, 48)
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.conv1, block.conv2, block.conv4):
                half = layer.out_channels // 2
                for first in (0, half):
                    layer.weight[first + 1] = layer.weight[first]
                    layer.bias[first + 1] = layer.bias[first]
            # Their factors too: 0 and 1 are the same channel in all but what reads it.
            block.sca[1].weight[1], block.sca[1].bias[1] = block.sca[1].weight[0], block.sca[1].bias[0]
    evidence = gather(model, _pairs(), psnr_loss)
    kept = [torch.cat([torch.tensor([0]), torch.arange(2, len(gate))]) for gate in evidence.taylor]
    with torch.no_grad():
        whole = model(lq)
        plain = (prune(model, kept)(lq) - whole).abs().mean()
        fitted = (prune(model, kept, evidence)(lq) - whole).abs().mean()
    assert fitted < 0.02 * plain


def test_evidence_loses_less_than_magnitudes_alone() -> None:
    model = lively_network(SMALL)
    pairs = _pairs(8)
    evidence = gather(model, pairs, psnr_loss)
    lq = photo_nchw(96, 64)
    with torch.no_grad():
        whole = model(lq)
        errors = {
            name: (prune(model, keep_share(scores, 0.75, multiple=1), fitted_to)(lq) - whole).square().mean()
            for name, scores, fitted_to in (
                ("magnitude", magnitudes(model), None),
                ("fitted", magnitudes(model), evidence),
                ("taylor", evidence.taylor, evidence),
            )
        }
    assert errors["fitted"] < 0.6 * errors["magnitude"]
    assert errors["taylor"] < 0.6 * errors["magnitude"]


def test_a_budget_takes_the_cheapest_channels_of_all_gates() -> None:
    model = lively_network(SMALL)
    scores = [
        torch.full((width,), float(index + 1))
        for index, gate in enumerate(magnitudes(model))
        for width in [len(gate)]
    ]
    scores[4] *= 1e-6  # one gate whose channels are worth next to nothing
    kept = keep_within_macs(SMALL, scores, 0.95, multiple=4)
    assert len(kept[4]) == 4
    sizes = [len(gate) for gate in kept]
    pruned = prune(model, kept)
    share = pruned.config.num_macs(64, 64) / SMALL.num_macs(64, 64)
    assert 0.9 < share <= 0.95
    assert all(size % 4 == 0 for size in sizes)
    with pytest.raises(ValueError, match=r"at least 0\.\d+ of the multiply-accumulates stay"):
        keep_within_macs(SMALL, scores, 0.05)


def test_widths_suit_vector_units() -> None:
    scores = [torch.arange(float(size)) for size in (64, 60, 16, 8, 4)]
    kept = keep_share(scores, 0.8)
    assert [len(gate) for gate in kept] == [48, 48, 16, 8, 4]
    assert kept[0].tolist() == list(range(16, 64))
    with pytest.raises(ValueError, match="share"):
        keep_share(scores, 0.0)
