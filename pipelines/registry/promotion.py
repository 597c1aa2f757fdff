"""Promotion through the gate, the way back, and deletion: each one move of the history."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nafnet_core import InputError
from pipelines.evaluate import Pairs, Report
from pipelines.gate import Check, GateSettings, PromotionRefusedError, failed, judge, latency_ratio
from pipelines.models import REGISTERED_NAME, alias_version, open_model
from pipelines.registry.connection import asking, retried
from pipelines.registry.history import (
    DELETE,
    FORCE,
    PROMOTE,
    REFUSED,
    ROLLBACK,
    Move,
    champions,
    previous,
    promoted_report,
    read_moves,
)
from pipelines.registry.moves import carry_out, settle, version_exists, write_down
from pipelines.registry.reports import Progress, report_of
from pipelines.registry.versions import CANDIDATE, CHAMPION, find_version
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow import MlflowClient


_LOGGED = "models:/m-"  # MLflow's name for files that `log_model` has written


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A move of the champion alias."""

    version: int
    before: int | None
    """The champion until now; the same as `version` where there was nothing to do."""
    checks: tuple[Check, ...]
    """The gate's table; empty where nothing was compared."""
    number: int | None = None
    """Of the move; None where there was nothing to do."""
    forced: bool = False
    """Whether the gate had refused."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "checks": [check.to_dict() for check in self.checks]}


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What the gate found, of which the record is made."""

    checks: tuple[Check, ...]
    reports: tuple[Report, Report | None]
    obstacle: str | None
    """Why the two cannot be compared at all."""

    @property
    def gain_db(self) -> float | None:
        if self.obstacle is not None:
            return None
        candidate, champion = self.reports
        base = champion.psnr_restored_db if champion else candidate.psnr_blurred_db
        return candidate.psnr_restored_db - base

    @property
    def is_refused(self) -> bool:
        return self.obstacle is not None or bool(failed(self.checks))


def promote(
    workspace: Workspace,
    *,
    version: int | None = None,
    on: Path | str,
    settings: GateSettings,
    reason: str = "",
    force: bool = False,
    on_progress: Progress = lambda done, total: None,
) -> Promotion:
    """Make a version the champion if it passes the gate.

    All that takes long is done before the move is claimed: reports, timing, the gate.

    Args:
        workspace: its MLflow store is the registry.
        version: which; None takes the `candidate`.
        on: store that both models are scored on, where a report is not there already.
        settings: the gate.
        reason: for the history.
        force: promote although the gate refuses; needs a reason.
        on_progress: images scored.

    Raises:
        PromotionRefusedError: by the gate; the failed checks are named.
        InputError: no such version or store, two reports that cannot be compared, force without a reason.
        OvertakenError: somebody else moved the champion meanwhile.
        CapabilityError: the registry does not answer.
    """
    if force and not reason.strip():
        raise InputError("--force needs --reason", fix="Both go into the history")
    with asking(workspace) as client:
        settle(client, workspace)
        number = find_version(client, CANDIDATE if version is None else str(version))
        before = alias_version(client, CHAMPION)
        if number == before:
            return Promotion(version=number, before=before, checks=())
        judged = _judge(number, before, on, settings, workspace, on_progress, force=force)
        is_forced = force and judged.is_refused
        record = {
            "action": FORCE if is_forced else PROMOTE,
            "from": before,
            "to": number,
            "reason": reason,
            "gain_db": judged.gain_db,
            "gate": {
                "settings": asdict(settings),
                "checks": [check.to_dict() for check in judged.checks],
                "not_compared": judged.obstacle,
            },
            "candidate": judged.reports[0].model_dump(),
            "champion": judged.reports[1] and judged.reports[1].model_dump(),
        }
        if judged.is_refused and not force:
            write_down(client, workspace, record, REFUSED, "; ".join(failed(judged.checks)))
            raise PromotionRefusedError(number, before, judged.checks)
        move = _move_champion(client, workspace, record)
        return Promotion(
            version=number, before=before, checks=judged.checks, number=move.number, forced=is_forced
        )


def rollback(workspace: Workspace, *, reason: str = "") -> Promotion:
    """Make the one before the champion again; see `history.champions` for which that is.

    Raises:
        InputError: there was none before, or it was deleted.
        OvertakenError: somebody else moved the champion meanwhile.
        CapabilityError: the registry does not answer.
    """
    with asking(workspace) as client:
        moves = settle(client, workspace)
        before, target = champions(moves)[-1], previous(moves)
        if target is None:
            raise InputError(
                "there is nothing to roll back to",
                got=f"champion {before}, the first there was" if before else "no champion",
                fix="`nafnet registry promote VERSION --on STORE` makes another one champion",
            )
        if not version_exists(client, target):
            raise InputError(
                "the champion before this one was deleted",
                got=f"version {target}",
                fix="`nafnet registry promote VERSION --on STORE` makes another one champion",
            )
        record = {
            "action": ROLLBACK,
            "from": before,
            "to": target,
            "reason": reason,
            # The reports by which each once became champion: nothing is compared anew.
            "candidate": promoted_report(client, moves, target),
            "champion": promoted_report(client, moves, before),
        }
        move = _move_champion(client, workspace, record, is_rollback=True)
        return Promotion(version=target, before=before, checks=(), number=move.number)


def delete(name: str, workspace: Workspace, *, force: bool = False, reason: str = "") -> Move:
    """Delete a version from the registry. Its files stay until `mlflow gc`.

    Args:
        name: the version's number, or an alias.
        workspace: its MLflow store is the registry.
        force: delete even the one that `rollback` would restore.
        reason: for the history.

    Raises:
        InputError: no such version; it is the champion, or what `rollback` would restore.
        OvertakenError: it became champion meanwhile.
        CapabilityError: the registry does not answer.
    """
    with asking(workspace) as client:
        moves = settle(client, workspace)
        number = find_version(client, name)
        if number == alias_version(client, CHAMPION):
            raise InputError(
                "the champion is not deleted", got=f"version {number}", fix="Promote another, or roll back"
            )
        if number in champions(moves) and not force:
            raise InputError(
                "a rollback would come to this version",
                got=f"version {number}",
                fix="--force deletes it all the same",
            )
        record = {"action": DELETE, "from": number, "to": None, "reason": reason}

        def obstacle() -> str | None:
            if number == alias_version(client, CHAMPION):
                return f"version {number} became champion meanwhile"
            return None if version_exists(client, number) else f"version {number} was deleted meanwhile"

        source = client.get_model_version(REGISTERED_NAME, str(number)).source or ""
        move = carry_out(
            client,
            workspace,
            record,
            obstacle=obstacle,
            commit=lambda: client.delete_model_version(REGISTERED_NAME, str(number)),
        )
        if source.startswith(_LOGGED):  # what `mlflow gc` goes by
            retried(lambda: client.delete_logged_model(source.removeprefix("models:/")))
        return move


def _judge(
    number: int,
    before: int | None,
    on: Path | str,
    settings: GateSettings,
    workspace: Workspace,
    on_progress: Progress,
    *,
    force: bool,
) -> _Judged:
    """Both reports and the gate's table; with `force` what makes them incomparable is kept, not raised."""
    candidate = open_model(f"models:/{REGISTERED_NAME}/{number}", workspace)
    champion = None if before is None else open_model(f"models:/{REGISTERED_NAME}/{before}", workspace)
    pairs = Pairs(on)
    report = report_of(candidate, pairs, workspace, on_progress)
    other = None if champion is None else report_of(champion, pairs, workspace, on_progress)
    try:
        judge(report, other, settings, latency_ratio=None)  # before they are timed
    except InputError as error:
        if not force:
            raise
        return _Judged(checks=(), reports=(report, other), obstacle=str(error))
    ratio = champion and latency_ratio(candidate, champion, pairs, settings.max_latency_ratio)
    checks = judge(report, other, settings, latency_ratio=ratio)
    return _Judged(checks=tuple(checks), reports=(report, other), obstacle=None)


def _move_champion(
    client: MlflowClient, workspace: Workspace, record: dict[str, Any], *, is_rollback: bool = False
) -> Move:
    before, number = record["from"], record["to"]

    def obstacle() -> str | None:
        now = alias_version(client, CHAMPION)
        if now != before:
            return f"the champion changed meanwhile, from {before or 'none'} to {now or 'none'}"
        # The same champion may have come back by another way, and then another one was before it.
        if is_rollback and previous(read_moves(client)) != number:
            return "the history changed meanwhile"
        return None if version_exists(client, number) else f"version {number} was deleted meanwhile"

    return carry_out(
        client,
        workspace,
        record,
        obstacle=obstacle,
        commit=lambda: client.set_registered_model_alias(REGISTERED_NAME, CHAMPION, str(number)),
    )
