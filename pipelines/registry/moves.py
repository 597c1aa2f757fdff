"""One move at a time: claimed under a number, carried out, closed; and what a crash has left, completed.

A move is claimed by making its version in `nafnet-deblur-moves`, with the state `open`. Whoever has claimed
looks for open moves of a lower number. One whose process is alive is waited for; one whose process is over
is completed first: the alias tells whether it had been carried out. Then the one who has claimed looks
whether the champion is still the one that it means to follow, moves the alias, and closes its move. The alias
is the only point of commitment: whatever is killed, it names the old champion or the new one.

MLflow sets an alias without comparing. So that one who was held up for long does not overwrite what others
have done since, it moves the alias only within 30 s of its claim, by its own clock, and others take an open
move of another machine for given up after 120 s. It would have to be held up for 90 s between looking at
its clock and the call of MLflow.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from nafnet_core import CapabilityError
from pipelines.console import TOLD
from pipelines.models import REGISTERED_NAME, alias_version
from pipelines.processes import is_dead, machine_id, this_process
from pipelines.registry.connection import retried
from pipelines.registry.history import (
    ABANDONED,
    DELETE,
    DONE,
    HISTORY,
    MOVES,
    OPEN,
    OUTSIDE,
    PREFIX,
    RECORD,
    REFUSED,
    Move,
    champions,
    read_moves,
)
from pipelines.tracking import make_experiment
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_WAIT_S, _FENCE_S, _EXPIRE_S = 10.0, 30.0, 120.0
_POLL_S = 0.2
_CLAIM_ATTEMPTS = 20  # each of which MLflow tries three times; a number is lost to whoever was first
# Claims of this process that are under way; its others were left by an error.
_OURS: set[str] = set()
# A run is made as `KILLED`, and is that where the process ends before it has claimed.
_RUN_STATUS = {DONE: "FINISHED", ABANDONED: "KILLED", REFUSED: "FAILED"}


class OvertakenError(CapabilityError):
    """Somebody else moved the champion; nothing was changed here."""


def carry_out(
    client: MlflowClient,
    workspace: Workspace,
    record: Mapping[str, Any],
    *,
    obstacle: Callable[[], str | None],
    commit: Callable[[], object],
) -> Move:
    """Claim, wait for one's turn, commit, close.

    Args:
        client: on the registry.
        workspace: where files of the history lie, if there is no server.
        record: `action`, `from`, `to`, `reason`, and what else is to be kept.
        obstacle: asked once it is this move's turn: why it cannot be carried out any more; None if it can.
        commit: the one call that changes the registry.

    Raises:
        OvertakenError: there was an obstacle, or another process holds its turn for too long.
    """
    claimed_at = time.monotonic()
    token = uuid.uuid4().hex
    _OURS.add(token)
    try:
        move = _claim(client, workspace, record, OPEN, token)
        _wait_for_turn(client, move)
        found = obstacle()
        if found is None and time.monotonic() - claimed_at > _FENCE_S:
            found = "this machine or the registry was held up for half a minute"
        if found is not None:
            _close(client, move, ABANDONED, found)
            raise OvertakenError(
                f"{move.told()} was not carried out: {found}", fix="Run the command again if it still holds"
            )
        retried(commit)
        _close(client, move, DONE)
        return move
    finally:
        _OURS.discard(token)


def write_down(
    client: MlflowClient, workspace: Workspace, record: Mapping[str, Any], state: str, note: str = ""
) -> Move:
    """Enter into the history what moves nothing: that the gate refused."""
    token = uuid.uuid4().hex
    _OURS.add(token)
    try:
        move = _claim(client, workspace, record, state, token)
        _close(client, move, state, note)
        return move
    finally:
        _OURS.discard(token)


def settle(client: MlflowClient, workspace: Workspace) -> list[Move]:
    """Complete what crashes have left, enter what others have done to the alias; returns all moves."""
    moves = read_moves(client)
    left = [move for move in moves if move.state == OPEN and not _is_alive(move, _now_ms())]
    for move in reversed(left):
        _complete(client, move)
    _end_runs_without_a_move(client)
    if left:
        moves = read_moves(client)
    if _is_moved_outside(client, moves):
        known, found = champions(moves)[-1], alias_version(client, "champion")

        def obstacle() -> str | None:
            now = champions(read_moves(client))[-1], alias_version(client, "champion")
            return None if now == (known, found) else "it was entered or moved meanwhile"

        record = {
            "action": OUTSIDE,
            "from": known,
            "to": found,
            "reason": "the alias was moved by something else than `nafnet registry`",
        }
        try:
            carry_out(client, workspace, record, obstacle=obstacle, commit=lambda: None)
            log.warning("the champion was moved from %s to %s by something else: entered", known, found)
        except OvertakenError:  # another command has found it too, and enters it
            pass
        moves = read_moves(client)
    return moves


def user_name() -> str:
    """Who is at work, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def version_exists(client: MlflowClient, version: int | None) -> bool:
    """Whether a version of the model is there, and not deleted."""
    from mlflow.exceptions import MlflowException

    if version is None:
        return False
    try:
        client.get_model_version(REGISTERED_NAME, str(version))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def make_registered_model(client: MlflowClient, name: str, description: str) -> None:
    """Make a registered model where it is not there yet."""
    from mlflow.exceptions import MlflowException

    try:
        retried(lambda: client.create_registered_model(name, description=description))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _claim(
    client: MlflowClient, workspace: Workspace, record: Mapping[str, Any], state: str, token: str
) -> Move:
    """Write the record, then take a number: all that others need is there as soon as the number is."""
    from mlflow.exceptions import MlflowException

    owner = this_process()
    told = {
        "action": record["action"],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "user": user_name(),
        "from": "" if record["from"] is None else str(record["from"]),
        "to": "" if record["to"] is None else str(record["to"]),
        "reason": record.get("reason") or "",
    }
    if record.get("gain_db") is not None:
        told["gain_db"] = f"{record['gain_db']:.4f}"
    tags = {f"{PREFIX}{key}": value for key, value in told.items() if value}
    tags |= {f"{PREFIX}token": token, f"{PREFIX}owner": json.dumps(owner)}
    run_id = _write_record(client, workspace, {**told, **record, "host": owner["host"]}, tags)
    tags[f"{PREFIX}state"] = state
    source = f"runs:/{run_id}/{RECORD}"
    for attempt in range(_CLAIM_ATTEMPTS):
        try:
            made = retried(
                lambda: client.create_model_version(MOVES, source=source, run_id=run_id, tags=tags)
            )
            break
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                make_registered_model(client, MOVES, f"Moves of {REGISTERED_NAME}'s champion: the history")
            elif "creation error" not in str(error).lower() or attempt == _CLAIM_ATTEMPTS - 1:
                raise
    return next(move for move in read_moves(client) if move.number == int(made.version))


def _write_record(
    client: MlflowClient, workspace: Workspace, record: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    experiment = retried(lambda: make_experiment(client, HISTORY, workspace))
    if record["action"] == DELETE:
        name = f"delete {record['from']}"
    else:
        name = f"{record['action']} {record['from'] or 'none'} → {record['to'] or 'none'}"
    run = retried(lambda: client.create_run(experiment, run_name=name, tags=dict(tags)))
    client.log_dict(run.info.run_id, dict(record), RECORD)
    retried(lambda: client.set_terminated(run.info.run_id, status="KILLED"))
    return run.info.run_id


def _wait_for_turn(client: MlflowClient, mine: Move) -> None:
    """Until no move of a lower number is open; completes those that a crash has left."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        before = [m for m in read_moves(client) if m.state == OPEN and m.number < mine.number]
        if not before:
            return
        first = before[-1]
        if first.token == mine.token:
            # The server's answer to our first call was lost, and MLflow called again.
            _close(client, first, ABANDONED, f"claimed twice: it is move {mine.number}")
        elif not _is_alive(first, mine.claimed_ms):
            _complete(client, first)
        elif time.monotonic() > deadline:
            owner = f"process {first.owner.get('pid')} on {first.owner.get('host')}"
            _close(client, mine, ABANDONED, f"{owner} was at work on move {first.number}")
            raise OvertakenError(
                f"another move is under way: {first.told()}, by {first.user}",
                got=f"{owner}, since {first.time}",
                fix=f"Wait for it; if it was killed, run this again in {_EXPIRE_S:.0f} s",
            )
        else:
            time.sleep(_POLL_S)


def _is_alive(move: Move, now_ms: int) -> bool:
    """Whether the process of an open move may still be at it."""
    return _is_at_work(move.owner, move.token, now_ms - move.claimed_ms)


def _is_at_work(owner: Mapping[str, Any], token: str | None, age_ms: int) -> bool:
    if owner.get("machine") == machine_id():
        return token in _OURS if owner.get("pid") == os.getpid() else not is_dead(dict(owner))
    return age_ms < 1000 * _EXPIRE_S


def _end_runs_without_a_move(client: MlflowClient) -> None:
    """Runs of processes that were killed before they claimed: they are not running, as MLflow would show."""
    experiment = client.get_experiment_by_name(HISTORY)
    if experiment is None:
        return
    for run in client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'"):
        owner = json.loads(run.data.tags.get(f"{PREFIX}owner", "{}"))
        age_ms = _now_ms() - run.info.start_time
        if not _is_at_work(owner, run.data.tags.get(f"{PREFIX}token"), age_ms):
            retried(lambda run=run: client.set_terminated(run.info.run_id, status="KILLED"))


def _complete(client: MlflowClient, move: Move) -> None:
    """Close the move of a process that is over, by what it has changed, and say so."""
    if move.action == DELETE:
        is_done = not version_exists(client, move.before)
    else:
        is_done = alias_version(client, "champion") == move.to
    note = "had been carried out" if is_done else "had not been carried out"
    _close(client, move, DONE if is_done else ABANDONED, f"interrupted; {note}")
    line = "move %d (%s, by %s at %s) was interrupted; it %s. The history is complete again"
    log.info(line, move.number, move.told(), move.user, move.time, note, extra=TOLD)


def _close(client: MlflowClient, move: Move, state: str, note: str = "") -> None:
    """Write down how a move ended; its state last, since that is what `settle` goes by."""
    told = {"number": str(move.number), "state": state, **({"note": note} if note else {})}
    for key, value in told.items():
        retried(lambda key=key, value=value: client.set_tag(move.run_id, f"{PREFIX}{key}", value))
    retried(lambda: client.set_terminated(move.run_id, status=_RUN_STATUS[state]))
    version = str(move.number)
    if note:
        retried(lambda: client.set_model_version_tag(MOVES, version, f"{PREFIX}note", note))
    if state != move.state:
        retried(lambda: client.set_model_version_tag(MOVES, version, f"{PREFIX}state", state))


def _is_moved_outside(client: MlflowClient, moves: list[Move]) -> bool:
    """Whether the alias is not where the moves have left it, and none is under way that would tell why."""
    if any(move.state == OPEN for move in moves):
        return False
    if alias_version(client, "champion") == champions(moves)[-1]:
        return False
    # A move may have begun and ended between the two looks.
    return [move.number for move in read_moves(client)] == [move.number for move in moves]


def _now_ms() -> int:
    return int(1000 * time.time())
