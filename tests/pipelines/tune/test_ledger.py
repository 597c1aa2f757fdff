"""The ledger of trials: what a killed search finds again."""

from __future__ import annotations

from pathlib import Path

from pipelines.tracking import read_rows
from pipelines.tune.ledger import Score, TrialLedger
from pipelines.tune.record import SearchJournal, write_table


def _score(samples: int, psnr_db: float, *, goes_on: bool = True) -> Score:
    return Score(step=samples // 10, samples=samples, psnr_db=psnr_db, goes_on=goes_on)


def _filled(path: Path) -> TrialLedger:
    ledger = TrialLedger(path)
    for number in (1, 2, 3, 4):
        ledger.begin(number, {"optim.lr": number / 1000})
    ledger.score(1, _score(10, 24.0))
    ledger.score(2, _score(10, 23.0, goes_on=False))
    ledger.score(1, _score(40, 25.0))
    ledger.end(2, "stopped")
    ledger.score(1, _score(160, 24.5))
    ledger.end(1, "finished")
    ledger.score(3, _score(10, 30.0))
    ledger.end(3, "failed", "diverged")
    ledger.score(4, _score(10, 26.0))
    return ledger


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = _filled(tmp_path / "trials.jsonl")
    read = TrialLedger(tmp_path / "trials.jsonl")
    assert read.trials == written.trials
    assert read.history == written.history
    assert [trial.number for trial in read.running()] == [4]
    assert read.trials[3].error == "diverged"
    assert read.samples == 160 + 10 + 10 + 10
    assert (read.trials[1].psnr_db, read.trials[1].samples, read.trials[1].state) == (25.0, 160, "finished")


def test_the_best_had_the_whole_budget_and_did_not_fail(tmp_path: Path) -> None:
    ledger = _filled(tmp_path / "trials.jsonl")
    best = ledger.best()
    assert best is not None and best.number == 1  # 26.0 is of a tenth of the budget, 30.0 of one that failed


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    whole = _filled(path).trials
    with path.open("ab") as file:
        file.write(b'{"event": "end", "trial": 4, "outc')
    again = TrialLedger(path)
    assert again.trials == whole
    again.end(4, "finished")
    assert TrialLedger(path).trials[4].outcome == "finished"


def test_the_search_has_its_curve_once_however_often_it_goes_on(tmp_path: Path) -> None:
    path, journal = tmp_path / "trials.jsonl", tmp_path / "metrics.jsonl"
    ledger = _filled(path)
    SearchJournal(journal).catch_up(ledger)
    ledger.score(4, _score(40, 27.0))
    again = SearchJournal(journal)
    again.catch_up(TrialLedger(path))
    again.catch_up(TrialLedger(path))
    rows = read_rows(journal)
    # Samples of all trials together, so that the curve never goes back.
    assert [row.samples for row in rows] == [10, 20, 50, 170, 180, 190, 220]
    assert [row.metrics["search/best_psnr_db"] for row in rows] == [24, 24, 25, 25, 30, 30, 30]
    assert rows[-1].metrics["search/trials_ended"] == 2
    assert rows[-1].metrics["search/trials_failed"] == 1


def test_the_table_has_the_best_first(tmp_path: Path) -> None:
    ledger = _filled(tmp_path / "trials.jsonl")
    lines = write_table(tmp_path / "t.csv", list(ledger.trials.values())).read_text().splitlines()
    assert lines[0] == "trial,lr,psnr_db,samples,state,error"
    assert lines[1:3] == ["3,0.003,30.0000,10,failed,diverged", "4,0.004,26.0000,10,running,"]
