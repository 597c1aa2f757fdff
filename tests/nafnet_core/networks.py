"""Small networks and inputs on which a wrong computation shows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import data
from torch import Tensor

from nafnet_core import NAFNet, NAFNetConfig, randomize_residual_scales
from nafnet_core.model import NAFBlock
from tests.reference import ReferenceNAFNet

SMALL = NAFNetConfig(width=8, enc_blk_nums=(1, 2), middle_blk_num=2, dec_blk_nums=(2, 1))
# As deep as the official networks: tiles and windows must respect a stride of 16 px.
DEEP = NAFNetConfig(width=4, enc_blk_nums=(1, 1, 1, 2), middle_blk_num=1, dec_blk_nums=(1, 1, 1, 1))
# Without blocks at the image's own resolution.
HOLLOW = NAFNetConfig(width=4, enc_blk_nums=(0, 1, 2), middle_blk_num=1, dec_blk_nums=(2, 1, 0))


def lively_network(config: NAFNetConfig, *, seed: int = 0) -> NAFNet:
    """A network whose every part tells in the output.

    Fresh, its blocks are identities, its norms neither scale nor shift, and its attention weights are so
    small that local and global statistics hardly differ: an error in any of these would pass unseen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NAFNet(config).eval()
        randomize_residual_scales(model, seed=seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".norm" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
                if name.endswith(".sca.1.weight"):
                    parameter.mul_(24)
            # The correction of a trained network is a fraction of the image; nothing is clipped then.
            model.ending.weight.mul_(0.3)
            model.ending.bias.zero_()
    return model


def reference_of(model: NAFNet) -> ReferenceNAFNet:
    """The plain implementation with the same weights."""
    reference = ReferenceNAFNet(**model.config.to_dict())  # type: ignore[arg-type]
    reference.load_state_dict(model.state_dict())
    return reference.to(next(model.parameters()).dtype).eval()


def assert_network_acts(model: NAFNet, lq: Tensor, *, at_least: float = 0.01) -> None:
    """Fail unless both the network and its blocks change `lq` noticeably.

    The blocks are asked separately: `intro` and `ending` alone change an image too.
    """
    idle = NAFNet(model.config).to(lq.dtype)
    idle.load_state_dict(
        {
            key: torch.zeros_like(value) if key.endswith(("beta", "gamma")) else value
            for key, value in model.state_dict().items()
        }
    )
    with torch.no_grad():
        restored = model(lq)
        assert (restored - lq).abs().mean() > at_least, "the network leaves its input as it is"
        assert (restored - idle(lq)).abs().mean() > at_least, "the blocks do nothing"


def photo(height: int, width: int) -> NDArray[np.uint8]:
    """A real photo of any size: bright and dark parts, so that local and global statistics differ."""
    astronaut = data.astronaut()
    rows, cols = -(-height // 512), -(-width // 512)
    return np.ascontiguousarray(np.tile(astronaut, (rows, cols, 1))[:height, :width])


def photo_nchw(height: int, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """`photo` as a batch of one in 0…1."""
    return torch.from_numpy(photo(height, width)).permute(2, 0, 1)[None].to(dtype) / 255


def network_that_breaks(image: NDArray[np.uint8], *, only_locally: bool) -> NAFNet:
    """Weights with the failure of NAFNet#83: attention explodes on statistics that training never saw.

    Args:
        image: (H, W, 3). With `only_locally` its own global means are the ones that the network knows: there
            the attention is nothing, anywhere else it is huge.
        only_locally: else attention is huge whatever the statistics.
    """
    model = lively_network(SMALL)
    lq = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        parts = (model.encoders, model.middle_blks, model.decoders)  # as the image goes through them
        for block in (block for part in parts for block in part.modules() if isinstance(block, NAFBlock)):
            pool, linear = block.sca
            seen: list[Tensor] = []
            handle = pool.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
            model(lq)
            handle.remove()
            linear.weight.mul_(40)
            matrix = linear.weight.flatten(1)
            linear.bias.copy_(
                -(matrix @ seen[0].flatten()) if only_locally else torch.full((len(matrix),), 1e4)
            )
    return model
