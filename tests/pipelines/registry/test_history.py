"""What follows from a history: who is champion, and whom a rollback would restore."""

from __future__ import annotations

import pytest

from pipelines.registry.history import Move, champions, previous


def _moves(*told: str) -> list[Move]:
    """Moves as `promote 2`, `rollback`, `delete 3`, `outside`; a state may follow."""
    moves = []
    for number, text in enumerate(told, start=1):
        action, *rest = text.split()
        state = rest.pop() if rest and not rest[-1].isdigit() else "done"
        to = int(rest[0]) if rest and action != "delete" else None
        before = int(rest[0]) if action == "delete" else None
        moves.append(
            Move(
                number=number, state=state, action=action, time="", user="", before=before, to=to, reason="",
                note="", gain_db=None, run_id="", owner={}, token="", claimed_ms=0,
            )
        )  # fmt: skip
    return moves[::-1]


@pytest.mark.parametrize(
    ("told", "champion", "before"),
    [
        ([], None, None),
        (["promote 1"], 1, None),
        (["promote 1", "promote 2"], 2, 1),
        (["promote 1", "promote 2", "promote 3", "rollback", "rollback"], 1, None),
        (["promote 1", "promote 2", "rollback", "promote 3"], 3, 1),
        (["promote 1", "promote 2", "rollback", "force 2"], 2, 1),
        (["promote 1", "promote 2 refused", "promote 3 abandoned", "promote 4 open"], 1, None),
        (["promote 1", "promote 2", "delete 1"], 2, 1),
        (["promote 1", "outside 2"], 2, 1),
        (["promote 1", "outside"], None, 1),
        (["promote 1", "promote 2", "rollback abandoned"], 2, 1),
    ],
)
def test_promotions_are_laid_on_top_and_rollbacks_take_the_top_away(
    told: list[str], champion: int | None, before: int | None
) -> None:
    moves = _moves(*told)
    assert champions(moves)[-1] == champion
    assert previous(moves) == before


def test_a_move_is_told_in_words() -> None:
    assert [move.told() for move in _moves("promote 1", "delete 3")] == ["delete 3", "promote none → 1"]
