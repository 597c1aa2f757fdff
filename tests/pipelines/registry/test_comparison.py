"""Reports that lie with versions, where they are not of today's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nafnet_core import InputError
from pipelines import evaluate, registry
from pipelines.evaluate import Pairs
from pipelines.models import open_model
from pipelines.store import PairStore
from pipelines.workspace import Workspace
from tests.pipelines.registry.brighteners import write_brightener


def test_a_report_of_another_version_is_one_line(
    workspace: Workspace, store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = []
    for strength in (0.3, 0.8):
        (tmp_path / str(strength)).mkdir()
        weights = write_brightener(tmp_path / str(strength) / "model.safetensors", strength)
        result = evaluate.run(open_model(str(weights), workspace), Pairs(store.root), workspace)
        weights.with_name("report.json").write_bytes(result.path.read_bytes())
        specs.append(str(weights))
    monkeypatch.setattr("pipelines.registry.comparison.spec_of", lambda name: name)
    assert registry.compare(*specs, workspace).gain_db != 0
    own = Path(specs[0]).with_name("report.json")
    own.write_text(json.dumps({**json.loads(own.read_text()), "schema_version": 1}))
    with pytest.raises(InputError, match="of another version .*version 1.* Name a store to score both on"):
        registry.compare(*specs, workspace)
