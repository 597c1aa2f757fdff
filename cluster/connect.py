"""Connect to Ray: a local instance by default, or a running cluster.

from cluster.connect import connect
with connect("ray://head:10001"):
    ...

Credentials are never passed on: what Ray is given of the environment stands in its logs (Ray 2.60:
`runtime_env_agent.log`, `ray_client_server.err`). Nodes have them of their own, `preflight` looks for them by
name.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.code import packages, stage_for_workers, zipped_bytes
from nafnet_core.errors import CapabilityError, InputError

log = logging.getLogger(__name__)

# Ray's own chatter; what a user needs is printed by the stages themselves.
_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_REDIRECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    # Its C++ part calls each actor that may be restarted an error, on the terminal (Ray 2.60).
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the program that a submitted job runs
_ANSWER_S = 10.0
_NOTED = 500  # characters of what a raylet says
_TOLD = {"told": True}


@contextmanager
def connect(address: str | None = None, *, serving: bool = False) -> Iterator[None]:
    """Use Ray inside the `with` block; a local instance that this call started is shut down afterwards.

    Args:
        address: `auto` or `HOST:PORT` on a machine of a running cluster, `ray://HOST:PORT` from any other;
            None for a local instance, or whatever Ray this process is connected to already.
        serving: send a cluster the code of `serve` too.

    Raises:
        InputError: not such an address.
        CapabilityError: no cluster answers there, or it has other versions of Python or Ray, or wants a
            token.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    _log_raylets()
    if address is None:
        _start_here()
    else:
        check_address(address)
        _join(address, serving=serving)
    log.info("connected to Ray; its own logs are in %s", ray.get_runtime_context().get_session_name())
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse what cannot be, and what does not answer: Ray itself waits two minutes, then ends the process.

    Raises:
        InputError: not an address to run at.
        CapabilityError: nobody answers there.
    """
    if address.startswith(("http://", "https://")):
        raise InputError(
            "a dashboard takes jobs, it does not run a command from here",
            file=address,
            expected="auto, HOST:PORT or ray://HOST:PORT",
            fix="To have the cluster run the command: `nafnet cluster submit -- COMMAND`",
        )
    match = re.fullmatch(r"(ray://)?([\w.-]+|\[[\da-fA-F:]+\]):(\d+)", address)
    if address != "auto" and match is None:
        raise InputError(
            "not the address of a Ray cluster",
            file=address,
            expected="auto or HOST:PORT on a machine of the cluster, ray://HOST:PORT from any other",
        )
    if not address.startswith("ray://") and not _is_node():
        raise CapabilityError(
            "this machine is no node of a Ray cluster",
            got=f"--address {address}",
            fix="From outside, use ray://HOST:10001 or `nafnet cluster submit`",
        )
    if match is not None:
        host, port = match[2].strip("[]"), int(match[3])
        try:
            socket.create_connection((host, port), _ANSWER_S).close()
        except OSError as error:
            raise CapabilityError(
                "no Ray cluster answers there",
                file=address,
                got=error.strerror or error,
                fix="Is it up, and does a firewall let this port through? See docs/cluster.md",
            ) from error


def quiet_data_context() -> None:
    """Switch Ray Data's progress bars and informational logging off for this process."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _log_raylets() -> None:
    """Have what raylets say of lost nodes and workers, dozens of lines on stdout, go into the log.

    `log_to_driver=False` leaves it out of account (Ray 2.60). What it means for a run, the run says itself.
    """
    import ray._private.worker as internals

    def note(data: dict[str, Any], **_: Any) -> None:
        log.info("%s: %s", data.get("pid"), " ".join(" ".join(data.get("lines", ())).split())[:_NOTED])

    if hasattr(internals, "print_to_stdstream"):
        internals.print_to_stdstream = note


@contextmanager
def _stderr_aside() -> Iterator[None]:
    """Keep what is written to stderr, by C++ as well, in a file: Ray announces there what it was set to.

    The file stays where the process is aborted meanwhile.
    """
    path = Path(tempfile.gettempdir()) / f"nafnet-ray-init-{os.getpid()}.log"
    saved, aside = os.dup(2), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(aside, 2)
    os.close(aside)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        path.unlink(missing_ok=True)


def _start_here() -> None:
    """Start Ray on this machine."""
    import ray

    # A process less to start: this machine is not taken away from under us.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Else Ray prints a warning once four times as many processes as cores have been started.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(4 * (os.cpu_count() or 1)))
    # All on one machine: nothing to send, only where it lies.
    path = os.pathsep.join(filter(None, [str(packages()[0].parent), os.environ.get("PYTHONPATH", "")]))
    with _stderr_aside():
        ray.init(
            address="local",
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )


def _join(address: str, *, serving: bool) -> None:
    """Connect to a cluster that is up, and send it our code, unless a job has brought that already."""
    import ray

    with tempfile.TemporaryDirectory(prefix="nafnet-code-") as temporary:
        runtime_env: dict[str, Any] = {}
        if _IN_A_JOB not in os.environ:
            staged = stage_for_workers(Path(temporary), serving=serving)
            runtime_env["py_modules"] = [str(package) for package in staged]
            size = sum(map(zipped_bytes, staged))
            log.info("sending %.0f KiB of code to the cluster at %s", size / 1024, address, extra=_TOLD)
        try:
            with warnings.catch_warnings(), _stderr_aside():
                warnings.simplefilter("ignore")  # they repeat the error
                ray.init(
                    address=address,
                    runtime_env=runtime_env,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                )
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise _explained(address, error) from error


def _explained(address: str, error: Exception) -> CapabilityError:
    """What Ray says in paragraphs, as one line."""
    import ray

    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return CapabilityError(
            "this machine and the cluster must have the same versions of Python and Ray",
            file=address,
            expected=_versions(text) or text[:200],
            got=f"Ray {ray.__version__}, Python {platform.python_version()} here",
            fix="Install the cluster's versions here, or `nafnet cluster submit` the command",
        )
    if isinstance(error, ray.exceptions.AuthenticationError) or "uthenticat" in text:
        return CapabilityError(
            "the cluster wants its token",
            file=address,
            got=text[:160],
            fix="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, or put it into ~/.ray/auth_token",
        )
    port = " Is this the client's port, 10001?" if address.startswith("ray://") else ""
    return CapabilityError(
        "cannot connect to the Ray cluster",
        file=address,
        got=text[:200],
        fix=f"Is it up? Does it want a token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH=FILE)?{port}",
    )


def _versions(text: str) -> str | None:
    found = re.search(r"started with:? ?Ray: ?([\w.]+) Python: ?([\w.]+)", text)
    return f"Ray {found[1]}, Python {found[2]} there" if found else None


def _is_node() -> bool:
    """Whether a raylet, Ray's process on each node, runs on this machine."""
    import psutil

    return any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))
