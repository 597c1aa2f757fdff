"""Connect to Ray: a local instance by default, or a running cluster.

from cluster.connect import connect
with connect():
    ...
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_CODE = ("nafnet_core", "pipelines", "cluster")
# Ray's own chatter; what a user needs is printed by the stages themselves.
_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_REDIRECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def connect(address: str | None = None) -> Iterator[None]:
    """Use Ray inside the `with` block; a local instance that this call started is shut down afterwards.

    Args:
        address: `auto` or `ray://HOST:PORT` for a running cluster; None for a local instance, or whatever
            Ray this process is connected to already.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    root = Path(__file__).resolve().parent.parent
    if address is None:
        # Nodes of one machine share the installation: nothing to ship, only where it lies.
        # A process less to start: this machine is not taken away from under us.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Else Ray prints a warning once four times as many processes as cores have been started.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(4 * (os.cpu_count() or 1)))
        runtime_env: dict[str, object] = {"env_vars": {"PYTHONPATH": _joined(root)}}
    else:
        runtime_env = {"py_modules": [str(root / package) for package in _CODE]}
    ray.init(
        address=address or "local",
        runtime_env=runtime_env,
        include_dashboard=False if address is None else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
    )
    log.info("connected to Ray; its own logs are in %s", ray.get_runtime_context().get_session_name())
    try:
        yield
    finally:
        ray.shutdown()


def quiet_data_context() -> None:
    """Switch Ray Data's progress bars and informational logging off for this process."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _joined(root: Path) -> str:
    return os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
