"""The JSON schemas in docs/ are of today's report, and what `evaluate` writes follows them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel

from pipelines import evaluate
from pipelines.evaluate import Comparison, Pairs, Report
from pipelines.models import LoadedModel
from pipelines.workspace import Workspace

_DOCS = Path(__file__).resolve().parents[3] / "docs"
_SCHEMAS = {"evaluation-report": Report, "evaluation-comparison": Comparison}


def _content(kind: type[BaseModel]) -> str:
    return json.dumps(kind.model_json_schema(), indent=1) + "\n"


@pytest.mark.parametrize("name", _SCHEMAS)
def test_a_schema_is_current(name: str) -> None:
    told = "write it anew: python -m tests.pipelines.evaluate.test_schemas"
    assert (_DOCS / f"{name}.schema.json").read_text() == _content(_SCHEMAS[name]), told


def test_what_is_written_follows_the_schema(
    model: LoadedModel, other: LoadedModel, places: Path, workspace: Workspace
) -> None:
    result = evaluate.compare(model, other, Pairs(places / "store"), workspace)
    files = {"evaluation-comparison": result.path}
    files["evaluation-report"] = next(workspace.reports.glob("*/report.json"))
    for name, file in files.items():
        schema = json.loads((_DOCS / f"{name}.schema.json").read_text())
        jsonschema.validate(json.loads(file.read_text()), schema)
    content = json.loads(files["evaluation-report"].read_text())
    content["images"][0]["psnr_restored_db"] = "good"
    with pytest.raises(jsonschema.ValidationError, match="good"):
        jsonschema.validate(content, json.loads((_DOCS / "evaluation-report.schema.json").read_text()))


if __name__ == "__main__":
    for name, kind in _SCHEMAS.items():
        (_DOCS / f"{name}.schema.json").write_text(_content(kind))
