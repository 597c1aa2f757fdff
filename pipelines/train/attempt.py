"""One attempt at a run: what `nafnet train` does once, and `nafnet tune` for each trial."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.files import write_json
from pipelines.storage import LocalFolder, RemoteFolder, folder
from pipelines.train.beside import SpareRoom
from pipelines.train.failures import read_failures
from pipelines.train.files import CONFIG, FAILURES, STOP
from pipelines.train.launch import fit, ray_trainer
from pipelines.train.mirror import Mirror
from pipelines.train.placement import release_group


def storage_of(config: RunConfig, run_dir: Path) -> tuple[LocalFolder | RemoteFolder, Mirror | None]:
    """Where a run's state is kept, and what brings it here if that is not the run's own folder."""
    if config.checkpoint.storage is None:
        return LocalFolder(run_dir), None
    storage = folder(config.checkpoint.storage).below(config.name)
    return storage, Mirror(storage, run_dir)


def clear(run_dir: Path, storage: LocalFolder | RemoteFolder) -> None:
    """Take back what ended the last attempt: a request to stop, failures that no further one would mend."""
    (run_dir / STOP).unlink(missing_ok=True)
    storage.below(FAILURES).remove()
    shutil.rmtree(run_dir / FAILURES, ignore_errors=True)


def begin(config: RunConfig, run_dir: Path, mirror: Mirror | None) -> None:
    """Write down the recipe, where workers and later attempts find it."""
    write_json(run_dir / CONFIG, config.model_dump(mode="json"))
    if mirror is not None:
        mirror.begin()


def attempt(
    config: RunConfig,
    run_dir: Path,
    storage: LocalFolder | RemoteFolder,
    spare: SpareRoom | None,
    meanwhile: Callable[[], None],
) -> None:
    """Have workers train, from the newest checkpoint to the end or to a request to stop.

    Args:
        config: the whole run.
        run_dir: the run's folder on this node.
        storage: where its state is kept.
        spare: where validation may run beside the training.
        meanwhile: called every second; the failures that it brings here count.

    Raises:
        NAFNetError: what ended the workers, in one line.
    """
    release_group(storage)
    fit(ray_trainer(config, run_dir, storage, spare), run_dir, meanwhile)
    for failure in read_failures(run_dir):
        if (error := failure.error()) is not None:
            raise error
