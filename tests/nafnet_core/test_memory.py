from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from nafnet_core import memory
from nafnet_core.memory import free_memory_mib

CPU = torch.device("cpu")


def test_free_memory_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_read_number", lambda path: None)
    assert free_memory_mib(CPU) == pytest.approx(psutil.virtual_memory().available / 2**20, rel=0.3)


def test_free_memory_heeds_the_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"memory.max": 300 * 2**20, "memory.current": 100 * 2**20}
    monkeypatch.setattr(memory, "_read_number", lambda path: limits[path.name])
    assert free_memory_mib(CPU) == 200
    limits["memory.current"] = 400 * 2**20
    assert free_memory_mib(CPU) == 0


def test_without_proc_half_of_the_memory_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_read_number", lambda path: None)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "nothing")
    assert free_memory_mib(CPU) == pytest.approx(psutil.virtual_memory().total / 2**21, rel=0.01)
