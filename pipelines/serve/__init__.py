"""Serve a model over HTTP, with a page: on Ray Serve, following the registry's champion.

    nafnet serve
    nafnet serve --model runs/mine --port 8001
    nafnet serve --backend onnxruntime

Each replica is one process with one network (`replica.py`), a queue before it (`batching.py`) and a thread
that looks at the alias (`champion.py`). Ray Serve's proxy takes requests; Serve replaces replicas that fail.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from nafnet_core.errors import CapabilityError, StoppedError
from pipelines.serve.settings import ServeSettings, check_port

log = logging.getLogger(__name__)

APP = "nafnet"
_LOOK_S = 3.0
_ANSWER_S = 5.0
_SIGNALS = {int(signal.SIGINT): 130, int(signal.SIGTERM): 143}


def check_installed() -> None:
    """Raises `CapabilityError` where Ray Serve is not installed."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise CapabilityError(
            "Ray Serve is not installed", got=error, fix="pip install 'nafnet-ray[serve]'"
        ) from error


def run(
    settings: ServeSettings,
    *,
    address: str | None = None,
    on_ready: Callable[[str], None] = lambda label: None,
    on_change: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; what was begun is answered before.

    Args:
        settings: what and where.
        address: of a Ray cluster; None starts Ray on this machine.
        on_ready: called with the model's label once requests are answered.
        on_change: told in a line when another model answers, or one was refused.

    Raises:
        StoppedError: it was stopped, which is the only end.
        InputError: no such model, or one that is broken.
        CapabilityError: Ray or the registry does not answer, or another program listens there.
    """
    received: list[int] = []
    stop = threading.Event()

    def note(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        stop.set()

    before: dict[int, Any] = {}

    def listen() -> None:
        before.update({number: signal.signal(number, note) for number in _SIGNALS})

    try:
        with serving(settings, address=address, on_connected=listen) as label:
            on_ready(label)
            last: dict[str, Any] = {"label": label, "refused": None}
            while not stop.wait(_LOOK_S):
                _tell_changes(settings, last, on_change)
            on_change("stopping: what was begun is answered first (once more to stop without)")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise StoppedError("stopped", exit_code=_SIGNALS[received[0]])


@contextmanager
def serving(
    settings: ServeSettings,
    *,
    address: str | None = None,
    on_connected: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Serve inside the `with` block; yields the model's label. Errors as `run`.

    Args:
        settings, address: as for `run`.
        on_connected: called once Ray is there, which sets a SIGTERM handler of its own.
    """
    check_installed()
    if address is None:
        check_port(settings.host, settings.port)
    from pipelines.serve.champion import open_served

    # Here as well, before anything is started: Ray would tell it in a page of tracebacks.
    served = open_served(settings)
    label = served.label
    # `auto` is settled here, once for all replicas and all versions that follow.
    settings = replace(settings, backend=served.restorer.loaded.backend)
    del served
    os.environ.pop("NAFNET_TOKEN", None)  # Ray's processes would inherit it
    # Ray starts its workers with a niceness of 15: an answer took 5 to 10 % longer so on a machine at rest.
    os.environ.setdefault("RAY_worker_niceness", "0")
    from cluster.connect import connect

    with connect(address, serving=True):
        on_connected()
        with _deployed(settings):
            yield label


@contextmanager
def _deployed(settings: ServeSettings) -> Iterator[None]:
    import ray
    from ray import serve

    from pipelines.serve.app import page_files
    from pipelines.serve.guard import proxy_environment
    from pipelines.serve.replica import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    others = list(serve.status().applications)
    if others:
        raise CapabilityError(
            "Ray Serve is at work on this cluster already",
            got=", ".join(others),
            fix="End that service; this one would have to share its address, and end with it",
        )
    resources = ray.cluster_resources()
    num_gpus = 1.0 if resources.get("GPU", 0) >= settings.replicas else 0.0
    # A network takes its threads from here; a GPU's leaves room for decoding.
    num_cpus = float(settings.threads or max(1, int(resources.get("CPU", 1)) // settings.replicas))
    app = application(
        settings if settings.threads else _with_threads(settings, int(num_cpus)),
        page_files(),
        num_cpus=min(num_cpus, 2.0) if num_gpus else num_cpus,
        num_gpus=num_gpus,
    )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"enable_access_log": False},
            controller_options={"runtime_env": {"env_vars": proxy_environment(settings)}},
        )
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        serve.shutdown()
        raise CapabilityError(
            "the service did not start",
            got=" ".join(str(error).split())[-300:],
            fix=f"Ray's logs say more: {ray.get_runtime_context().get_session_name()} in /tmp/ray",
        ) from error
    try:
        yield
    finally:
        # First the application, whose replicas answer what they have begun, then the proxies.
        serve.delete(APP)
        serve.shutdown()


def _with_threads(settings: ServeSettings, threads: int) -> ServeSettings:
    return replace(settings, threads=threads)


def _tell_changes(settings: ServeSettings, last: dict[str, Any], on_change: Callable[[str], None]) -> None:
    """Ask a replica as any client would: what answers is what counts."""
    try:
        with urllib.request.urlopen(f"{settings.address}/readyz", timeout=_ANSWER_S) as response:
            state = json.load(response)
    except (OSError, ValueError) as error:
        log.info("no answer of our own: %s", error)
        return
    if state["model"]["label"] != last["label"]:
        last["label"] = state["model"]["label"]
        on_change(f"from now on {last['label']} answers")
    if state["refused"] != last["refused"]:
        last["refused"] = state["refused"]
        if last["refused"]:
            on_change(
                f"version {last['refused']['version']} is refused, {last['label']} stays: "
                f"{last['refused']['reason']}"
            )
