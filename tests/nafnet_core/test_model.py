from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nafnet_core import PRESETS, NAFNet, NAFNetConfig, randomize_residual_scales
from nafnet_core.model import ChannelLayerNorm, NAFBlock, SimpleGate
from tests.nafnet_core.networks import (
    DEEP,
    HOLLOW,
    SMALL,
    assert_network_acts,
    lively_network,
    photo_nchw,
    reference_of,
)
from tests.reference import ReferenceNAFNet

SIZES = [(64, 64), (50, 70), (127, 129), (1, 1)]
# Unlike the presets in everything that a configuration can change.
UNUSUAL = NAFNetConfig(
    width=6,
    enc_blk_nums=(2, 0, 1),
    middle_blk_num=0,
    dec_blk_nums=(1, 2, 0),
    img_channel=1,
    dw_expand=4,
    ffn_expand=3,
)
NO_STAGES = NAFNetConfig(width=8, enc_blk_nums=(), middle_blk_num=2, dec_blk_nums=())


# Output and gradients


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("config", [SMALL, DEEP, HOLLOW], ids=["small", "deep", "hollow"])
def test_output_is_the_references(config: NAFNetConfig, height: int, width: int) -> None:
    model = lively_network(config)
    lq = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    assert_network_acts(model, lq)
    with torch.no_grad():
        restored = model(lq)
        torch.testing.assert_close(restored, reference_of(model)(lq), rtol=0, atol=1e-5)
    assert restored.shape == lq.shape


@pytest.mark.parametrize("config", [UNUSUAL, NO_STAGES], ids=["unusual", "no stages"])
def test_output_is_the_references_with_an_unusual_shape(config: NAFNetConfig) -> None:
    model = lively_network(config)
    lq = torch.rand(2, config.img_channel, 21, 34, generator=torch.Generator().manual_seed(1))
    assert_network_acts(model, lq)
    with torch.no_grad():
        torch.testing.assert_close(model(lq), reference_of(model)(lq), rtol=0, atol=1e-5)


def test_output_is_the_references_at_width_32() -> None:
    model = lively_network(PRESETS["width32"])
    lq = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert_network_acts(model, lq)
    with torch.no_grad():
        torch.testing.assert_close(model(lq), reference_of(model)(lq), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)
def test_gradients_are_the_references(dtype: torch.dtype, tolerance: float) -> None:
    # fp64 tells a wrong gradient from rounding; fp32 is what training uses.
    model = lively_network(SMALL).to(dtype)
    reference = reference_of(model)
    generator = torch.Generator().manual_seed(1)
    lq = torch.rand(2, 3, 19, 30, generator=generator).to(dtype)
    gt = torch.rand(2, 3, 19, 30, generator=generator).to(dtype)
    assert_network_acts(model, lq)
    ours, theirs = lq.clone().requires_grad_(), lq.clone().requires_grad_()
    (model(ours) - gt).square().sum().backward()
    (reference(theirs) - gt).square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name} does not learn"
        scale = expected[name].grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad,
            expected[name].grad,
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_images_of_a_batch_do_not_meet() -> None:
    model = lively_network(SMALL)
    lq = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    assert_network_acts(model, lq)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in lq])
        torch.testing.assert_close(model(lq), alone, rtol=0, atol=1e-5)


def test_memory_layout_of_the_input_does_not_matter() -> None:
    model = lively_network(SMALL)
    lq = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    assert_network_acts(model, lq)
    with torch.no_grad():
        from_nchw = model(lq)
        from_nhwc = model(lq.contiguous(memory_format=torch.channels_last))
        from_strided = model(lq.flip(3).transpose(2, 3).contiguous().transpose(2, 3).flip(3))
    torch.testing.assert_close(from_nhwc, from_nchw, rtol=0, atol=0)
    torch.testing.assert_close(from_strided, from_nchw, rtol=0, atol=0)


def test_a_fresh_networks_blocks_are_identities() -> None:
    model = NAFNet(SMALL)
    x = torch.rand(1, 8, 12, 12)
    with torch.no_grad():
        for block in model.encoders[0]:
            torch.testing.assert_close(block(x), x, rtol=0, atol=0)


# Precision


def test_bf16_autocast_is_close_to_fp32() -> None:
    model = lively_network(SMALL)
    lq = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert_network_acts(model, lq)
    with torch.no_grad():
        full = model(lq)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(lq).float()
    assert half.ne(full).any(), "autocast did not run in bf16, so that this test says nothing"
    assert (half - full).square().mean().sqrt() < 0.01


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_keeps_bf16_but_takes_statistics_in_fp32(autocast: bool) -> None:
    norm = ChannelLayerNorm(64)
    # A mean far above the spread: sums in bf16, of 8 bits, would lose the spread altogether.
    x = (torch.randn(2, 5, 7, 64, generator=torch.Generator().manual_seed(1)) + 20).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        normed = norm(x)
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed.float(), norm(x.float()), rtol=2**-7, atol=2**-7)


@pytest.mark.gpu
def test_layer_norm_keeps_bf16_under_cuda_autocast() -> None:
    # CUDA's autocast, unlike the CPU's, returns fp32 from `layer_norm`, and every later sum would be fp32.
    x = torch.randn(1, 5, 7, 16, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert ChannelLayerNorm(16).cuda()(x).dtype == torch.bfloat16


@pytest.mark.gpu
def test_output_on_cuda_is_the_references_on_the_cpu() -> None:
    model = lively_network(DEEP)
    lq = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(1))
    assert_network_acts(model, lq)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        expected = reference_of(model)(lq)
        restored = model.cuda()(lq.cuda()).cpu()
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-4)


def test_layer_norm_normalises_the_channels_of_each_pixel() -> None:
    norm = ChannelLayerNorm(6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=generator))
        norm.bias.copy_(torch.randn(6, generator=generator))
        x = 5 * torch.randn(2, 4, 3, 6, generator=generator)
        normed = norm(x).numpy()
    image = x.numpy().astype(np.float64)
    mean, variance = image.mean(axis=-1, keepdims=True), image.var(axis=-1, keepdims=True)
    expected = (image - mean) / np.sqrt(variance + 1e-6)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    expected = expected * weight + bias
    np.testing.assert_allclose(normed, expected, atol=1e-5)


def test_layer_norm_of_flat_channels_is_finite() -> None:
    # A black image gives equal channels: without ε this divides zero by zero.
    normed = ChannelLayerNorm(4)(torch.full((1, 2, 2, 4), 3.0))
    torch.testing.assert_close(normed, torch.zeros_like(normed))


def test_gate_multiplies_the_first_half_by_the_second() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0]).view(1, 1, 1, 6)
    assert SimpleGate()(x).flatten().tolist() == [5.0, 14.0, 33.0]


# Parameters and their names


@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [("width32", 17_111_907), ("width64", 67_888_835), ("mobile", 789_651), ("compact", 780_371)],
)
def test_parameter_count(preset: str, num_parameters: int) -> None:
    with torch.device("meta"):
        model = NAFNet(PRESETS[preset])
        reference = ReferenceNAFNet(**PRESETS[preset].to_dict())  # type: ignore[arg-type]
    assert model.num_parameters == num_parameters
    assert sum(parameter.numel() for parameter in reference.parameters()) == num_parameters


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_keys_and_shapes_are_the_references(preset: str) -> None:
    with torch.device("meta"):
        model = NAFNet(PRESETS[preset])
        reference = ReferenceNAFNet(**PRESETS[preset].to_dict())  # type: ignore[arg-type]
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert ours == {key: value.shape for key, value in reference.state_dict().items()}


def test_keys_are_the_official_ones() -> None:
    # Written out: a wrong name in both implementations would agree with itself.
    block = {"beta", "gamma"} | {
        f"{layer}.{kind}"
        for layer in ("norm1", "norm2", "conv1", "conv2", "conv3", "conv4", "conv5", "sca.1")
        for kind in ("weight", "bias")
    }
    expected = {f"{layer}.{kind}" for layer in ("intro", "ending", "downs.0") for kind in ("weight", "bias")}
    expected |= {"ups.0.0.weight"}
    for place in ("encoders.0.0", "middle_blks.0", "middle_blks.1", "decoders.0.0"):
        expected |= {f"{place}.{key}" for key in block}
    model = NAFNet(NAFNetConfig(width=4, enc_blk_nums=(1,), middle_blk_num=2, dec_blk_nums=(1,)))
    assert set(model.state_dict()) == expected


def test_randomize_residual_scales_draws_only_those_and_from_the_seed() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = NAFNet(SMALL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)
        randomize_residual_scales(model, seed=seed, scale=2.0)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    first, again, other = drawn(1), drawn(1), drawn(2)
    scales = [name for name in first if name.endswith(("beta", "gamma"))]
    assert len(scales) == 2 * 8
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == (name not in scales)
        assert bool((value == 0.25).all()) == (name not in scales)
    everything = torch.cat([first[name].flatten() for name in scales])
    assert everything.std().item() == pytest.approx(2.0, rel=0.15)


def test_randomize_residual_scales_leaves_the_global_generator_alone() -> None:
    model = NAFNet(SMALL)
    before = torch.get_rng_state()
    randomize_residual_scales(model, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_block_has_its_own_scales() -> None:
    model = lively_network(SMALL)
    blocks = [module for module in model.modules() if isinstance(module, NAFBlock)]
    assert len({block.beta.flatten()[0].item() for block in blocks}) == len(blocks) == 8


# Configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_blk_nums": (1,)}, "as many stages"),
        ({"width": 0}, "at least 1"),
        ({"img_channel": 0}, "at least 1"),
        ({"ffn_expand": 0}, "at least 1"),
        ({"dw_expand": -2}, "at least 1"),
        ({"width": 7, "dw_expand": 1}, "even"),
        ({"width": 7, "ffn_expand": 3}, "even"),
        ({"middle_blk_num": -1}, "negative"),
        ({"enc_blk_nums": (1, -1)}, "negative"),
        ({"dec_blk_nums": (-2, 1)}, "negative"),
    ],
)
def test_impossible_configuration_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("config", [*PRESETS.values(), UNUSUAL, NO_STAGES])
def test_configuration_survives_json(config: NAFNetConfig) -> None:
    written = json.loads(json.dumps(config.to_dict()))
    assert NAFNetConfig(**written) == config
    assert hash(NAFNetConfig(**written)) == hash(config)


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.width = 16  # type: ignore[misc]


@pytest.mark.parametrize(("config", "stride"), [(NO_STAGES, 1), (SMALL, 4), (DEEP, 16), (HOLLOW, 8)])
def test_stride_is_the_downsampling(config: NAFNetConfig, stride: int) -> None:
    assert config.stride_px == stride
    model = NAFNet(config)
    seen: list[int] = []
    model.middle_blks.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert seen == [32 // stride]


def test_network_holds_no_buffers() -> None:
    # A buffer would be a key that official checkpoints lack.
    assert not list(NAFNet(SMALL).buffers())


# Cost


@pytest.mark.parametrize(("preset", "paper_gmacs"), [("width32", 16.0), ("width64", 65.0)])
def test_macs_are_the_papers(preset: str, paper_gmacs: float) -> None:
    # Table 6 of Chen et al. 2022, 256×256.
    with torch.device("meta"):
        model = NAFNet(PRESETS[preset])
    assert model.config.num_macs(256, 256) / 1e9 == pytest.approx(paper_gmacs, rel=0.03)


@pytest.mark.parametrize("config", [SMALL, DEEP, HOLLOW, PRESETS["mobile"]])
@pytest.mark.parametrize("size", [(64, 64), (50, 70), (1, 1)])
def test_macs_are_what_torch_counts(config: NAFNetConfig, size: tuple[int, int]) -> None:
    model = NAFNet(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size))
    assert counter.get_total_flops() == 2 * model.config.num_macs(*size)


def test_checkpointed_activations_give_the_same_gradients_for_less_memory() -> None:
    gradients, kept_bytes = [], []
    for checkpoint_activations in (False, True):
        model = lively_network(DEEP).train()
        model.checkpoint_activations = checkpoint_activations
        kept: list[int] = []

        def pack(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(photo_nchw(64, 64)).square().mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept_bytes.append(sum(kept))
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and plain.abs().max() > 0
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)
    assert kept_bytes[1] < kept_bytes[0] / 4
