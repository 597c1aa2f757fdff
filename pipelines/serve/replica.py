"""The deployment: one process with a network, and the routes before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipelines.openmp import spinning
from pipelines.serve.settings import ServeSettings

NAME = "nafnet"
_OPEN_AT_MOST = 10_000  # beyond the queue's own limit, of which clients are told, and not by Ray
_DRAIN_POLL_S = 0.1


def application(
    settings: ServeSettings, page: Mapping[str, bytes], *, num_cpus: float, num_gpus: float
) -> Any:
    """What `serve.run` takes."""
    from ray import serve

    deployment = serve.deployment(
        name=NAME,
        num_replicas=settings.replicas,
        max_ongoing_requests=_OPEN_AT_MOST,
        ray_actor_options={
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": spinning()},
        },
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
        graceful_shutdown_timeout_s=settings.timeout_s + 5,
        max_constructor_retry_count=1,
        logging_config={"enable_access_log": False},
    )
    return deployment(serve.ingress()(Replica)).bind(settings, page)


class Replica:
    """Lives in Ray Serve's process; the application is made there."""

    def __init__(self, settings: ServeSettings, page: Mapping[str, bytes]) -> None:
        from ray import serve

        from pipelines.serve.service import Service

        for package in ("pipelines", "nafnet_core"):
            logging.getLogger(package).setLevel(logging.INFO)
        self._page = page
        self._service = Service(settings, replica=serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> Any:  # noqa: N807  Ray's name
        from pipelines.serve.app import make_app

        return make_app(self._service, self._page)

    def check_health(self) -> None:
        """Asked by Ray every ten seconds; a replica that fails is replaced."""
        if not self._service.network.is_alive:
            raise RuntimeError("the network's thread has ended")
