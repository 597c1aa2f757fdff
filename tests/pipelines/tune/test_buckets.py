"""A search whose trials keep their state in a bucket: nothing else is shared between nodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.store import PairStore
from tests.pipelines.buckets import Server
from tests.pipelines.tune import searches
from tests.pipelines.tune.searches import Search

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_trials_in_a_bucket_are_stopped_resumed_and_won(
    store: PairStore, tmp_path: Path, s3: Server, bucket: str
) -> None:
    changes = {
        "budget": {"samples": 2048},
        "checkpoint": {"every_minutes": 0.02, "storage": s3.url(f"{bucket}/runs")},
    }
    recipe = searches.recipe(tmp_path / "recipe.yaml", changes, trials=3, rungs=2)
    search = Search(tmp_path, recipe, store.root)
    search.start()
    search.wait_for(lambda: search.ledger().trials and search.ledger().trials[1].scores)
    search.kill()
    result = search.run()
    assert {trial["state"] for trial in result["trials"]} <= {"finished", "stopped"}
    assert len(result["trials"]) == 3
    for number in (1, 2, 3):
        assert sum(row.get("event") == "started" for row in search.journal(number)) == 1
    # The winner's checkpoints were brought here, for the registry.
    assert Path(result["weights"]).is_file()
    assert os.path.commonpath([result["weights"], search.workspace]) == str(search.workspace)
