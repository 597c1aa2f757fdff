"""What was moved: read from the registry, newest first, and what follows from it.

Each move is a version of a second registered model, `nafnet-deblur-moves`: MLflow numbers versions under a
primary key, on SQLite, on PostgreSQL and through a server alike, so a number is given out once, in order, and
never again. Its tags are what a table needs; the MLflow run that it belongs to, in the experiment
`nafnet-deblur-history`, holds all of it, as `record.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.models import REGISTERED_NAME
from pipelines.tracking import fluent

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

MOVES = f"{REGISTERED_NAME}-moves"
HISTORY = f"{REGISTERED_NAME}-history"
RECORD = "record.json"
PREFIX = "nafnet."

OPEN, DONE, ABANDONED, REFUSED = "open", "done", "abandoned", "refused"
"""States of a move: claimed and not told how it ended; carried out; not carried out; refused by the gate."""
PROMOTE, FORCE, ROLLBACK, OUTSIDE, DELETE = "promote", "force", "rollback", "outside", "delete"
"""What a move does. `force` promotes what the gate refused; `outside` is what was found of another hand."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One line of the history."""

    number: int
    """Of this move; numbers only grow, and none is given twice."""
    state: str
    action: str
    time: str
    """UTC, when it was claimed."""
    user: str
    before: int | None
    """The champion until then; of a deletion the version that is deleted."""
    to: int | None
    """The champion from then on, where the move was carried out; None of a deletion."""
    reason: str
    note: str
    """How it ended, where that needs words."""
    gain_db: float | None
    """PSNR over the one before, or over the blurred input."""
    run_id: str
    owner: dict[str, Any]
    """The process that claimed it."""
    token: str
    """What that process knows its own claim by."""
    claimed_ms: int
    """By the registry's clock, since 1970."""

    @property
    def is_promotion(self) -> bool:
        return self.action in (PROMOTE, FORCE, OUTSIDE)

    def told(self) -> str:
        """As `promote 1 → 2`."""
        if self.action == DELETE:
            return f"delete {self.before}"
        return f"{self.action} {self.before or 'none'} → {self.to or 'none'}"

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        return {name: content[name] for name in content if name not in ("owner", "token", "claimed_ms")}


def read_moves(client: MlflowClient) -> list[Move]:
    """All moves, newest first."""
    found: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{MOVES}'", page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return sorted((_move(row) for row in found), key=lambda move: move.number, reverse=True)


def champions(moves: Sequence[Move]) -> list[int | None]:
    """Who was champion, the present one last, without those that were undone.

    A promotion is laid on top, a rollback takes the top away. So two rollbacks in a row go two back, and one
    after a promotion that followed a rollback comes to the one that had been rolled back to.
    """
    stack: list[int | None] = [None]
    for move in sorted(moves, key=lambda move: move.number):
        if move.state != DONE:
            continue
        if move.is_promotion:
            stack.append(move.to)
        elif move.action == ROLLBACK and len(stack) > 1:
            stack.pop()
    return stack


def previous(moves: Sequence[Move]) -> int | None:
    """Whom `rollback` would make champion again; None where there was none before."""
    stack = champions(moves)
    return stack[-2] if len(stack) > 1 else None


def read_record(client: MlflowClient, move: Move) -> dict[str, Any]:
    """All that was written down of a move: reports, gate and its table.

    Empty, with a warning, where its file is gone: no move may depend on what files of others have become.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        with fluent(client):
            path = mlflow.artifacts.download_artifacts(artifact_uri=f"runs:/{move.run_id}/{RECORD}")
        return json.loads(Path(path).read_text())
    except (MlflowException, OSError, ValueError) as error:
        log.warning("the record of move %d cannot be read: %s", move.number, str(error).splitlines()[0])
        return {}


def promoted_report(
    client: MlflowClient, moves: Sequence[Move], version: int | None
) -> dict[str, Any] | None:
    """The report by which a version last became champion; None where it did without one."""
    made = (move for move in moves if move.is_promotion and move.to == version and move.state == DONE)
    newest = max(made, key=lambda move: move.number, default=None)
    return None if newest is None else read_record(client, newest).get("candidate")


def _move(row: ModelVersion) -> Move:
    tags = {key.removeprefix(PREFIX): value for key, value in row.tags.items()}
    return Move(
        number=int(row.version),
        state=tags["state"],
        action=tags["action"],
        time=tags["time"],
        user=tags["user"],
        before=_whole(tags.get("from")),
        to=_whole(tags.get("to")),
        reason=tags.get("reason", ""),
        note=tags.get("note", ""),
        gain_db=None if "gain_db" not in tags else float(tags["gain_db"]),
        run_id=row.run_id or "",
        owner=json.loads(tags["owner"]),
        token=tags["token"],
        claimed_ms=row.creation_timestamp,
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text else None
