"""What a cluster on Kubernetes is made of; `cluster/kuberay.py` makes manifests of it.

`cluster/kuberay.yaml` is an example with every part that usually needs a value of one's own.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nafnet_core.errors import InputError

# KubeRay adds to a cluster's name for its pods and services; its own limit is 53, of a job's cluster 47.
_MAX_NAME = 47
# Not those of files that hold them, as AWS_WEB_IDENTITY_TOKEN_FILE.
_CREDENTIAL = re.compile(r"(SECRET|PASSWORD|PASSWD|TOKEN|_KEY|_KEY_ID)$", re.IGNORECASE)


def _label(value: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", value) or len(value) > _MAX_NAME:
        raise ValueError(
            f"lower-case letters, digits and dashes, a letter first, {_MAX_NAME} characters at most"
        )
    return value


def _object_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", value) or len(value) > 253:
        raise ValueError("the name of a Kubernetes object: lower-case letters, digits, dashes and dots")
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError("the name of an environment variable")
    if _CREDENTIAL.search(value):
        raise _no_credentials(f"env.{value}")
    return value


def _without_credentials(value: str) -> str:
    parts = urlsplit(value)
    if parts.username or parts.password:
        raise _no_credentials(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    return value


def _no_credentials(where: str) -> InputError:
    # No ValueError: the line that is made of it would quote them.
    return InputError(
        "credentials would be written into the manifest",
        file=where,
        fix="Put them into a Kubernetes secret, and its name into `secrets`",
    )


def _url(value: str) -> str:
    parts = urlsplit(value)
    if not parts.scheme or not parts.netloc:
        raise ValueError("a URL, such as s3://bucket/nafnet")
    return _without_credentials(value)


def _folder(value: str) -> str:
    if not value.startswith("/") or value.rstrip("/") in ("", "/dev/shm", "/tmp"):
        raise ValueError("an absolute path, of a folder for nothing else")
    return value.rstrip("/")


def _installed_ray() -> str:
    try:
        return version("ray")
    except PackageNotFoundError as error:  # never with our own requirements
        raise ValueError("`ray_version`, as no Ray is installed here") from error


Label = Annotated[str, AfterValidator(_label)]
ObjectName = Annotated[str, AfterValidator(_object_name)]
Url = Annotated[str, AfterValidator(_url)]


class _Part(BaseModel):
    """Base of every part: frozen, no key that it does not know, no number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Toleration(_Part):
    """A taint that pods of a group put up with, as Kubernetes writes it."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Machine(_Part):
    """What a pod asks of its node; requests and limits are the same."""

    cpus: float = Field(4, gt=0)
    memory_gib: int = Field(16, gt=0)
    """With shared memory, whose pages count here once they are used."""
    shm_gib: int = Field(3, gt=0)
    """Size of /dev/shm, a file system in memory. Kubernetes' own default of 64 MiB would have Ray keep its
    object store on the disk."""
    object_store_gib: int = Field(2, gt=0)
    """Ray's object store, in /dev/shm. What is left of that is for NCCL between GPUs of one node."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have: its kind of GPU, or that it is a spot machine."""
    tolerations: tuple[Toleration, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Machine:
        if not self.object_store_gib < self.shm_gib < self.memory_gib:
            raise ValueError(
                "object_store_gib < shm_gib < memory_gib, as each is a part of the next; got "
                f"{self.object_store_gib}, {self.shm_gib}, {self.memory_gib}"
            )
        return self


class Group(Machine):
    """Workers of one kind: `min_nodes` of them, with autoscaling up to `max_nodes` as they are needed."""

    min_nodes: int = Field(0, ge=0)
    max_nodes: int = Field(4, ge=0)
    cache_gib: int = Field(80, gt=0)
    """Disk for shards that are fetched from a bucket (NAFNET_CACHE); above `data.cache_gib` of the recipe."""

    @model_validator(mode="after")
    def _least_is_not_more(self) -> Group:
        if self.min_nodes > self.max_nodes:
            raise ValueError(
                f"min_nodes must not exceed max_nodes; got {self.min_nodes} and {self.max_nodes}"
            )
        return self


class GpuGroup(Group):
    """Workers that train."""

    gpus: int = Field(1, gt=0)
    """GPUs a node."""
    cpus: float = Field(14, gt=0)
    """Of training workers, their readers and loaders; a little below the machine's, for the system's pods."""
    memory_gib: int = Field(56, gt=0)
    shm_gib: int = Field(12, gt=0)
    object_store_gib: int = Field(8, gt=0)
    """Patches pass through it. A quarter is for blocks that lie ready: 4 GiB for each GPU let eight readers
    have sixteen blocks of 64 MiB (`pipelines/feeder.py`); with less they hand over smaller ones."""
    tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu", effect="NoSchedule"),)


class Storage(_Part):
    """Where runs keep their state. Not on the head, which may be replaced; give one of the two."""

    url: Url | None = None
    """Folder in a bucket, as `checkpoint.storage` takes it."""
    claim: ObjectName | None = None
    """Or a PersistentVolumeClaim that many nodes can mount (ReadWriteMany: EFS, Filestore, NFS). The
    workspace lies there too."""
    mount: Annotated[str, AfterValidator(_folder)] = "/mnt/nafnet"
    """Where each pod sees that claim."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Storage:
        if (self.url is None) == (self.claim is None):
            raise ValueError("exactly one of `url` and `claim`")
        return self


class Gcs(_Part):
    """What becomes of the cluster's own state (its nodes, actors and jobs) when the head is replaced."""

    backend: Literal["rocksdb", "redis", "none"] = "rocksdb"
    """`rocksdb`: on a volume of the head's, from Ray 2.57 and KubeRay 1.7 with the feature gate
    GCSFaultToleranceEmbeddedStorage. `redis`: in a server of yours. `none`: lost, and workers begin anew."""
    storage_gib: int = Field(2, gt=0)
    """Size of that volume, which KubeRay claims."""
    storage_class: ObjectName | None = None
    """Kind of that volume; None takes the cluster's own default."""
    redis_address: str | None = Field(None, pattern=r"^(redis://|rediss://)?[^:/\s@]+:\d+$")
    """HOST:PORT."""
    redis_secret: ObjectName | None = None
    """Secret that has the password of that server under `password`."""

    @model_validator(mode="after")
    def _fields_of_the_backend(self) -> Gcs:
        if (self.backend == "redis") != (self.redis_address is not None):
            raise ValueError("`redis_address` goes with `backend: redis`, and that with it")
        if self.redis_secret is not None and self.backend != "redis":
            raise ValueError("`redis_secret` belongs to `backend: redis`")
        return self


class Auth(_Part):
    """Ray's token authentication: without it, whoever reaches the dashboard runs code on the cluster."""

    token: bool = True
    secret: ObjectName | None = None
    """Secret that has the token under `auth_token`; None has KubeRay make one of the cluster's name."""


class Autoscaling(_Part):
    """Whether workers come and go with the work that there is."""

    enabled: bool = True
    """Off: `min_nodes` of each group, always."""
    idle_timeout_s: int = Field(300, ge=0)
    """A worker that has had nothing to do for so long is ended."""


class Job(_Part):
    """A command that brings its own cluster, and has it deleted afterwards (RayJob)."""

    name: Label | None = None
    """None takes the cluster's and the command's: nafnet-train. One that is there already stays as it is."""
    nodes: int = Field(1, ge=0)
    """GPU nodes that are there before the command begins, which then waits for no autoscaler."""
    retries: int = Field(2, ge=0)
    """New clusters after a failure. The command goes on from the run's newest checkpoint, so a head that was
    lost costs minutes; but a mistake in the recipe is made as often, too."""
    keep_s: int = Field(600, ge=0)
    """Time that the cluster stays after the job, for its logs to be read."""
    deadline_s: int | None = Field(None, gt=0)
    """The job is ended after so long, whatever it does. None: never."""
    submission: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    """Who submits the command. `K8sJobMode`: a pod, whose log is the job's. `HTTPMode`: the operator.
    `SidecarMode`: a container beside the head."""


class ClusterConfig(_Part):
    """One Ray cluster on Kubernetes, whole."""

    name: Label = "nafnet"
    namespace: Label = "default"
    image: str = Field(min_length=1)
    """With this project installed, for GPUs (`Dockerfile`). Head, workers and job all use it."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    ray_version: str = Field(default_factory=_installed_ray, pattern=r"^\d+\.\d+\.\d+$")
    """Of the image; by default the one that is installed here."""
    service_account: ObjectName | None = None
    """By whose role pods may read and write the bucket (IRSA, Workload Identity)."""
    head: Machine = Machine(cpus=4, memory_gib=16)
    """Runs the drivers of jobs, but no work of theirs."""
    gpu: GpuGroup = GpuGroup()
    readers: Group | None = Group(max_nodes=2, cpus=14, memory_gib=28, shm_gib=9, object_store_gib=8)
    """CPU workers, for `prepare`, `synth`, and readers that find no room beside a GPU; None for no group."""
    storage: Storage
    mlflow_uri: Url | None = None
    """MLflow server. None: the data base in the workspace, which only one that is on a claim survives."""
    env: dict[
        Annotated[str, AfterValidator(_variable)], Annotated[str, AfterValidator(_without_credentials)]
    ] = {}
    """Plain environment variables of every pod, such as AWS_ENDPOINT_URL."""
    secrets: tuple[ObjectName, ...] = ()
    """Secrets whose keys become environment variables of every pod, such as AWS_ACCESS_KEY_ID. They must
    exist; what they hold is written nowhere."""
    auth: Auth = Auth()
    gcs: Gcs = Gcs()
    autoscaling: Autoscaling = Autoscaling()
    grace_s: int = Field(120, ge=60)
    """Time that a pod has when its node is taken away; AWS gives two minutes. It works on until half a minute
    is left, so that a checkpoint on its way to the bucket, some GB of the largest network, arrives there."""
    job: Job = Job()

    @model_validator(mode="after")
    def _somebody_works(self) -> ClusterConfig:
        groups = [self.gpu, *([self.readers] if self.readers is not None else [])]
        if self.autoscaling.enabled and not any(group.max_nodes for group in groups):
            raise ValueError("the head takes no work: set `gpu.max_nodes` or `readers.max_nodes` above 0")
        if not self.autoscaling.enabled and not any(group.min_nodes for group in groups):
            raise ValueError("without autoscaling no worker would ever come: set `gpu.min_nodes` above 0")
        if self.job.nodes > self.gpu.max_nodes:
            raise ValueError(
                f"job.nodes must not exceed gpu.max_nodes; got {self.job.nodes} and {self.gpu.max_nodes}"
            )
        return self
