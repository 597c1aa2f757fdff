"""Machines with addresses, SSH servers, homes and process tables of their own, all on this one.

Each is a network namespace on a bridge, with a process namespace: `ray stop` on one ends nothing of another's
nor of anything else that runs here, and whatever was started ends with the namespace's first process.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_NEEDED = ("ip", "ssh", "ssh-keygen", "rsync", "unshare")
_SSHD = "/usr/sbin/sshd"
_START_S = 20.0


@dataclass(frozen=True)
class Machines:
    """What is up: the first address is the head's."""

    addresses: tuple[str, ...]
    homes: tuple[Path, ...]
    key: Path
    """Private key that the user root is let in with."""


def why_not() -> str | None:
    """Why such machines cannot be had here, or None."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if not Path(_SSHD).exists():
        missing.append("sshd")
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"nft{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "this kernel or container allows no network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@contextmanager
def machines(count: int, folder: Path) -> Iterator[Machines]:
    """`count` machines for the time of the block; nothing of them is left behind, whatever happens in it."""
    tag = f"nf{os.getpid() % 100_000}"
    net = f"10.231.{os.getpid() % 250 + 1}"
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (folder / "authorized").write_text(key.with_suffix(".pub").read_text())
    with ExitStack() as stack:
        _ip("link", "add", f"{tag}br", "type", "bridge")
        stack.callback(_ip, "link", "delete", f"{tag}br")
        _ip("address", "add", f"{net}.1/24", "dev", f"{tag}br")
        _ip("link", "set", f"{tag}br", "up")
        addresses = tuple(f"{net}.{11 + number}" for number in range(count))
        homes = tuple(folder / f"machine{number}" for number in range(count))
        for number, (address, home) in enumerate(zip(addresses, homes, strict=True)):
            _wire(stack, f"{tag}n{number}", f"{tag}v{number}", f"{tag}br", address, gateway=f"{net}.1")
            stack.enter_context(_sshd(f"{tag}n{number}", home, address, folder / "authorized"))
        yield Machines(addresses=addresses, homes=homes, key=key)


def _wire(stack: ExitStack, space: str, link: str, bridge: str, address: str, *, gateway: str) -> None:
    _ip("netns", "add", space)
    stack.callback(_ip, "netns", "delete", space)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
    # The space may outlast its name for a while, where other spaces have been made since; its wire shall not.
    stack.callback(subprocess.run, ["ip", "link", "delete", link], capture_output=True)
    _ip("link", "set", link, "master", bridge, "up")
    for command in (
        ("address", "add", f"{address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("link", "set", "lo", "up"),
        # Ray finds a node's own address by the way that leads out.
        ("route", "add", "default", "via", gateway),
    ):
        _ip("-n", space, *command)


@contextmanager
def _sshd(space: str, home: Path, address: str, authorized: Path) -> Iterator[None]:
    (home / "ray").mkdir(parents=True)
    (home / ".bashrc").touch()
    host_key = home / "host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key)], check=True)
    (home / "sshd_config").write_text(
        f"ListenAddress {address}:22\nHostKey {host_key}\nAuthorizedKeysFile {authorized}\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\nUsePAM no\n"
        "PidFile none\nMaxSessions 100\nMaxStartups 100\n"
    )
    Path("/tmp/ray").mkdir(exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    # A home of its own; HOME alone would not do, as `ssh` looks for `~` here.
    users = Path("/etc/passwd").read_text().splitlines()
    users = [
        ":".join([*u.split(":")[:5], str(home), "/bin/bash"]) if u.startswith("root:") else u for u in users
    ]
    (home / "passwd").write_text("\n".join(users) + "\n")
    # Ray keeps a node's sessions and the launcher's notes in /tmp/ray, which machines do not share.
    mounts = f"mount --bind {home}/ray /tmp/ray && mount --bind {home}/passwd /etc/passwd"
    inside = f"{mounts} && exec {_SSHD} -D -e -f {home}/sshd_config"
    command = ["ip", "netns", "exec", space, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (home / "sshd.log").open("wb") as log:
        server = subprocess.Popen([*command, "sh", "-c", inside], stdout=log, stderr=log)
    try:
        _wait_for(address, server, home / "sshd.log")
        yield
    finally:
        server.kill()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            socket.create_connection((address, 22), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"no SSH server at {address}: {log.read_text()}")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
