"""Services of tests: the real command, and the routes alone in a thread of this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from pipelines.serve.app import make_app, page_files
from pipelines.serve.service import Service
from pipelines.serve.settings import ServeSettings
from tests.pipelines.mlflow_servers import free_port

_ROOT = Path(__file__).resolve().parents[3]
_START_S = 120.0


@contextmanager
def routes(**settings: Any) -> Iterator[tuple[str, Service]]:
    """The application without Ray; yields its address and what works behind it."""
    port = free_port()
    service = Service(ServeSettings(port=port, threads=1, **settings))
    app: Any = make_app(service, page_files())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join()
        service.close()


class Command:
    """`nafnet serve` in a process of its own."""

    def __init__(self, workspace: Path, log: Path, *options: str, **environment: str) -> None:
        self.port, self.log = free_port(), log
        self.address = f"http://127.0.0.1:{self.port}"
        variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        variables |= {"PYTHONPATH": str(_ROOT), "NAFNET_WORKSPACE": str(workspace), **environment}
        command = [sys.executable, "-m", "pipelines", "serve", "--port", str(self.port), *options]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env=variables, stdout=file, stderr=file, cwd=log.parent)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def stop(self, number: int = signal.SIGINT) -> int:
        """Ask it to end; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/readyz", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False
