"""What MLflow is told of a run before its first row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_DIGEST_CHARS, _NAME_CHARS = 36, 500  # MLflow's limits


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A store that a run reads."""

    name: str
    digest: str
    place: str
    """Path, or URL without credentials."""
    context: str
    """`training` or `validation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """What is told of a run before its first row."""

    experiment_id: Callable[[], str]
    """Asks the server, so it is called where that may take time."""
    name: str
    params: Mapping[str, Any]
    """Flat; told once, as MLflow lets none change."""
    tags: Mapping[str, str]
    """Of this attempt: another machine may go on with the run."""
    data_sets: Sequence[DataSet] = ()


def flattened(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys: `{"a": {"b": 1}}` → `{"a.b": 1}`; lists are numbered."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def dataset_inputs(data_sets: Sequence[DataSet]) -> list[DatasetInput]:
    """As MLflow takes them; a store of both contexts, of which it keeps one, says so."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    contexts: dict[tuple[str, str], list[str]] = {}
    for data in data_sets:
        known = contexts.setdefault((data.name, data.digest), [])
        known += [] if data.context in known else [data.context]
    by_name = {(data.name, data.digest): data for data in data_sets}
    return [
        DatasetInput(
            Dataset(
                name=data.name[:_NAME_CHARS],
                digest=data.digest[:_DIGEST_CHARS],
                source_type=data.place.partition("://")[0] if "://" in data.place else "local",
                source=json.dumps({"uri": data.place}),
                profile=json.dumps({"digest": data.digest}),
            ),
            [InputTag("mlflow.data.context", ", ".join(contexts[key]))],
        )
        for key, data in by_name.items()
    ]
