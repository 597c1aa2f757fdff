"""A real S3-compatible server on this machine, and a proxy before it that fails as networks do."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from pipelines.storage import RemoteFolder, folder

_START_S = 30.0
_BLOCK_BYTES = 2**16
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>"


@dataclass(frozen=True)
class Server:
    """An S3 server's address."""

    host_port: str
    log: Path | None = None

    def url(self, path: str, **options: str) -> str:
        """URL of `bucket/path`, as a user would write it for a server that is not Amazon's."""
        options = {"endpoint_override": f"http://{self.host_port}", "region": "us-east-1"} | options
        return f"s3://{path}?" + "&".join(f"{name}={quote(value)}" for name, value in options.items())

    def upload(self, source: Path, path: str) -> str:
        """Copy a folder to `bucket/path`; returns its URL."""
        place = folder(self.url(path))
        assert isinstance(place, RemoteFolder)
        for file in source.rglob("*"):
            if file.is_file():
                place.upload(file, file.relative_to(source).as_posix())
        return self.url(path)

    def objects(self, path: str) -> dict[str, int]:
        """Sizes of all objects below `bucket/path`."""
        place = folder(self.url(path))
        assert isinstance(place, RemoteFolder)
        return dict(place.files_below())

    def remove(self, path: str) -> None:
        """Delete `bucket/path` and all below."""
        folder(self.url(path)).remove()

    def requests(self) -> list[str]:
        """All requests until now, as `GET /bucket/key`."""
        assert self.log is not None
        lines = re.findall(rb'"(?:\x1b\[[0-9;]*m)*([A-Z]+ /\S*)', self.log.read_bytes())
        return [line.decode() for line in lines]

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"http://{self.host_port}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            pass


@contextmanager
def s3_server(log: Path, host: str = "127.0.0.1") -> Iterator[Server]:
    """Run the server in a process of its own; requests are written to `log`, a line each.

    `host` is the address of this machine that it listens at.
    """
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                socket.create_connection((host, port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield Server(f"{host}:{port}", log)
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Proxy:
    """Passes connections on to a server, or does to them what `fault` says.

    `503`: every request is answered with SlowDown. `drop`: connections are closed at once. `slow`: each piece
    of data waits `delay_s`. `cut`: an answer breaks off after 64 KiB. `down`: nobody listens, as while a
    server is started anew.
    """

    server: Server
    fault: str = ""
    delay_s: float = 0.3
    num_faults: int = 0
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._listen()

    @property
    def address(self) -> Server:
        return Server(f"127.0.0.1:{self.port}")

    def fail(self, fault: str) -> None:
        """From now on; connections that are open are closed."""
        with self._lock:
            self.fault = fault
            for connection in list(self._open):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        if fault == "down":
            self.close()
        elif self._listener is None:
            self._listen()

    def close(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            self._open.add(client)
            try:
                if self.fault == "drop":
                    self.num_faults += 1
                elif self.fault == "503":
                    self._refuse(client)
                else:
                    self._pass_on(client)
            except OSError:
                pass
            finally:
                self._open.discard(client)

    def _refuse(self, client: socket.socket) -> None:
        """Answer each request, of which only the head is looked at, and close, as its body is not read."""
        head = b""
        while b"\r\n\r\n" not in head:
            if not (block := client.recv(_BLOCK_BYTES)):
                return
            head += block
        self.num_faults += 1
        answer = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        client.sendall(answer + b"Content-Length: %d\r\n\r\n" % len(_SLOW_DOWN) + _SLOW_DOWN)
        client.shutdown(socket.SHUT_WR)
        while client.recv(_BLOCK_BYTES):
            pass

    def _pass_on(self, client: socket.socket) -> None:
        host, port = self.server.host_port.split(":")
        with socket.create_connection((host, int(port)), 10) as server:
            self._open.add(server)
            back = threading.Thread(target=self._pump, args=(server, client, True), daemon=True)
            back.start()
            self._pump(client, server, False)
            back.join()
            self._open.discard(server)

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK_BYTES):
                if self.fault == "slow":
                    self.num_faults += 1
                    time.sleep(self.delay_s)
                passed += len(block)
                if is_answer and self.fault == "cut" and passed > _BLOCK_BYTES:
                    self.num_faults += 1
                    break
                target.sendall(block)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
