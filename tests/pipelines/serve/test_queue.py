"""Queue, time-outs, clients that are slow or leave, and faults of our own."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.serve.service import Service
from tests.nafnet_core.networks import photo
from tests.pipelines.serve.clients import Answer, ask, assert_clear, encoded, restore
from tests.pipelines.serve.services import routes

_PNG = encoded(photo(30, 40))


@pytest.fixture
def held(weights: Path, tmp_path: Path) -> Iterator[tuple[str, Service, threading.Event]]:
    """A service with three places, whose network waits for an event before each answer."""
    settings: dict[str, Any] = {
        "model": str(weights),
        "workspace": tmp_path,
        "max_queue": 3,
        "timeout_s": 1.0,
    }
    with routes(**settings) as (address, service):
        go, served = threading.Event(), service.network.served
        stream = served.restorer.stream

        def waiting(images: Any) -> Any:
            for result in stream(images):
                go.wait(20)
                yield result

        served.restorer.stream = waiting  # type: ignore[method-assign]
        service.network.swap(replace(served))
        try:
            yield address, service, go
        finally:
            go.set()


def _at_once(address: str, number: int) -> list[Answer]:
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda _: restore(address, _PNG), range(number)))


def test_a_full_queue_says_when_to_come_back(held: tuple[str, Service, threading.Event]) -> None:
    address, _, _ = held
    answers = _at_once(address, 8)
    busy = [answer for answer in answers if answer.status == 429]
    assert len(busy) == 5, [answer.status for answer in answers]
    for answer in busy:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert_clear(answer)
    assert ask(address, "/healthz").status == 200


def test_what_is_not_done_in_time_is_not_done_at_all(held: tuple[str, Service, threading.Event]) -> None:
    address, service, go = held
    answers = _at_once(address, 3)
    assert [answer.status for answer in answers] == [504] * 3
    assert_clear(answers[0])
    assert service.num_open == 0
    go.set()
    assert restore(address, _PNG).status == 200
    lines = ask(address, "/metrics").content.decode()
    # The first had begun, and the last was answered; those between were dropped.
    assert 'nafnet_batches_total{replica="0"} 2.0' in lines


def test_clients_that_leave_leave_no_place_taken(held: tuple[str, Service, threading.Event]) -> None:
    address, service, _ = held
    for _ in range(3):
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.putrequest("POST", "/v1/restore")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", str(len(_PNG)))
        connection.endheaders(_PNG[:20])
        time.sleep(0.05)
        connection.close()
    deadline = time.monotonic() + 5
    while service.num_open and time.monotonic() < deadline:
        time.sleep(0.02)
    assert service.num_open == 0
    assert 'status="499"} 3.0' in ask(address, "/metrics").content.decode()


def test_an_upload_that_does_not_end_gives_its_place_back(
    held: tuple[str, Service, threading.Event],
) -> None:
    address, service, _ = held
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/v1/restore")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(len(_PNG)))
    connection.endheaders(_PNG[:20])
    response = connection.getresponse()
    assert response.status == 408 and b"too long" in response.read()
    assert service.num_open == 0
    connection.close()


def test_uploads_together_have_a_limit(weights: Path, tmp_path: Path) -> None:
    with routes(model=str(weights), workspace=tmp_path, max_mib=0.1) as (address, service):
        connections = []
        for _ in range(4):
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.putrequest("POST", "/v1/restore")
            connection.putheader("Content-Type", "image/png")
            connection.putheader("Content-Length", str(100_000))
            connection.endheaders(b"\0" * 99_000)
            connections.append(connection)
        while service.num_open < 4:
            time.sleep(0.01)
        time.sleep(0.2)
        answer = restore(address, b"\0" * 100_000)
        assert answer.status == 429
        assert_clear(answer)
        for connection in connections:
            connection.close()


def test_a_fault_of_ours_says_nothing_of_its_inside(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with routes(model=str(weights), workspace=tmp_path) as (address, service):

        def broken(*_: Any) -> Any:
            raise RuntimeError("in /tmp/secret.py")

        monkeypatch.setattr("pipelines.serve.coding.encode", broken)
        answer = restore(address, _PNG)
        assert answer.status == 500
        assert_clear(answer)
        monkeypatch.undo()
        assert restore(address, _PNG).status == 200 and service.num_open == 0
