"""What a run tells MLflow of itself before its first row: recipe, data, workers, machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.config import RunConfig
from pipelines.ingest import data_digests, plan_for
from pipelines.store import read_manifest
from pipelines.tracking import DataSet, Opening, flattened, machine_tags, make_experiment
from pipelines.train.trainer import build_model
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient


def opening(config: RunConfig, client: MlflowClient, workspace: Workspace) -> Opening:
    """Parameters, tags and data sets of a run."""
    data_sets = tuple(_data_sets(config))
    all_digests = data_digests(config.data, plan_for(config.data, seed=config.seed))
    # Whole: MLflow's own field for a data set's digest holds half of it.
    digests = {
        "data.val_digest" if data.context == "validation" else f"data.train.{number}.digest": data.digest
        for number, data in enumerate(data_sets)
    }
    return Opening(
        experiment_id=lambda: make_experiment(client, config.tracking.experiment, workspace),
        name=config.name,
        params={
            **flattened(config.model_dump(mode="json")),
            "num_parameters": build_model(config.model).num_parameters,
            **digests,
        },
        tags={
            **machine_tags(),
            "nafnet.num_workers": str(config.scaling.num_workers),
            "nafnet.store_digests": ",".join(all_digests),
        },
        data_sets=data_sets,
    )


def _data_sets(config: RunConfig) -> list[DataSet]:
    places = [(store.path, "training") for store in config.data.train]
    places += [] if config.data.val is None else [(config.data.val, "validation")]
    found = []
    for place, context in places:
        manifest = read_manifest(place)
        found.append(
            DataSet(name=manifest.name, digest=manifest.digest, place=str(public(place)), context=context)
        )
    return found
