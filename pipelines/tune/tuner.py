"""Ray Tune, as a search uses it: the queue for its searcher, and nothing of its own kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.files import make_folder

if TYPE_CHECKING:
    from ray.tune import Trainable
    from ray.tune.schedulers import TrialScheduler

    from pipelines.tune.queue import TrialQueue

# Times that a trial's lost actor is replaced; it goes on from its checkpoint. Its workers have their own.
_MAX_ACTOR_FAILURES = 3
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's end comes without a score
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def tuned(trainable: type[Trainable], queue: TrialQueue, scheduler: TrialScheduler, folder: Path) -> None:
    """Run trials until the queue says that it is enough.

    Args:
        trainable: `TrialActor`.
        queue, scheduler: of the search.
        folder: of the search; Ray's files go below it.
    """
    from ray import tune

    keep_credentials_here()
    attempts = make_folder(folder / "ray")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's failure is told in a line
    config: dict[str, Any] = {
        "num_samples": -1,  # the queue says when
        "search_alg": queue,
        "scheduler": scheduler,
        "reuse_actors": True,
        "trial_name_creator": lambda trial: trial.trial_id,
        "trial_dirname_creator": lambda trial: trial.trial_id,
    }
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(**config),
        run_config=tune.RunConfig(
            # Each attempt its own: what goes on is in our ledger, not in Ray's snapshots.
            name=f"attempt-{sum(1 for _ in attempts.iterdir()):03d}",
            storage_path=str(attempts),
            failure_config=tune.FailureConfig(max_failures=_MAX_ACTOR_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs have their own
            verbose=0,
        ),
    ).fit()


def keep_credentials_here() -> None:
    """Have Ray Tune not pass Amazon's keys on to trials.

    It would put them into their runtime environment, and Ray writes that into its logs and its data base
    (2.60). Nodes have their own; on this machine workers inherit the environment anyway.
    """
    from ray.tune.execution import class_cache

    names = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set())
    names.difference_update({name for name in names if name.startswith("AWS_")})
