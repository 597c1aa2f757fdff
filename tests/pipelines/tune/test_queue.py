"""The queue of trials, without Ray: who comes next, and how many have room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nafnet_core import CapabilityError
from pipelines.train import room as room_module
from pipelines.tune.ledger import Score, TrialLedger
from pipelines.tune.queue import Room, TrialQueue
from pipelines.tune.space import Space
from pipelines.tune.tuner import keep_credentials_here
from tests.pipelines.tune import searches


def _queue(tmp_path: Path, ledger: TrialLedger, room: int = 2, **search: Any) -> TrialQueue:
    config = searches.config(tmp_path, **search)
    return TrialQueue(
        config, Space(config), ledger, begin=lambda trial: {"number": trial.number}, capacity=lambda: room
    )


def _score(ledger: TrialLedger, number: int, *, goes_on: bool = True) -> None:
    ledger.score(number, Score(step=1, samples=8, psnr_db=25.0, goes_on=goes_on))


def test_no_more_begin_than_have_room_nor_than_are_wanted(tmp_path: Path) -> None:
    ledger = TrialLedger(tmp_path / "t.jsonl")
    queue = _queue(tmp_path, ledger, trials=3)
    assert [queue.suggest("a"), queue.suggest("b"), queue.suggest("c")] == [
        {"number": 1},
        {"number": 2},
        None,
    ]
    queue.on_trial_complete("a", {"state": "finished", "error": None})
    assert queue.suggest("c") == {"number": 3}
    queue.on_trial_complete("b", {"state": "finished", "error": None})
    assert queue.suggest("d") is None  # the last may fail yet
    queue.on_trial_complete("c", {"state": "finished", "error": None})
    assert queue.suggest("d") == "FINISHED"


def test_a_failed_trial_is_replaced_and_too_many_end_the_search(tmp_path: Path) -> None:
    ledger = TrialLedger(tmp_path / "t.jsonl")
    queue = _queue(tmp_path, ledger, room=1, trials=1, max_failed=1)
    queue.suggest("a")
    queue.on_trial_complete("a", error=True)
    assert ledger.trials[1].error == "its process or node died again and again"
    assert queue.suggest("b") == {"number": 2}
    queue.on_trial_complete("b", {"state": "failed", "error": "diverged"})
    assert queue.suggest("c") == "FINISHED"
    assert queue.failure == "2 trials failed, the last: diverged"


def test_what_a_killed_search_has_left_comes_first(tmp_path: Path) -> None:
    ledger = TrialLedger(tmp_path / "t.jsonl")
    first = _queue(tmp_path, ledger, trials=4)
    first.suggest("a"), first.suggest("b")
    _score(ledger, 1)
    again = _queue(tmp_path, TrialLedger(tmp_path / "t.jsonl"), trials=4, room=3)
    assert [again.suggest(name) for name in "abc"] == [{"number": 1}, {"number": 2}, {"number": 3}]


def test_an_end_is_what_the_scheduler_or_the_trial_says(tmp_path: Path) -> None:
    ledger = TrialLedger(tmp_path / "t.jsonl")
    queue = _queue(tmp_path, ledger, trials=4, room=4)
    for name in "abc":
        queue.suggest(name)
    _score(ledger, 1, goes_on=False)
    queue.on_trial_complete("a", {"psnr_db": 25.0})  # Tune's last result of one that the scheduler stopped
    queue.on_trial_complete("b", {"state": "interrupted", "error": None})  # by Ctrl-C
    _score(ledger, 3)
    queue.on_trial_complete("c", {"state": "finished", "error": None})
    assert [ledger.trials[n].outcome for n in (1, 2, 3)] == ["stopped", None, "finished"]


def test_a_grid_ends_with_its_points(tmp_path: Path) -> None:
    ledger = TrialLedger(tmp_path / "t.jsonl")
    space = {"optim.lr": {"choice": [1e-3, 2e-3]}}
    queue = _queue(tmp_path, ledger, trials=9, searcher="grid", space=space, room=9)
    assert [queue.suggest(name) for name in "abc"] == [{"number": 1}, {"number": 2}, None]
    queue.on_trial_complete("a", {"state": "failed", "error": "diverged"})
    queue.on_trial_complete("b", {"state": "finished", "error": None})
    assert queue.suggest("c") == "FINISHED"


@pytest.mark.parametrize(
    ("nodes", "scaling", "room"),
    [
        ([{"CPU": 2.0}], {}, 2),  # a worker takes 0.75, its reader 0.2
        ([{"CPU": 1.9}], {"num_workers": 2}, 1),
        ([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}], {"num_workers": 2}, 1),  # of several nodes, never halves
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0}], {"use_gpu": True}, 4),
        ([{"CPU": 2.0, "GPU": 8.0}], {"use_gpu": True, "cpus_per_worker": 0.8}, 2),
        ([{"CPU": 4.0}], {"num_workers": [2, 4]}, 2),  # elastic ones take the least
        ([{}], {}, 0),
    ],
)
def test_room_is_counted_node_by_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: Any, scaling: Any, room: int
) -> None:
    monkeypatch.setattr(room_module, "nodes", lambda: nodes)
    config = searches.config(tmp_path, {"scaling": scaling})
    assert Room(config)() == room


def test_a_trial_that_fits_no_node_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all nodes together would have enough."""
    monkeypatch.setattr(room_module, "nodes", lambda: [{"CPU": 0.5}, {"CPU": 0.5}])
    with pytest.raises(
        CapabilityError, match=r"no room.*1 × a worker with 0.95 CPUs.*2 × a node with 0.5 CPUs"
    ):
        Room(searches.config(tmp_path)).check()


def test_ray_tune_passes_no_keys_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a search on several hosts, a planted one is looked for everywhere: tests/cluster/test_hosts.py."""
    from ray.tune.execution.class_cache import _ActorClassCache

    class Trial:
        pass

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    keep_credentials_here()
    assert "planted" not in repr(vars(_ActorClassCache().get(Trial)))
