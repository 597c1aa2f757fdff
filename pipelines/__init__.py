"""Stages of the way from photos to a served model; `nafnet` on the command line, `Restorer` in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.restorer import Restorer

__all__ = ["Restorer"]


def __getattr__(name: str) -> Any:
    # On first use: it needs torch, and the command line's help does not.
    if name != "Restorer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines.restorer import Restorer

    return Restorer
