"""Rows of a benchmark: a figure, its unit, and what is asked of it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
Rows = dict[str, Row]

_LIMITS = {"at_least": "≥", "at_most": "≤"}


def row(value: float, unit: str, *, at_least: float | None = None, at_most: float | None = None) -> Row:
    """One figure; `holds` is None where nothing is asked of it."""
    holds = None
    if at_least is not None or at_most is not None:
        holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"value": value, "at_least": at_least, "at_most": at_most, "unit": unit, "holds": holds}


def show(rows: Rows, *, as_json: bool, versions: Mapping[str, str], machine: str | None = None) -> None:
    """Print a table, or one JSON object."""
    if as_json:
        machine = machine or f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        told = f"Python {platform.python_version()}, {told}"
        print(json.dumps({"rows": rows, "machine": machine, "versions": told}))
        return
    for name, content in rows.items():
        limits = " ".join(
            f"{sign} {content[key]:g}" for key, sign in _LIMITS.items() if content[key] is not None
        )
        told = "does not hold" if content["holds"] is False else ""
        print(f"{name:84} {content['value']:9.4g} {content['unit']:9} {limits} {told}".rstrip())
