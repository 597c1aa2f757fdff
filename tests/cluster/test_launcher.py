"""`ray_cluster.yaml` against Ray's own loader and schema. Whether AWS takes it cannot be tried here."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

_FILE = Path(__file__).resolve().parents[2] / "ray_cluster.yaml"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = fillout_defaults(yaml.safe_load(_FILE.read_text()))
    validate_config(config)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_schema_would_refuse_a_slip() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    content = yaml.safe_load(_FILE.read_text())
    content["head_node_typo"] = "head"
    with pytest.raises(Exception, match="head_node_typo"):
        validate_config(fillout_defaults(content))
