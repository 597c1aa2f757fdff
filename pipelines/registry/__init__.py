"""The model registry: versions, the aliases `candidate` and `champion`, and the gate between them.

    nafnet registry register runs/mine --on stores/test
    nafnet registry promote --on stores/test
    nafnet registry list

The `champion` alias is the only point of commitment; `moves.py` says how it is moved.
"""

from __future__ import annotations

from pipelines.registry.comparison import Comparison, compare
from pipelines.registry.history import Move, previous
from pipelines.registry.moves import OvertakenError
from pipelines.registry.promotion import Promotion, delete, promote, rollback
from pipelines.registry.reading import history, records
from pipelines.registry.registering import register
from pipelines.registry.versions import Shown, Version, champion, show, version_of, versions

__all__ = [
    "Comparison",
    "Move",
    "OvertakenError",
    "Promotion",
    "Shown",
    "Version",
    "champion",
    "compare",
    "delete",
    "history",
    "previous",
    "promote",
    "records",
    "register",
    "rollback",
    "show",
    "version_of",
    "versions",
]
