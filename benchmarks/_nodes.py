"""Nodes on one machine: network namespaces on a switch, each with a link whose bandwidth can be set.

As root on Linux, with `ip` and `tc` of iproute2 and the kernel's bridge, veth and tbf. A link delays what its
node sends, not what it receives: as a full-duplex card does. No latency is added (netem is not everywhere).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

INTERFACE = "eth0"
# One frame holds what a socket hands over at once: small ones cost the two cores more than training does.
_MTU_BYTES = 65_000
_BURST_KIB = 256  # of tbf, more than a frame
_LIMIT_MIB = 16  # what tbf queues


@dataclass(frozen=True, kw_only=True)
class Node:
    """Where one process runs."""

    address: str
    prefix: tuple[str, ...]
    """Words before a command that has it run here."""


def local_nodes(number: int) -> list[Node]:
    """All on this machine, over its loopback, without a limit."""
    return [Node(address="127.0.0.1", prefix=()) for _ in range(number)]


def can_limit() -> bool:
    """Whether nodes of limited bandwidth can be made here."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        return False
    try:
        with limited_nodes(1) as (node,):
            subprocess.run([*node.prefix, *_limit(1000)], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        return False
    return True


@contextlib.contextmanager
def limited_nodes(number: int) -> Iterator[list[Node]]:
    """Nodes that `limit` may be called on."""
    names = [f"worker{count}-{os.getpid()}" for count in range(number)]
    switch = f"switch-{os.getpid()}"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "mtu", str(_MTU_BYTES), "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        nodes = []
        for count, name in enumerate(names):
            address = f"10.99.0.{count + 1}"
            _ip("netns", "add", name)
            port = ("name", f"port{count}", "mtu", str(_MTU_BYTES))
            peer = ("name", INTERFACE, "mtu", str(_MTU_BYTES), "netns", name)
            _ip("-n", switch, "link", "add", *port, "type", "veth", "peer", *peer)
            _ip("-n", switch, "link", "set", f"port{count}", "master", "switch", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _ip("-n", name, "link", "set", interface, "up")
            nodes.append(Node(address=address, prefix=("ip", "netns", "exec", name)))
        yield nodes
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def limit(mbit_s: float | None) -> None:
    """Have this process' node send so fast at most; None lifts the limit."""
    if mbit_s is None:
        subprocess.run(["tc", "qdisc", "delete", "dev", INTERFACE, "root"], capture_output=True)
    else:
        subprocess.run(_limit(mbit_s), check=True, capture_output=True)


def _limit(mbit_s: float) -> list[str]:
    bucket = ("tbf", "rate", f"{mbit_s:g}mbit", "burst", f"{_BURST_KIB}k", "limit", f"{_LIMIT_MIB}m")
    return ["tc", "qdisc", "replace", "dev", INTERFACE, "root", *bucket]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
