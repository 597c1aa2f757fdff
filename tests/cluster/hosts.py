"""Several hosts on one machine: network namespaces on a bridge, each with its address, name, disk and Ray.

A host's `/tmp/ray` and `disk` are its own; `shared` is what all see, as a network disk is. The machine itself
is on the bridge as well, at `Network.gateway`: tests' servers run there, and commands as from a laptop. Needs
root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
_BRIDGE = "nafnet-br"
_START_S = 60.0
# Less of what Ray starts beside the cluster itself: this machine has few cores.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_enable_open_telemetry": "0",
    "MPLBACKEND": "Agg",
}


def require_namespaces() -> None:
    """Skip the test where network namespaces cannot be made."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    if _ip("netns", "add", "nafnet-probe", check=False):
        pytest.skip("network namespaces are not permitted here")
    _ip("netns", "del", "nafnet-probe")


class Host:
    """A network, a process table, a name and mounts of its own; it ends with the network's block."""

    def __init__(self, network: Network, number: int, name: str) -> None:
        self.name, self._network = name, network
        self.address = f"10.77.0.{10 + number}"
        self._namespace = f"nafnet-{name}"
        self.folder = network.folder / name
        for part in ("ray", "disk", "home"):
            (self.folder / part).mkdir(parents=True)
        # What this host sees at the first is its own folder at the second.
        self.mounts = {"/tmp/ray": self.folder / "ray", str(network.disk): self.folder / "disk"}
        link = f"nafnet-{number}"
        _ip("link", "del", link, check=False)  # a namespace that is gone may hold its end for a moment
        _ip("netns", "add", self._namespace)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self._namespace)
        _ip("link", "set", link, "master", _BRIDGE, "up")
        _ip("-n", self._namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        self._link = link
        self._init: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        for device in ("lo", "eth0"):
            _ip("-n", self._namespace, "link", "set", device, "up")
        # Leads nowhere, but programs tell their own address by it.
        _ip("-n", self._namespace, "route", "add", "default", "via", network.gateway)

    @property
    def logs(self) -> Path:
        """Ray's folder of this host, its logs included."""
        return self.folder / "ray"

    def start(
        self, *command: str, env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program on this host; what it prints goes to `log`, else into the host's own."""
        with (log or self.folder / "output.log").open("ab") as file:
            process = subprocess.Popen(
                ["nsenter", f"--target={self._booted()}", "--net", "--pid", "--mount", "--uts"]
                + [f"--wd={self._network.disk}", "--", *command],
                env=self.environment | dict(env or {}),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _booted(self) -> int:
        """Process number of this host's first process, which all others end with."""
        if self._init is None:
            binds = [f"mount --bind {inside} {seen}" for seen, inside in self.mounts.items()]
            script = "; ".join([*binds, f"hostname {self.name}", "echo up", "exec sleep infinity"])
            self._init = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace]
                + [
                    "unshare",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    "--mount-proc",
                    "--uts",
                    "sh",
                    "-ec",
                    script,
                ],
                stdout=subprocess.PIPE,
            )
            assert self._init.stdout is not None and self._init.stdout.readline() == b"up\n"
        return psutil.Process(self._init.pid).children()[0].pid

    @property
    def environment(self) -> dict[str, str]:
        """What programs on this host find in the environment."""
        inherited = {name: os.environ[name] for name in ("LANG",) if name in os.environ}
        # A job's `python` must be the one that runs Ray.
        inherited["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return inherited | _QUIET | self._network.environment | {"HOME": str(self.folder / "home")}

    def start_head(self, *options: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start Ray's head, without CPUs for work; returns once it answers."""
        # Of a head that was killed: by this Ray believes it still there, `ray stop` would remove it.
        (self.logs / "ray_current_cluster").unlink(missing_ok=True)
        process = self.start(
            *_ray("start", "--head", "--block", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0"),
            f"--node-ip-address={self.address}",
            *options,
            env=env,
        )
        deadline = time.monotonic() + _START_S
        while not self.listens(6379) or not self.listens(8265):
            assert process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.2)
        return process

    def start_node(
        self, head: Host, *options: str, cpus: int = 2, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start Ray as a node of another host's cluster."""
        return self.start(
            *_ray("start", "--block", f"--address={head.address}:6379", f"--num-cpus={cpus}"),
            f"--node-ip-address={self.address}",
            "--object-store-memory=400000000",
            *options,
            env=env,
        )

    def nafnet(self, *arguments: object, log: Path, env: Mapping[str, str] | None = None) -> Nafnet:
        """Start a command of ours on this host."""
        command = [sys.executable, "-m", "pipelines", *map(str, arguments)]
        # A driver has our code; nodes may not have it, see `Network`.
        return Nafnet(self.start(*command, env={"PYTHONPATH": str(ROOT), **(env or {})}, log=log), log)

    def listens(self, port: int) -> bool:
        """Whether something on this host accepts connections."""
        import socket

        with contextlib.suppress(OSError), socket.create_connection((self.address, port), 1):
            return True
        return False

    def programs(self) -> list[str]:
        """Command lines of all that runs on this host."""
        command = ["ip", "netns", "pids", self._namespace]
        pids = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        lines = []
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(psutil.Process(int(pid)).cmdline()))
        return lines

    def kill(self) -> None:
        """As if its power failed."""
        if self._init is not None:
            self._init.kill()
            self._init.communicate()
            self._init = None
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def cut(self) -> None:
        """Pull the network's plug."""
        _ip("link", "set", self._link, "down")

    def join(self) -> None:
        """Put it in again."""
        _ip("link", "set", self._link, "up")

    def limit(self, mbit: float) -> None:
        """Let no more than so many Mbit/s out of this host."""
        shape = f"qdisc replace dev eth0 root tbf rate {mbit}mbit burst 256kb latency 200ms"
        subprocess.run(["tc", "-n", self._namespace, *shape.split()], check=True)

    def output(self) -> str:
        """What programs without a log of their own printed."""
        file = self.folder / "output.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def remove(self) -> None:
        self.kill()
        _ip("netns", "del", self._namespace)


class Nafnet:
    """A command of ours that runs on a host."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, what: Callable[[], object], timeout_s: float = 240) -> None:
        """Until something is so; fails when the command ends before."""
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.1)

    def interrupt(self) -> None:
        """Ctrl-C."""
        psutil.Process(self.process.pid).children()[0].send_signal(signal.SIGINT)

    def kill(self) -> None:
        """The driver, and what it started itself."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self, code: int = 0, timeout_s: float = 400) -> str:
        """Wait for its end; returns what it printed."""
        try:
            self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                self.kill()
        assert self.process.returncode == code, self.printed()
        return self.printed()


class Network:
    """Hosts on one bridge, gone at the end of the `with` block.

    Args:
        folder: for the hosts' own files; a short path, as Ray's sockets lie in it.
        names: one host each; also their host names.
        environment: what all programs of all hosts find in theirs.

    Nodes cannot import our code but for what is sent to them: in its place they find packages that refuse.
    """

    gateway = "10.77.0.1"
    ray = "10.77.0.10:6379"

    def __init__(self, folder: Path, *names: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self._names = folder, names
        self.environment = {"PYTHONPATH": str(folder / "refusing"), **(environment or {})}
        self.disk, self.shared = folder / "disk", folder / "shared"
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Network:
        for place in (self.disk, self.shared, Path("/tmp/ray")):
            place.mkdir(parents=True, exist_ok=True)
        for package in ("nafnet_core", "pipelines", "cluster"):
            place = self.folder / "refusing" / package
            place.mkdir(parents=True)
            (place / "__init__.py").write_text(f"raise ImportError('{package} was not sent to this node')\n")
        self._clear()  # what a killed test left
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for number, name in enumerate(self._names):
            self.hosts[name] = Host(self, number, name)
        return self

    def __exit__(self, *_: Any) -> None:
        for host in self.hosts.values():
            host.remove()
        self._clear()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def wait_for_nodes(self, head: Host, count: int) -> None:
        """Until so many nodes are alive, as the head sees it, itself included."""
        deadline = time.monotonic() + _START_S
        program = (
            f"import ray, sys, time\nray.init('{self.ray}', logging_level=50, log_to_driver=False)\n"
            f"while sum(n['Alive'] for n in ray.nodes()) != {count}: time.sleep(0.3)"
        )
        process = head.start(sys.executable, "-c", program)
        while process.poll() is None:
            assert time.monotonic() < deadline, head.output()[-3000:]
            time.sleep(0.1)
        assert process.returncode == 0, head.output()[-3000:]

    def _clear(self) -> None:
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        for name in (line.split()[0] for line in left.splitlines()):
            if name.startswith("nafnet-"):
                pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
                for pid in pids.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _ip("netns", "del", name)
        _ip("link", "del", _BRIDGE, check=False)


def _ray(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("ray")), *arguments]


def _ip(*arguments: str, check: bool = True) -> int:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {shlex.join(arguments)}: {done.stderr}"
    return done.returncode
