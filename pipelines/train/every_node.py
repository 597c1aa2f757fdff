"""Can every node of the cluster write where the run's state is kept? Tried before training."""

from __future__ import annotations

import socket
import uuid

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nafnet_core import InputError, NAFNetError
from pipelines.storage import LocalFolder, RemoteFolder

_TIMEOUT_S = 120.0
_Storage = LocalFolder | RemoteFolder


def check_every_node(storage: _Storage) -> None:
    """Have each node write a file into `storage`, and read them here.

    Raises:
        InputError: a node cannot, or writes to a disk of its own.
        CapabilityError: a bucket that does not answer.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) == 1 and isinstance(storage, LocalFolder):
        return  # this machine, which has just made the folder
    nodes = [node for node in alive if node["Resources"].get("CPU", 0) > 0]
    task = ray.remote(num_cpus=0)(_write)
    names = {node["NodeID"]: f"probe-{uuid.uuid4().hex}" for node in nodes}
    answers = ray.get(
        [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
                storage, name
            )
            for node_id, name in names.items()
        ],
        timeout=_TIMEOUT_S,
    )
    try:
        for (host, fault), name in zip(answers, names.values(), strict=True):
            if fault is None and storage.size(name) is None:
                fault = "wrote to a folder of its own, not to this one"
            if fault is not None:
                raise InputError(
                    "not every node of the cluster can write where the run's state is kept",
                    file=storage,
                    got=f"node {host}: {fault}",
                    fix="Name storage that all nodes share, or a URL, with --set checkpoint.storage=PLACE",
                )
    finally:
        for name in names.values():
            storage.delete(name)


def _write(storage: _Storage, name: str) -> tuple[str, str | None]:
    """The node's name, and what is wrong."""
    try:
        if isinstance(storage, LocalFolder) and not storage.path.is_dir():
            return socket.gethostname(), "there is no such folder"
        storage.write(name, b"can be written")
    except (OSError, NAFNetError) as error:
        return socket.gethostname(), str(error)
    return socket.gethostname(), None
