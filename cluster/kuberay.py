"""Manifests for KubeRay, of a `ClusterConfig`: a `RayCluster` that stays, or a `RayJob` that brings its own.

from cluster.kuberay import ray_cluster
yaml.safe_dump(ray_cluster(config))

Only functions of the configuration: nothing is asked of a Kubernetes server here. Against which schema the
manifests are checked: tests/cluster/crds.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import Autoscaling, ClusterConfig, Gcs, GpuGroup, Group, Machine
from nafnet_core.errors import InputError

Manifest = dict[str, Any]

_API = "ray.io/v1"
_GIB = 2**30
_MAX_JOB_NAME = 47
_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
_CACHE = "/cache"
# For `ray stop`, which takes 16 s at most and then kills.
_STOP_S = 30
# Group `users`, of the user `ray` in Ray's images: volumes are made over to it when they are mounted, else
# those of block storage belong to root, and neither state nor shards could be written.
_USERS_GID = 100
# Reads a state of some MiB every five seconds.
_AUTOSCALER = {"cpu": "500m", "memory": "1Gi"}
# Has torch's command line do nothing but `ray job submit`; KubeRay's own default.
_SUBMITTER = {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "200Mi"}}


def ray_cluster(config: ClusterConfig) -> Manifest:
    """A cluster that stays until it is deleted; jobs are submitted to it."""
    spec = _cluster_spec(config)
    if config.gcs.backend != "none":
        spec["gcsFaultToleranceOptions"] = _gcs_options(config.gcs)
    return {
        "apiVersion": _API,
        "kind": "RayCluster",
        "metadata": _metadata(config, config.name),
        "spec": spec,
    }


def ray_job(config: ClusterConfig, arguments: Sequence[str]) -> Manifest:
    """`nafnet ARGUMENTS` on a cluster of its own, which is deleted afterwards.

    Without fault tolerance of the cluster's own state: the command runs on the head, so a head that is lost
    takes it along. It is begun again on a new cluster, and goes on from the run's newest checkpoint.

    Args:
        config: of that cluster.
        arguments: of `nafnet`, as the first one its command.

    Raises:
        InputError: no command.
    """
    if not arguments:
        raise InputError("no command for the job", expected="-- train --config RECIPE …")
    job = config.job
    name = job.name or f"{config.name}-{arguments[0]}"
    gpu = config.gpu.model_copy(update={"min_nodes": max(config.gpu.min_nodes, job.nodes)})
    config = config.model_copy(update={"gpu": gpu})
    if len(name) > _MAX_JOB_NAME:
        raise InputError(
            "the name of the job is too long for KubeRay",
            file=name,
            expected=f"{_MAX_JOB_NAME} characters at most",
            fix="Set job.name",
        )
    spec: Manifest = {
        "entrypoint": shlex.join(["nafnet", *arguments]),
        "submissionMode": job.submission,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": job.keep_s,
        "backoffLimit": job.retries,
        "rayClusterSpec": _cluster_spec(config),
    }
    if job.deadline_s is not None:
        spec["activeDeadlineSeconds"] = job.deadline_s
    if job.submission == "K8sJobMode" and config.image_pull_secrets:
        # KubeRay's own template would not find the image in a private registry.
        spec["submitterPodTemplate"] = {
            "spec": {
                "restartPolicy": "Never",
                "imagePullSecrets": _named(config.image_pull_secrets),
                "containers": [{"name": "ray-job-submitter", "image": config.image, "resources": _SUBMITTER}],
            }
        }
    return {"apiVersion": _API, "kind": "RayJob", "metadata": _metadata(config, name), "spec": spec}


def _metadata(config: ClusterConfig, name: str) -> Manifest:
    return {
        "name": name,
        "namespace": config.namespace,
        "labels": {"app.kubernetes.io/name": "nafnet-ray", "app.kubernetes.io/instance": config.name},
    }


def _cluster_spec(config: ClusterConfig) -> Manifest:
    groups: dict[str, Group] = {"gpu": config.gpu}
    if config.readers is not None:
        groups["readers"] = config.readers
    spec: Manifest = {
        "rayVersion": config.ray_version,
        "headGroupSpec": {
            # No CPU to give away: no task and no actor of training lands beside the cluster's own state.
            "rayStartParams": {
                "num-cpus": "0",
                "object-store-memory": str(config.head.object_store_gib * _GIB),
            },
            "template": _pod(config, "ray-head", config.head, ports=_PORTS),
        },
        "workerGroupSpecs": [
            _worker_group(config, name, group) for name, group in groups.items() if _most(config, group)
        ],
    }
    if config.auth.token:
        spec["authOptions"] = {"mode": "token"}
        if config.auth.secret is not None:
            spec["authOptions"]["secretName"] = config.auth.secret
    if config.autoscaling.enabled:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = _autoscaler(config.autoscaling)
    return spec


def _most(config: ClusterConfig, group: Group) -> int:
    # KubeRay asks for least and most where nothing scales, too.
    return group.max_nodes if config.autoscaling.enabled else group.min_nodes


def _worker_group(config: ClusterConfig, name: str, group: Group) -> Manifest:
    return {
        "groupName": name,
        "replicas": group.min_nodes,
        "minReplicas": group.min_nodes,
        "maxReplicas": _most(config, group),
        # CPUs, memory and GPUs are found by Ray in the limits of the container.
        "rayStartParams": {"object-store-memory": str(group.object_store_gib * _GIB)},
        "template": _pod(config, "ray-worker", group),
    }


def _pod(
    config: ClusterConfig, container: str, machine: Machine, *, ports: Mapping[str, int] | None = None
) -> Manifest:
    # Equal requests and limits: a pod that may use more memory than it was promised is what the kernel ends
    # first where a node runs short, in the middle of a step.
    amounts: dict[str, str] = {"cpu": f"{machine.cpus:g}", "memory": f"{machine.memory_gib}Gi"}
    if isinstance(machine, GpuGroup):
        amounts["nvidia.com/gpu"] = str(machine.gpus)
    volumes: list[Manifest] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{machine.shm_gib}Gi"}}
    ]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    env = dict(config.env)
    if config.mlflow_uri is not None:
        env["MLFLOW_TRACKING_URI"] = config.mlflow_uri
    if config.storage.claim is not None:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": config.storage.claim}})
        mounts.append({"name": "storage", "mountPath": config.storage.mount})
        env["NAFNET_WORKSPACE"] = f"{config.storage.mount}/nafnet-workspace"
    if isinstance(machine, Group):
        volumes.append({"name": "cache", "emptyDir": {"sizeLimit": f"{machine.cache_gib}Gi"}})
        mounts.append({"name": "cache", "mountPath": _CACHE})
        env["NAFNET_CACHE"] = _CACHE
    main: Manifest = {
        "name": container,
        "image": config.image,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "volumeMounts": mounts,
    }
    if isinstance(machine, Group):
        # Without it the others would learn of this node's end by its silence, after half a minute.
        stop = f"sleep {config.grace_s - _STOP_S}; ray stop"
        main["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", stop]}}}
    if ports is not None:
        main["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    if env:
        main["env"] = [{"name": name, "value": value} for name, value in env.items()]
    if config.secrets:
        main["envFrom"] = [{"secretRef": {"name": name}} for name in config.secrets]
    spec: Manifest = {
        "containers": [main],
        "volumes": volumes,
        "terminationGracePeriodSeconds": config.grace_s,
        "securityContext": {"fsGroup": _USERS_GID},
    }
    if config.service_account is not None:
        spec["serviceAccountName"] = config.service_account
    if config.image_pull_secrets:
        spec["imagePullSecrets"] = _named(config.image_pull_secrets)
    if machine.node_selector:
        spec["nodeSelector"] = dict(machine.node_selector)
    if machine.tolerations:
        spec["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in machine.tolerations]
    return {"spec": spec}


def _autoscaler(autoscaling: Autoscaling) -> Manifest:
    return {
        # The second version goes by what Ray and Kubernetes say of each pod, not by what was asked for.
        "version": "v2",
        "idleTimeoutSeconds": autoscaling.idle_timeout_s,
        "resources": {"requests": dict(_AUTOSCALER), "limits": dict(_AUTOSCALER)},
    }


def _gcs_options(gcs: Gcs) -> Manifest:
    if gcs.backend == "rocksdb":
        storage: Manifest = {"size": f"{gcs.storage_gib}Gi"}
        if gcs.storage_class is not None:
            storage["storageClassName"] = gcs.storage_class
        return {"backend": "rocksdb", "storage": storage}
    options: Manifest = {"backend": "redis", "redisAddress": gcs.redis_address}
    if gcs.redis_secret is not None:
        options["redisPassword"] = {
            "valueFrom": {"secretKeyRef": {"name": gcs.redis_secret, "key": "password"}}
        }
    return options


def _named(names: Sequence[str]) -> list[Manifest]:
    return [{"name": name} for name in names]
