"""Who is at work: a process as others write it down, and whether it is over."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import Any

import psutil

_CLOCK_S = 2.0


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, as JSON values."""
    return {
        "host": socket.gethostname(),
        "machine": machine_id(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def is_dead(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; of another machine's nothing is known."""
    if owner.get("machine") != machine_id():
        return False
    try:
        process = psutil.Process(int(owner["pid"]))
        # Some seconds: the system tells the time by a clock that is set now and then.
        is_another = abs(process.create_time() - owner["started"]) > _CLOCK_S
        return is_another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def machine_id() -> str | None:
    """Names what process numbers belong to: this boot of this machine, and a container's own numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"
