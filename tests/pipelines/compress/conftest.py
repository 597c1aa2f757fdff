"""A small model and pairs to make it smaller on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nafnet_core import NAFNetConfig, load_model, save_model
from nafnet_core.tiling import restore_image
from pipelines.png import encode_png
from tests.nafnet_core.networks import lively_network
from tests.pipelines.pairs import make_store, piece, write_pairs

CONFIG = NAFNetConfig(width=16, enc_blk_nums=(1, 1), middle_blk_num=1, dec_blk_nums=(1, 1))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pairs")
    source = write_pairs(root / "pairs", [f"scene/{number}" for number in range(4)])
    return str(make_store(source, root / "store").root)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "whole.safetensors"
    save_model(lively_network(CONFIG), path, metadata={"train_patch_px": 64, "name": "whole"})
    return path


@pytest.fixture(scope="module")
def learnt(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store whose sharp side is what `model` makes of the other: whatever changes it loses PSNR there."""
    root = tmp_path_factory.mktemp("learnt")
    source = write_pairs(root / "pairs", [f"scene/{number}" for number in range(4)], height=64, width=64)
    network, _ = load_model(model)
    for number, pair in enumerate(source.pairs()):
        lq = piece(number, 64, 64)
        pair.lq.write_bytes(encode_png(lq))
        # Global statistics, of patches of the whole size, as pruning and quantisation score.
        pair.gt.write_bytes(encode_png(restore_image(network, lq, train_patch_px=None, tile_px=None)))
    return str(make_store(source, root / "store", crop_px=64, stride_px=64).root)
