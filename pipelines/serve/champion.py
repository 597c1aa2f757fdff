"""Which model answers: loaded, tried on a known image, and replaced when the registry's alias moves.

The network goes on while the next one is loaded aside. One that cannot be loaded or breaks the known image is
refused, told, and not looked at again until the alias moves.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nafnet_core.errors import InputError, NAFNetError
from pipelines.export.published import exports_in
from pipelines.export.running import open_runnable
from pipelines.models import CHAMPION, alias_version, is_unmade
from pipelines.restorer import Restorer, RestoreSettings
from pipelines.serve.batching import Served
from pipelines.serve.settings import ServeSettings
from pipelines.tracking import mlflow_client
from pipelines.tracking.client import quick_requests
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

_KNOWN_PX = 160
_BATCH_ON_GPU = 8
_REGISTRY = "models:/"


def open_served(settings: ServeSettings, version: int | None = None) -> Served:
    """Load a model and try it on a known image.

    Args:
        settings: which one, and how it is run.
        version: in the registry, instead of where the alias points.

    Raises:
        InputError: no such model, no NAFNet of RGB, or it breaks the known image.
        CapabilityError: the registry does not answer.
    """
    name, _ = followed(settings.model)
    # None is the champion too, and without one the bundled model.
    spec = None if settings.model == CHAMPION else settings.model
    if name is not None and version is not None:
        spec = f"{_REGISTRY}{name}/{version}"
    # MLflow's own temporary folders stay: a service that follows for months would fill the disk.
    with tempfile.TemporaryDirectory(prefix="nafnet-serve-") as folder:
        loaded = open_runnable(
            spec,
            Workspace(settings.workspace),
            backend=settings.backend,
            precision=settings.precision,
            train_patch_px=settings.train_patch_px,
            num_threads=settings.threads,
            fetched_to=Path(folder),
        )
    loaded.check_rgb()
    tile_batch = settings.tile_batch or (_BATCH_ON_GPU if torch.cuda.is_available() else 1)
    restorer = Restorer(
        loaded,
        RestoreSettings(
            tile_px=settings.tile_px,
            tile_batch=tile_batch,
            precision="auto" if loaded.fixed_precision else settings.precision,  # type: ignore[arg-type]
        ),
    )
    _try_out(restorer)
    return Served(
        restorer=restorer,
        label=loaded.label,
        version=loaded.version and loaded.version.rpartition("/")[2],
        digest=loaded.weights_digest,
    )


def open_aside(settings: ServeSettings, version: int | None = None) -> Served:
    """`open_served` on a thread of its own, which ends with it.

    OpenMP keeps threads for each thread that has computed, and where there are more than cores, its barriers
    get slow: in the end only the network's own thread shall have some.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="opening") as pool:
        return pool.submit(open_served, settings, version).result()


def followed(spec: str) -> tuple[str | None, str]:
    """Name and alias of `models:/NAME@ALIAS`; None where a model stays what it is."""
    name, at, alias = spec.removeprefix(_REGISTRY).partition("@")
    return (name, alias) if spec.startswith(_REGISTRY) and at else (None, "")


def known_image() -> NDArray[np.uint8]:
    """(160, 160, 3) uint8: slopes, edges, a disc and noise, the same each time."""
    down, across = np.mgrid[0:_KNOWN_PX, 0:_KNOWN_PX] / _KNOWN_PX
    disc = (np.hypot(down - 0.4, across - 0.6) < 0.25).astype(float)
    bars = (across * 20 % 1 > 0.5) * (down > 0.75)
    planes = [0.2 + 0.5 * down + 0.2 * disc, 0.3 + 0.4 * across - 0.15 * disc, 0.6 - 0.3 * down + 0.2 * bars]
    noise = np.random.default_rng(0).normal(0, 0.01, (_KNOWN_PX, _KNOWN_PX, 3))
    return (255 * np.clip(np.stack(planes, axis=2) + noise, 0, 1)).round().astype(np.uint8)


class Follower:
    """Looks at the alias every few seconds, on a thread, and hands over the model that it moved to."""

    def __init__(
        self,
        settings: ServeSettings,
        served: Served,
        *,
        hand_over: Callable[[Served], None],
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings, self._hand_over, self._on_refused = settings, hand_over, on_refused
        self._name, self._alias = followed(settings.model)
        self._workspace = Workspace(settings.workspace)
        self._seen, self._exports = served.version, dict[str, Any]()
        self._client: MlflowClient | None = None
        self._stop = threading.Event()
        self.refused: tuple[str, str] | None = None
        """Version and reason, while the alias points at it."""
        self.silent_because: str | None = None
        """Why the registry's last answer was none."""
        if self._name is not None:
            threading.Thread(target=self._run, name="champion", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._settings.poll_s):
            try:
                self.look()
                self.silent_because = None
            except Exception as error:
                self._client = None
                reason = error.what if isinstance(error, NAFNetError) else type(error).__name__
                if self.silent_because is None:
                    log.warning("cannot look where the alias points: %s", error)
                self.silent_because = reason

    def look(self) -> None:
        """Take over what the alias points at, if that has changed.

        A refused version is tried again where exports have come to lie beside it since, of which its back end
        may be one.

        Raises:
            Exception: the registry does not answer.
        """
        found = self._pointed_at()
        if found is None:
            return
        version, exports = str(found.version), exports_in(found.tags)
        if version == self._seen and (self.refused is None or exports == self._exports):
            return
        try:
            served = open_aside(self._settings, int(version))
        except InputError as error:
            log.error("version %s is refused, the one before stays: %s", version, error)
            self.refused = (version, f"{error.what}. {error.fix}" if error.fix else error.what)
            self._on_refused()
        else:
            self._hand_over(served)
            log.info("from now on %s answers", served.label)
            self.refused = None
        self._seen, self._exports = version, exports

    def _pointed_at(self) -> ModelVersion | None:
        """Version of the alias; None while there is no champion yet, and the bundled model answers."""
        if self._seen is None and is_unmade(self._workspace):
            return None
        if self._client is None:
            self._client = mlflow_client(self._workspace)
        with quick_requests():
            if self._seen is None and alias_version(self._client, self._alias) is None:
                return None
            return self._client.get_model_version_by_alias(str(self._name), self._alias)


def _try_out(restorer: Restorer) -> None:
    image = known_image()
    (result,) = restorer.stream([image])
    if result.num_redone or result.num_kept:
        raise InputError(
            "the model breaks a known image",
            file=restorer.loaded.label,
            expected="finite values, colours and contrasts about those of the input",
            fix="Promote another one, or roll back",
        )
