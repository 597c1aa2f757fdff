"""How much memory an image may take. Running out of it kills a process on the CPU: it is asked beforehand."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory_mib(device: torch.device) -> float:
    """Memory that a new allocation can count on, on the device that the network runs on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    available = _available_bytes()
    limit, used = (_read_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:  # a container's own limit
        available = min(available, limit - used)
    return max(0, available) / 2**20


def give_back_freed() -> None:
    """Hand what was freed back to the kernel, where the C library keeps it for later (glibc).

    Decoding a photo of 48 megapixels leaves 400 MiB behind in this way.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library
        pass


def _available_bytes() -> int:
    """What the kernel would hand out without swapping; half of all memory where it does not say."""
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None
