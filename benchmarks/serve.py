"""`nafnet serve` against the bare network, and under promotions.

    python benchmarks/serve.py

The real command on Ray Serve, `mobile` with residual scales drawn at random, fp32. The peer is the same
network, with local statistics and in strips, on an array that is decoded and at hand, on as many threads, in
a process of its own; the two take turns. Its OpenMP spins as long at a barrier as the service's does: left to
itself, the peer takes up to 16 s where another program has one of the cores (`replica.py`).

A client opens a connection for each request, sends a JPEG of 640×480 and gets one. Promotions are moves of
`nafnet registry`'s own, each awaited until the new model answers.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines.openmp import spin_briefly

spin_briefly()  # as replicas of the service do, before torch is there

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from skimage import data  # noqa: E402

from benchmarks._rows import Rows, row, show  # noqa: E402
from nafnet_core import PRESETS, NAFNet, randomize_residual_scales, save_model  # noqa: E402
from nafnet_core.local_stats import local_statistics  # noqa: E402
from nafnet_core.strips import forward_in_strips  # noqa: E402
from pipelines import registry  # noqa: E402
from pipelines.models import REGISTERED_NAME, alias_version  # noqa: E402
from pipelines.registry.connection import asking  # noqa: E402
from pipelines.registry.moves import carry_out  # noqa: E402
from pipelines.registry.versions import CHAMPION  # noqa: E402
from pipelines.workspace import Workspace  # noqa: E402

_ROOT = Path(__file__).resolve().parent.parent
_WIDTH, _HEIGHT, _PATCH_PX = 640, 480, 256
_LIMIT, _CLIENTS = 1.25, 8
_START_S, _FOLLOWED_S = 120.0, 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--promotions", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load by 8 clients")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workspace, models = _prepared(Path(temporary))
        port = _free_port()
        server = _started(workspace, port, Path(temporary) / "log")
        try:
            rows = _latency(port, models[0], options.rounds)
            rows |= _throughput(port, options.seconds)
            rows |= _promotions(port, workspace, options.promotions)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(120)
    show(rows, as_json=options.json, versions={name: version(name) for name in ("ray", "torch", "mlflow")})


def _latency(port: int, model: NAFNet, rounds: int) -> Rows:
    photo = _photo(_HEIGHT, _WIDTH)
    body = _jpeg(photo)
    decoded = np.array(Image.open(io.BytesIO(body)))
    torch.set_num_threads(os.cpu_count() or 1)

    def bare(forward: Callable[[NAFNet, torch.Tensor], torch.Tensor]) -> None:
        lq = torch.from_numpy(decoded).permute(2, 0, 1)[None].float() / 255
        forward(model, lq)

    calls: dict[str, Callable[[], object]] = {
        "service": lambda: _ask(port, body),
        "strips": lambda: bare(forward_in_strips),
        "plain": lambda: bare(lambda network, lq: network(lq)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    inside: list[float] = []
    with torch.inference_mode(), local_statistics(model, _PATCH_PX):
        for number in range(rounds + 2):
            for name, call in calls.items():
                start = time.perf_counter()
                answer = call()
                if number >= 2:
                    seconds[name].append(time.perf_counter() - start)
                    if isinstance(answer, dict):
                        inside.append(float(answer["x-nafnet-network-seconds"]))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    size = f"{_WIDTH}×{_HEIGHT}, 1 client"
    return {
        f"serve, {size}: p50 over the bare network's time": row(
            median["service"] / median["strips"], "×", at_most=_LIMIT
        ),
        "  p50 of the service": row(median["service"], "s"),
        "  of that in the network and around it": row(statistics.median(inside), "s"),
        "  the bare network, in strips as in the service": row(median["strips"], "s"),
        "  the bare network, as PyTorch runs it": row(median["plain"], "s"),
    }


def _throughput(port: int, seconds: float) -> Rows:
    body = _jpeg(_photo(_HEIGHT, _WIDTH))
    done = _load(port, body, lambda: time.sleep(seconds))
    assert all(status == 200 for status, _ in done), done
    return {f"serve, {_WIDTH}×{_HEIGHT}, {_CLIENTS} clients": row(len(done) / seconds, "images/s")}


def _promotions(port: int, workspace: Workspace, number: int) -> Rows:
    taken_s: list[float] = []

    def promote() -> None:
        with asking(workspace) as client:
            for _ in range(number):
                before = alias_version(client, CHAMPION)
                to = 3 - int(before or 2)
                carry_out(
                    client,
                    workspace,
                    {"action": "force", "from": before, "to": to, "reason": "benchmark"},
                    obstacle=lambda: None,
                    commit=lambda to=to: client.set_registered_model_alias(
                        REGISTERED_NAME, CHAMPION, str(to)
                    ),
                )
                start = time.perf_counter()
                while _state(port)["model"]["version"] != str(to):
                    assert time.perf_counter() - start < _FOLLOWED_S, "a promotion is not followed"
                    time.sleep(0.05)
                taken_s.append(time.perf_counter() - start)

    done = _load(port, _jpeg(_photo(240, 320)), promote)
    lost = sum(status != 200 for status, _ in done)
    assert {by for _, by in done if by} == {"1", "2"}
    name = f"serve, {number} promotions under {_CLIENTS} clients"
    return {
        f"{name}: requests lost": row(lost, "requests", at_most=0),
        "  requests meanwhile": row(len(done), "requests"),
        "  from a promotion to answers by the new model, median": row(statistics.median(taken_s), "s"),
    }


def _load(port: int, body: bytes, meanwhile: Callable[[], None]) -> list[tuple[int, str]]:
    """Status and version of each answer of 8 clients, while something else goes on; 0 where none came."""
    done: list[tuple[int, str]] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                headers = _ask(port, body)
                done.append((int(headers["status"]), headers.get("x-nafnet-version", "")))
            except (OSError, http.client.HTTPException):
                done.append((0, ""))

    threads = [threading.Thread(target=client) for _ in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        meanwhile()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return done


def _ask(port: int, body: bytes) -> dict[str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/restore", body, {"Content-Type": "image/jpeg"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return {"status": str(response.status), **{name.lower(): value for name, value in response.getheaders()}}


def _state(port: int) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/readyz")
    state = json.load(connection.getresponse())
    connection.close()
    return state


def _prepared(folder: Path) -> tuple[Workspace, list[NAFNet]]:
    """Two versions, the first of them the champion."""
    workspace, models = Workspace(folder / "workspace").make(), []
    for number in (1, 2):
        torch.manual_seed(number)
        model = NAFNet(PRESETS["mobile"]).eval()
        randomize_residual_scales(model, seed=number)
        with torch.no_grad():  # a trained one's correction is a fraction of the image
            model.ending.weight.mul_(0.1)
        path = folder / f"{number}.safetensors"
        save_model(model, path, metadata={"train_patch_px": _PATCH_PX})
        registry.register(str(path), workspace)
        models.append(model)
    with asking(workspace) as client:
        client.set_registered_model_alias(REGISTERED_NAME, CHAMPION, "1")
    return workspace, models


def _started(workspace: Workspace, port: int, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    for name in ("MLFLOW_TRACKING_URI", "NAFNET_TOKEN"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pipelines", "serve", "--port", str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, "--workspace", str(workspace.root)], env=environment, stdout=file, stderr=file
        )
    deadline = time.monotonic() + _START_S
    while True:
        try:
            if _state(port)["status"] == "ready":
                return server
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(log.read_text())
        time.sleep(0.3)


def _photo(height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(data.astronaut()).resize((width, height)))


def _jpeg(photo: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=95)
    return file.getvalue()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
