"""The history for those who read it."""

from __future__ import annotations

from typing import Any

from pipelines.registry.connection import asking
from pipelines.registry.history import Move, read_record
from pipelines.registry.moves import settle
from pipelines.workspace import Workspace


def history(workspace: Workspace) -> list[Move]:
    """All moves, newest first.

    Before, those are completed that a crash has left, and what others did to the alias is entered.

    Raises:
        CapabilityError: the registry does not answer.
    """
    with asking(workspace) as client:
        return settle(client, workspace)


def records(moves: list[Move], workspace: Workspace) -> list[dict[str, Any]]:
    """These moves with all that was written down of each: both reports, the gate's settings and its table.

    Raises:
        CapabilityError: the registry does not answer.
    """
    with asking(workspace) as client:
        return [{**read_record(client, move), **move.to_dict()} for move in moves]
