"""The manifests against KubeRay's own schema, and what its operator checks beyond that.

No operator and no Kubernetes has seen them.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig
from cluster.kuberay import ray_cluster, ray_job
from nafnet_core import InputError
from pipelines.config.cluster import load_cluster
from tests.cluster import crds

_FULL = (
    "storage={claim: nafnet-storage}",
    "secrets=[bucket, mlflow]",
    "image_pull_secrets=[registry]",
    "readers.tolerations=[{key: spot, operator: Equal, value: 'true', effect: NoSchedule}]",
    "gpu.node_selector={cloud.google.com/gke-spot: 'true'}",
    "gpu.gpus=8",
    "gpu.cpus=90.5",
    "gcs={backend: redis, redis_address: 'redis:6379', redis_secret: redis}",
    "auth={token: true, secret: ray-token}",
    "job.deadline_s=86400",
)
_VARIANTS = {
    "example": (),
    "full": _FULL,
    "bare": ("gcs={backend: none}", "auth={token: false}", "readers=null", "mlflow_uri=null", "env={}"),
    "fixed": ("autoscaling.enabled=false", "gpu.min_nodes=2", "gcs.storage_class=ssd"),
}
_TRAIN = ("train", "--config", "mobile", "--set", "loss={l1: 1.0}")


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return crds.read_shipped()


def _config(variant: str) -> ClusterConfig:
    return load_cluster(overrides=_VARIANTS[variant])


def _pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("variant", _VARIANTS)
def test_kuberay_knows_every_field(variant: str, schemas: dict[str, Any]) -> None:
    config = _config(variant)
    for manifest in (ray_cluster(config), ray_job(config, _TRAIN)):
        # As the API server gets it: a number that YAML reads otherwise than Python wrote it would show.
        read = yaml.safe_load(yaml.safe_dump(manifest))
        assert read == manifest
        assert not crds.faults(read, schemas[manifest["kind"]])


@pytest.mark.skipif(
    "NAFNET_KUBERAY_CRDS" not in os.environ, reason="NAFNET_KUBERAY_CRDS names no folder of KubeRay's CRDs"
)
@pytest.mark.parametrize("variant", _VARIANTS)
def test_so_does_the_version_at_hand(variant: str) -> None:
    found = crds.read_folder(Path(os.environ["NAFNET_KUBERAY_CRDS"]))
    config = _config(variant)
    for manifest in (ray_cluster(config), ray_job(config, _TRAIN)):
        assert not crds.faults(manifest, found[manifest["kind"]])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "headGroupSpec", "template", "spec", "volumes", 0, "emptyDir", "size"), "3Gi"),
        (("spec", "headGroupSpec", "template", "spec", "terminationGracePeriodSeconds"), "120"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), 2.5),
        (("spec", "workerGroupSpecs", 0, "rayStartParams", "num-cpus"), 0),
        (("spec", "gcsFaultToleranceOptions", "backend"), "etcd"),
        (("spec", "authOptions", "mode"), "on"),
    ],
)
def test_the_schema_would_refuse_a_slip(path: tuple[Any, ...], value: Any, schemas: dict[str, Any]) -> None:
    manifest = copy.deepcopy(ray_cluster(_config("example")))
    place: Any = manifest
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert len(crds.faults(manifest, schemas["RayCluster"])) == 1


@pytest.mark.parametrize("variant", _VARIANTS)
def test_the_head_has_no_gpu_and_takes_no_work(variant: str) -> None:
    spec = ray_cluster(_config(variant))["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (head,) = _pods(spec)[0]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


@pytest.mark.parametrize("variant", _VARIANTS)
def test_each_pod_is_promised_what_it_may_use(variant: str) -> None:
    config = _config(variant)
    spec = ray_cluster(config)["spec"]
    for pod, group in zip(_pods(spec), [spec["headGroupSpec"], *spec["workerGroupSpecs"]], strict=True):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        shm = {volume["name"]: volume for volume in pod["volumes"]}["shm"]["emptyDir"]
        assert shm["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        store_gib = int(group["rayStartParams"]["object-store-memory"]) / 2**30
        assert store_gib < int(shm["sizeLimit"].removesuffix("Gi"))
        assert pod["terminationGracePeriodSeconds"] == config.grace_s
        if container["name"] == "ray-worker":
            # Long enough for `ray stop` after the wait, which counts as well.
            (_, _, stop) = container["lifecycle"]["preStop"]["exec"]["command"]
            assert stop == f"sleep {config.grace_s - 30}; ray stop"
    assert _pods(spec)[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(config.gpu.gpus)


def test_state_lies_off_the_head() -> None:
    spec = ray_cluster(_config("full"))["spec"]
    for pod in _pods(spec):
        (container,) = pod["containers"]
        assert {"name": "storage", "mountPath": "/mnt/nafnet"} in container["volumeMounts"]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert env["NAFNET_WORKSPACE"].startswith("/mnt/nafnet/")
        assert env["MLFLOW_TRACKING_URI"].startswith("http://mlflow")
        # By name: what they hold is not here.
        assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}, {"secretRef": {"name": "mlflow"}}]


def test_the_state_of_the_cluster_outlives_its_head() -> None:
    for variant, backend in (("example", "rocksdb"), ("fixed", "rocksdb"), ("full", "redis")):
        options = ray_cluster(_config(variant))["spec"]["gcsFaultToleranceOptions"]
        assert options["backend"] == backend
        # KubeRay's operator refuses fields of the other back end.
        assert ("storage" in options) == (backend == "rocksdb")
        assert any(key.startswith("redis") for key in options) == (backend == "redis")
    assert "gcsFaultToleranceOptions" not in ray_cluster(_config("bare"))["spec"]


def test_tokens_are_on_unless_switched_off() -> None:
    assert ray_cluster(_config("example"))["spec"]["authOptions"] == {"mode": "token"}
    secret = {"mode": "token", "secretName": "ray-token"}
    assert ray_cluster(_config("full"))["spec"]["authOptions"] == secret
    assert "authOptions" not in ray_cluster(_config("bare"))["spec"]


def test_without_autoscaling_the_least_is_the_most() -> None:
    spec = ray_cluster(_config("fixed"))["spec"]
    assert "enableInTreeAutoscaling" not in spec and "autoscalerOptions" not in spec
    (gpu,) = spec["workerGroupSpecs"]  # no readers: their least is none
    assert gpu["minReplicas"] == gpu["maxReplicas"] == gpu["replicas"] == 2


def test_a_job_brings_its_cluster_and_has_it_deleted() -> None:
    job = ray_job(_config("example"), _TRAIN)
    assert job["metadata"]["name"] == "nafnet-train"
    assert job["spec"]["entrypoint"] == "nafnet train --config mobile --set 'loss={l1: 1.0}'"
    assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["ttlSecondsAfterFinished"] == 600
    assert job["spec"]["backoffLimit"] == 2
    cluster = job["spec"]["rayClusterSpec"]
    # `train` asks for room when it begins, and the command runs on the head.
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 1
    assert "gcsFaultToleranceOptions" not in cluster


def test_the_submitter_finds_a_private_image() -> None:
    template = ray_job(_config("full"), _TRAIN)["spec"]["submitterPodTemplate"]
    assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert "submitterPodTemplate" not in ray_job(_config("example"), _TRAIN)["spec"]


def test_a_job_needs_a_command_and_a_name_that_fits() -> None:
    with pytest.raises(InputError, match="no command for the job"):
        ray_job(_config("example"), [])
    with pytest.raises(InputError, match="too long for KubeRay"):
        ray_job(load_cluster(overrides=["name=" + "n" * 44]), _TRAIN)


def test_the_image_has_the_tested_versions() -> None:
    """That it builds is not tested: see its head."""
    root = Path(__file__).resolve().parents[2]
    image = (root / "Dockerfile").read_text()
    ray = re.search(r"^ray==(.+)$", (root / "constraints.txt").read_text(), re.MULTILINE)
    assert ray is not None
    assert re.findall(r"^FROM (.+)$", image, re.MULTILINE) == [f"rayproject/ray:{ray[1]}-py311-gpu"]
    installs = re.findall(r"^RUN pip install (.+)$", image, re.MULTILINE)
    assert all("-c constraints.txt" in install for install in installs)
    assert installs[-1].endswith('".[cluster]"')
