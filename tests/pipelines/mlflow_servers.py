"""A real `mlflow server` of a test's own, on SQLite or on any other data base."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

_START_S = 90.0


def free_port() -> int:
    """A TCP port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MlflowServer:
    """`mlflow server` on one data base, to be killed and started again at the same address."""

    def __init__(self, folder: Path, database: str | None = None, host: str = "127.0.0.1") -> None:
        """`database` is a URI; None takes a SQLite file in `folder`, where the server's files lie too.

        `host` is the address of this machine that it listens at.
        """
        self._port, self._host = free_port(), host
        self._folder, self.uri = folder, f"http://{host}:{self._port}"
        self._database = database or f"sqlite:///{folder / 'mlflow.db'}"
        folder.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", self._host, "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", self._database]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        # The runner of jobs is four processes more.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_S
        while not self._is_up():
            assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
            time.sleep(0.2)

    def send(self, number: int) -> None:
        """A signal to the server and its worker."""
        assert self._process is not None
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Kill it, where it runs."""
        if self._process is not None:
            self.send(signal.SIGKILL)

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False
