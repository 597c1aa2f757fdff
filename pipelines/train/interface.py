"""Which network interface workers talk through: the one by which Ray knows their node.

Left to itself, gloo takes the address that the host's own name stands for. That is 127.0.0.1 or 127.0.1.1 on
many a machine, and workers of two nodes then each wait for the other at home.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_VARIABLE = "GLOO_SOCKET_IFNAME"


class NodeInterfaceConfig(TorchConfig):
    """Ray Train's set-up of the process group, with the interface chosen before it."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeInterfaceBackend


class _NodeInterfaceBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Name the interface to gloo, unless whoever set up the node has done so."""
    import ray

    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(_VARIABLE, interface)


def interface_of(address: str) -> str | None:
    """The interface of this machine that has an IP address; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None
