from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nafnet_core import PRESETS, NAFNet, NAFNetConfig
from nafnet_core.weights import infer_config
from tests.nafnet_core.networks import DEEP, HOLLOW
from tests.reference import ReferenceNAFNet


@st.composite
def configs(draw: st.DrawFn) -> NAFNetConfig:
    num_stages = draw(st.integers(0, 3))
    stages = st.lists(st.integers(0, 2), min_size=num_stages, max_size=num_stages).map(tuple)
    return NAFNetConfig(
        width=2 * draw(st.integers(1, 6)),
        enc_blk_nums=draw(stages),
        # At least one block, somewhere: without any the expansions are nowhere to be read.
        middle_blk_num=draw(st.integers(1, 3)),
        dec_blk_nums=draw(stages),
        img_channel=draw(st.sampled_from([1, 3, 4])),
        dw_expand=draw(st.integers(1, 4)),
        ffn_expand=draw(st.integers(1, 4)),
    )


@settings(deadline=None, max_examples=40)
@given(config=configs())
def test_configuration_is_read_off_the_keys(config: NAFNetConfig) -> None:
    with torch.device("meta"):
        state = NAFNet(config).state_dict()
    assert infer_config(state, file="x") == config


@pytest.mark.parametrize("config", [*PRESETS.values(), DEEP, HOLLOW], ids=[*PRESETS, "deep", "hollow"])
def test_configuration_is_read_off_the_references_keys(config: NAFNetConfig) -> None:
    with torch.device("meta"):
        state = ReferenceNAFNet(**config.to_dict()).state_dict()  # type: ignore[arg-type]
    assert infer_config(dict(sorted(state.items())), file="x") == config


def test_more_than_ten_blocks_are_counted_as_numbers() -> None:
    # As text, "9" is above "27".
    with torch.device("meta"):
        state = NAFNet(PRESETS["width32"]).state_dict()
    assert infer_config(state, file="x").enc_blk_nums == (1, 1, 1, 28)
