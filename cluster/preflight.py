"""What every node of a cluster must have in common, found out before anything depends on it.

Facts are gathered by one actor a node; what they mean is decided here, from the facts alone.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

MUST_AGREE = ("python", "ray", "torch")
"""What is pickled, or summed, by one node for another."""
SHOULD_AGREE = ("numpy", "pyarrow", "opencv-python-headless")
_GIB = 2**30
_SPILL_GIB, _LEAST_FREE_GIB = 20, 1
_SKEW_WARN_S, _SKEW_FAIL_S = 2.0, 300.0  # S3 refuses requests that are 15 minutes off
_SLOW_MB_S = 110  # of 1 Gbit/s
_BLOCK = bytes(2**20)
# Asked of a process of its own: Ray hides the GPUs from an actor that reserves none.
_ASK_GPUS = (
    "import torch; n = torch.cuda.device_count(); "
    "nccl = torch.cuda.nccl.version() if n and torch.distributed.is_nccl_available() else (); "
    "print(n, '.'.join(map(str, nccl)) or '-', torch.cuda.get_device_name(0) if n else '', sep='|')"
)
_ASK_GPUS_S = 60.0

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""
    """What to do; empty where it is ok."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that is alive."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float
    object_store_bytes: float

    @property
    def works(self) -> bool:
        """Whether tasks run there; a head often has no CPUs for any."""
        return self.cpus > 0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one node says of itself."""

    host: str
    versions: dict[str, str] = field(default_factory=dict)
    variables: tuple[str, ...] = ()
    """Names of the asked environment variables that are set; never their values."""
    disk_free: dict[str, int] = field(default_factory=dict)
    """Folder → free bytes of its disk."""
    shared_memory: int | None = None
    """Bytes of /dev/shm; None where there is none."""
    gpus_expected: int = 0
    gpus_seen: int = 0
    gpu_name: str = ""
    nccl: str = ""
    object_store_bytes: float = 0


def nodes() -> list[Node]:
    """The cluster's nodes that are alive, those that do work first."""
    import ray

    alive = [
        Node(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0),
            object_store_bytes=node["Resources"].get("object_store_memory", 0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(alive, key=lambda node: (not node.works, node.address))


class Probe:
    """The actor that looks around on one node."""

    def __init__(self) -> None:
        self._sink: socket.socket | None = None

    def facts(
        self, *, gpus: int, object_store_bytes: float, variables: Sequence[str], folders: Sequence[str]
    ) -> Facts:
        """See `Facts`; of folders that do not exist, their nearest parent counts."""
        import shutil

        seen, nccl, name = _gpus() if gpus else (0, "", "")
        return Facts(
            host=socket.gethostname(),
            versions=versions(),
            variables=tuple(name for name in variables if os.environ.get(name)),
            disk_free={folder: shutil.disk_usage(_existing(Path(folder))).free for folder in folders},
            shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
            gpus_expected=gpus,
            gpus_seen=seen,
            gpu_name=name,
            nccl=nccl,
            object_store_bytes=object_store_bytes,
        )

    def now(self) -> float:
        """This node's clock, Unix time in s."""
        return time.time()

    def listen(self) -> int:
        """Take in whatever another node sends; returns the port."""
        self._sink = socket.create_server(("", 0))
        threading.Thread(target=_swallow, args=(self._sink,), daemon=True).start()
        return self._sink.getsockname()[1]

    def send(self, address: str, port: int, max_s: float) -> float | str:
        """MB/s to another node, over one connection; in words what went wrong."""
        try:
            with socket.create_connection((address, port), timeout=10) as connection:
                started, sent = time.perf_counter(), 0
                while (now := time.perf_counter()) - started < max_s:
                    connection.sendall(_BLOCK)
                    sent += len(_BLOCK)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)  # until all of it has arrived
                now = time.perf_counter()
        except OSError as error:
            return error.strerror or str(error)
        return sent / 1e6 / (now - started)


def versions() -> dict[str, str]:
    """Of Python and the packages that nodes must or should have alike, without what a build adds."""
    found = {"python": platform.python_version()}
    for package in (*MUST_AGREE[1:], *SHOULD_AGREE):
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def judge_versions(driver: dict[str, str], facts: Sequence[Facts]) -> list[Check]:
    """Whether all nodes and this process have the same."""
    checks = []
    for packages, verdict in ((MUST_AGREE, "fail"), (SHOULD_AGREE, "warn")):
        differing: list[str] = []
        for package in packages:
            places: dict[str, list[str]] = {driver[package]: ["here"]}
            for fact in facts:
                places.setdefault(fact.versions.get(package, "missing"), []).append(fact.host)
            if len(places) > 1:
                told = (f"{found} on {_names(hosts)}" for found, hosts in places.items())
                differing.append(f"{package} {', '.join(told)}")
        names = ", ".join("opencv" if package.startswith("opencv") else package for package in packages)
        if differing:
            fix = "Install what constraints.txt pins on every node and here"
            checks.append(
                Check(name=f"versions of {names}", verdict=verdict, found="; ".join(differing), fix=fix)
            )
        else:
            found = " ".join(driver[package] for package in packages)
            checks.append(Check(name=f"versions of {names}", verdict="ok", found=found))
    return checks


def judge_gpus(facts: Sequence[Facts]) -> Check | None:
    """Whether torch sees the GPUs that Ray hands out, and has NCCL for them; None where there are none."""
    with_gpus = [fact for fact in facts if fact.gpus_expected]
    if not with_gpus:
        return None
    for fact in with_gpus:
        if fact.gpus_seen < fact.gpus_expected:
            return Check(
                name="GPUs",
                verdict="fail",
                found=f"{fact.host}: Ray has {fact.gpus_expected}, torch sees {fact.gpus_seen}",
                fix="Install a CUDA build of torch and the driver there (`nvidia-smi` tells whether it runs)",
            )
        if not fact.nccl:
            fix = "Install a build of torch with NCCL"
            return Check(name="GPUs", verdict="fail", found=f"{fact.host}: torch has no NCCL", fix=fix)
    kinds = {fact.gpu_name for fact in with_gpus}
    nccl = {fact.nccl for fact in with_gpus}
    total = sum(fact.gpus_expected for fact in with_gpus)
    found = f"{total} on {len(with_gpus)} nodes: {', '.join(sorted(kinds))}; NCCL {', '.join(sorted(nccl))}"
    if len(nccl) > 1:
        fix = "Install the same build of torch on all nodes"
        return Check(name="GPUs", verdict="fail", found=found, fix=fix)
    if len(kinds) > 1:
        fix = "The fastest wait for the slowest: train on nodes of one kind"
        return Check(name="GPUs", verdict="warn", found=found, fix=fix)
    return Check(name="GPUs", verdict="ok", found=found)


def judge_disks(facts: Sequence[Facts]) -> Check:
    """Whether the disks have room for shards, checkpoints on their way and what Ray spills."""
    free, host, folder = min(
        (free, fact.host, folder) for fact in facts for folder, free in fact.disk_free.items()
    )
    verdict: Verdict = "ok"
    if free < _SPILL_GIB * _GIB:
        verdict = "warn" if free >= _LEAST_FREE_GIB * _GIB else "fail"
    return Check(
        name="free disk",
        verdict=verdict,
        found=f"at least {free / _GIB:.1f} GiB ({folder} on {host})",
        fix=""
        if verdict == "ok"
        else f"{_SPILL_GIB} GiB hold a cache of shards and what Ray spills: make room",
    )


def judge_shared_memory(facts: Sequence[Facts]) -> Check:
    """Whether /dev/shm holds Ray's object store, which else lies on a disk, at a disk's pace."""
    for fact in facts:
        if fact.shared_memory is None or fact.shared_memory < fact.object_store_bytes:
            size = "none" if fact.shared_memory is None else f"{fact.shared_memory / _GIB:.1f} GiB"
            return Check(
                name="shared memory",
                verdict="fail",
                found=f"{fact.host}: {size} for an object store of {fact.object_store_bytes / _GIB:.1f} GiB",
                fix="Give its container a larger /dev/shm (docker --shm-size; an emptyDir of medium Memory), "
                "or start Ray with a smaller --object-store-memory",
            )
    least = min(fact.object_store_bytes for fact in facts)
    return Check(name="shared memory", verdict="ok", found=f"object stores of {least / _GIB:.1f} GiB or more")


def judge_clocks(skews_s: dict[str, float]) -> Check:
    """How far nodes' clocks are apart; `skews_s` is host → its clock less this one's."""
    apart, first, second = max(
        ((abs(skews_s[a] - skews_s[b]), a, b) for a, b in combinations(skews_s, 2)), default=(0.0, "", "")
    )
    if apart < _SKEW_WARN_S:
        return Check(name="clocks", verdict="ok", found=f"{apart:.2f} s apart at most")
    return Check(
        name="clocks",
        verdict="warn" if apart < _SKEW_FAIL_S else "fail",
        found=f"{first} and {second} are {apart:.0f} s apart",
        fix="Run chrony or systemd-timesyncd on all nodes: storage refuses requests of the wrong time",
    )


def judge_network(rates: dict[tuple[str, str], float | str]) -> Check | None:
    """Whether nodes reach one another, and how fast; (from, to) → MB/s, or what went wrong."""
    if not rates:
        return None
    for (sender, receiver), rate in rates.items():
        if isinstance(rate, str):
            return Check(
                name="network between nodes",
                verdict="fail",
                found=f"{sender} cannot connect to {receiver}: {rate}",
                fix="Let nodes of the cluster reach one another on all ports: workers pick theirs at random",
            )
    slowest, (sender, receiver) = min((float(rate), pair) for pair, rate in rates.items())
    is_slow = slowest < _SLOW_MB_S
    return Check(
        name="network between nodes",
        verdict="warn" if is_slow else "ok",
        found=f"{slowest:.0f} MB/s at the slowest, {sender} to {receiver}",
        fix="Sending gradients may take longer than the pass, see docs/cluster.md" if is_slow else "",
    )


def judge_variables(here: Iterable[str], facts: Sequence[Facts]) -> Check | None:
    """Whether nodes have what this process has in its environment; by name, values are not looked at."""
    missing = {name: [fact.host for fact in facts if name not in fact.variables] for name in here}
    missing = {name: hosts for name, hosts in missing.items() if hosts}
    if not missing:
        return None
    return Check(
        name="credentials",
        verdict="warn",
        found="; ".join(f"{name} is not set on {_names(hosts)}" for name, hosts in missing.items()),
        fix="They are not sent. Set them on the nodes, as a secret, or give the nodes a role",
    )


def skew_s(ask: Callable[[], float]) -> float:
    """How far a node's clock is ahead of this one's, the best of three questions."""
    best = (float("inf"), 0.0)
    for _ in range(3):
        before = time.time()
        theirs = ask()
        after = time.time()
        best = min(best, (after - before, theirs - (before + after) / 2))
    return best[1]


def _names(hosts: Sequence[str], most: int = 4) -> str:
    rest = len(hosts) - most
    return ", ".join(hosts[:most]) + (f" and {rest} more" if rest > 0 else "")


def _existing(folder: Path) -> Path:
    return folder if folder.exists() or folder == folder.parent else _existing(folder.parent)


def _swallow(server: Any) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            while connection.recv(2**20):
                pass


def _gpus() -> tuple[int, str, str]:
    """GPUs that torch sees, NCCL's version and the first one's name."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_GPUS],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_ASK_GPUS_S,
        ).stdout.strip()
        count, nccl, name = answer.splitlines()[-1].split("|")
    except (subprocess.TimeoutExpired, OSError, IndexError, ValueError):
        return 0, "", ""
    return int(count), "" if nccl == "-" else nccl, name
