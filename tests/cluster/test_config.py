"""A cluster's YAML file: what is refused, and with which line."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from nafnet_core import InputError
from pipelines.config.cluster import EXAMPLE, load_cluster


def test_the_example_loads_and_says_what_the_defaults_are() -> None:
    config = load_cluster()
    assert config.ray_version == version("ray")
    left_out = load_cluster(
        overrides=["gpu={}", "readers={}", "head={}", "gcs={}", "auth={}", "autoscaling={}"]
    )
    # What the example writes out is what its comment promises: values, not other opinions.
    for name in ("gcs", "auth", "autoscaling", "head"):
        assert getattr(config, name) == getattr(left_out, name), name
    assert config.gpu == left_out.gpu.model_copy(update={"max_nodes": 8})


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("env.AWS_SECRET_ACCESS_KEY=hush", "env.AWS_SECRET_ACCESS_KEY"),
        ("env.HTTPS_PROXY=http://me:hush@proxy:3128", "http://proxy:3128"),
        ("storage.url=s3://me:hush@bucket/nafnet", "s3://bucket/nafnet"),
        ("mlflow_uri=https://me:hush@mlflow", "https://mlflow"),
    ],
)
def test_credentials_are_refused_and_not_repeated(override: str, named: str) -> None:
    with pytest.raises(InputError, match="credentials would be written into the manifest") as error:
        load_cluster(overrides=[override])
    assert repr(named) in str(error.value) and "hush" not in str(error.value)


def test_a_place_of_credentials_is_none() -> None:
    env = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token", "TOKENIZERS_PARALLELISM": "false"}
    assert load_cluster(overrides=[f"env={env}"]).env == env


def test_a_group_can_be_left_out() -> None:
    assert load_cluster(overrides=["readers=null"]).readers is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("gpu.gpuz=2", "Did you mean 'gpu.gpus'"),
        ("gpu.tolerations=[{kez: a}]", "Did you mean 'gpu.tolerations.0.key'"),
        ("name=Nafnet_1", "lower-case letters"),
        ("name=" + "n" * 48, "47 characters at most"),
        ("namespace=a b", "lower-case letters"),
        ("gpu.shm_gib=2", "object_store_gib < shm_gib < memory_gib"),
        ("gpu.memory_gib=12", "object_store_gib < shm_gib < memory_gib"),
        ("gpu.min_nodes=9", "min_nodes must not exceed max_nodes; got 9 and 8"),
        ("gpu.gpus=0", "greater than 0"),
        ("env={'A B': x}", "the name of an environment variable"),
        ("secrets=[Bucket Credentials]", "the name of a Kubernetes object"),
        ("storage.url=bucket/nafnet", "a URL, such as s3://bucket/nafnet"),
        ("storage.claim=nafnet", "exactly one of `url` and `claim`"),
        ("storage={claim: nafnet, mount: /dev/shm}", "an absolute path"),
        ("mlflow_uri=mlflow:5000", "a URL"),
        ("ray_version=2.60", "ray_version"),
        ("gcs.backend=redis", "`redis_address` goes with"),
        ("gcs={backend: rocksdb, redis_secret: r}", "`redis_secret` belongs to"),
        ("gcs={backend: redis, redis_address: redis}", "redis_address"),
        ("job.submission=Sidecar", "K8sJobMode"),
    ],
)
def test_a_slip_is_one_line(override: str, line: str) -> None:
    with pytest.raises(InputError) as error:
        load_cluster(overrides=[override])
    assert line in str(error.value) and override.partition("=")[0] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("gpu.max_nodes=0", "readers=null"), "the head takes no work"),
        (("autoscaling.enabled=false",), "without autoscaling no worker would ever come"),
        (("job.nodes=9",), "job.nodes must not exceed gpu.max_nodes; got 9 and 8"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(InputError, match=line):
        load_cluster(overrides=overrides)


def test_a_bad_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    for text, line in (
        ("", "an empty configuration"),
        ("- 1", "not a configuration"),
        ("a: [", "not a YAML file"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=line):
            load_cluster(file)
    file.write_text("storage: {url: 's3://bucket/x'}")
    with pytest.raises(InputError, match=r"bad value for 'image'.*expected a value"):
        load_cluster(file)
    with pytest.raises(InputError, match="no such file"):
        load_cluster(tmp_path / "none.yaml")


def test_the_example_lies_in_the_package() -> None:
    assert EXAMPLE.is_file() and EXAMPLE.parent.name == "cluster"
