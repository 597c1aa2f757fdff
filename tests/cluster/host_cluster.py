"""A Ray cluster of several hosts of this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.hosts import Host, Network, require_namespaces


@contextmanager
def host_cluster(*names: str, cpus: dict[str, int] | None = None, **environment: str) -> Iterator[Network]:
    """A head without work, and a node on each further host, with 1 CPU, or as many as are given."""
    require_namespaces()
    # Sockets lie in it, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    try:
        with Network(folder, "head", *names, environment=environment) as network:
            head = network["head"]
            head.start_head(env=head_state(head))
            for name in names:
                start_node(network, name, cpus or {})
            network.wait_for_nodes(head, 1 + len(names))
            yield network
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def head_state(head: Host) -> dict[str, str]:
    """The head's state in a data base on its disk, for another head to go on with."""
    folder = head.folder / "gcs"
    folder.mkdir(exist_ok=True)
    return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder)}


def start_node(network: Network, name: str, cpus: dict[str, int]) -> None:
    # Nodes wait that long for a head that is away.
    env = {"RAY_gcs_rpc_server_reconnect_timeout_s": "120"}
    network[name].start_node(network["head"], cpus=cpus.get(name, 1), env=env)
