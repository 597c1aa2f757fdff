"""The real command on Ray Serve: promotions under load, limits that hold in the proxy too, how it ends."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines import Restorer
from pipelines.restorer import RestoreSettings
from tests.nafnet_core.networks import photo
from tests.pipelines.serve.clients import Answer, ask, encoded, form, restore
from tests.pipelines.serve.conftest import MAX_MIB, MAX_QUEUE, Registry
from tests.pipelines.serve.services import Command

pytestmark = pytest.mark.ray

_CLIENTS = 8
_FOLLOWED_S = 30.0
_SLACK_MIB = 150.0  # of allocators and decoders; one body that were kept whole would be 400


def _expected(registry: Registry, image: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """What each version makes of an image."""
    run_with = RestoreSettings(precision="fp32", tile_px=1024)
    return {
        version: Restorer(str(path), run_with)(image)  # type: ignore[misc]
        for version, path in registry.weights.items()
    }


def _version(command: Command) -> str:
    return ask(command.address, "/readyz").told["model"]["version"]


def _promote_and_wait(command: Command, registry: Registry, version: int) -> None:
    registry.promote(version)
    deadline = time.monotonic() + _FOLLOWED_S
    while _version(command) != str(version):
        assert time.monotonic() < deadline, f"version {version} is not followed"
        time.sleep(0.05)


def _promotions_under_load(command: Command, registry: Registry, number: int) -> None:
    image = photo(64, 96)
    body, expected = encoded(image), _expected(registry, image)
    assert not np.array_equal(expected["1"], expected["2"])
    answers: list[Answer] = []
    faults: list[Exception] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answers.append(restore(command.address, body))
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=client) for _ in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        first = int(_version(command))
        for turn in range(number):
            _promote_and_wait(command, registry, 3 - first if turn % 2 == 0 else first)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults, faults[:3]
    lost = [answer for answer in answers if answer.status != 200]
    assert not lost, f"{len(lost)} of {len(answers)} lost: {lost[0]}"
    assert len(answers) > 5 * number
    for answer in answers:  # each by the model that it names, whole
        assert np.array_equal(answer.image, expected[answer.headers["x-nafnet-version"]])
    assert {answer.headers["x-nafnet-version"] for answer in answers} == {"1", "2"}


def test_three_promotions_under_load_lose_no_request(command: Command, champions: Registry) -> None:
    _promotions_under_load(command, champions, 3)


@pytest.mark.slow
def test_twenty_promotions_under_load_lose_no_request(command: Command, champions: Registry) -> None:
    _promotions_under_load(command, champions, 20)


def _mib_of_ours(command: Command) -> float:
    """What the proxy and the replica take."""
    mib = 0.0
    for process in psutil.Process(command.process.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if "ProxyActor" in title or "ServeReplica" in title:
                mib += process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
    assert mib > 100
    return mib


def test_bodies_beyond_the_limit_are_not_taken_in(command: Command) -> None:
    """Without a length, by several at a time: the proxy would read as fast as it is sent."""
    before, most = _mib_of_ours(command), 0.0
    chunk, answers = b"\0" * 2**20, []

    def send() -> None:
        answers.append(restore(command.address, (chunk for _ in range(400))))

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, _mib_of_ours(command))
        time.sleep(0.05)
    assert [answer.status for answer in answers] == [413] * 4
    assert f"at most {MAX_MIB} MiB" in answers[0].told["expected"]
    assert most - before < _SLACK_MIB, f"{before:.0f} MiB grew to {most:.0f}"
    declared = restore(command.address, b"\0" * (MAX_MIB * 2**20 + 1))
    assert declared.status == 413 and declared.told["got"] == "2.0 MiB"


def test_more_clients_than_places(command: Command) -> None:
    body = encoded(photo(256, 256))
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: answers.append(restore(command.address, body)))
        for _ in range(3 * MAX_QUEUE)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted({answer.status for answer in answers})
    assert statuses == [200, 429]
    for answer in answers:
        if answer.status == 429:
            assert int(answer.headers["retry-after"]) >= 1
    assert sum(answer.status == 200 for answer in answers) >= MAX_QUEUE


_IMAGES = [encoded(photo(17, 23), kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")]
_TYPES = st.sampled_from(
    ["image/png", "image/jpeg", "", "application/octet-stream", "text/html", "image/", form()[1],
     "multipart/form-data; boundary=", "multipart/form-data; boundary=\"\"", "multipart/form-data"]
)  # fmt: skip
_VALUES = st.sampled_from(
    ["png", "jpeg", "webp", "tiff", "0.1", "1", "50", "true", "-1", "1e9", "é", "", "../x"]
)
_QUERIES = st.lists(
    st.tuples(st.sampled_from(["format", "quality", "scale", "keep_colour", "x", ""]), _VALUES), max_size=3
)


@st.composite
def _bodies(draw: st.DrawFn) -> bytes:
    """Anything; or an image that was cut, changed in places, or put together from two; maybe in a form."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=400))
    body = bytearray(draw(st.sampled_from(_IMAGES)))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8)):
        body[at % len(body)] = value
    body = body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body
    if draw(st.integers(0, 4)) == 0:
        body += draw(st.sampled_from(_IMAGES))
    return form(bytes(body))[0] if draw(st.integers(0, 3)) == 0 else bytes(body)


def _fuzzed(command: Command, max_examples: int) -> None:
    from urllib.parse import urlencode

    before = _mib_of_ours(command)

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(body=_bodies(), content_type=_TYPES, query=_QUERIES)
    def check(body: bytes, content_type: str, query: list[tuple[str, str]]) -> None:
        answer = restore(
            command.address, body, f"?{urlencode(query)}" if query else "", Content_Type=content_type
        )
        assert answer.status in (200, 400, 415, 422), answer
        if answer.status != 200:
            assert answer.told["problem"]
        else:
            assert answer.image.size

    check()
    assert ask(command.address, "/readyz").told["status"] == "ready"
    assert _mib_of_ours(command) - before < _SLACK_MIB


def test_whatever_is_sent_there_is_an_answer_and_no_fault(command: Command) -> None:
    _fuzzed(command, 150)


@pytest.mark.slow
def test_whatever_is_sent_many_times_over(command: Command) -> None:
    _fuzzed(command, 3000)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/restore HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/restore HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999999999999\r\n\r\nx",
        b"POST /v1/restore HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x00\x01\x02\r\n\r\n",
    ],
)
def test_broken_http(command: Command, request_bytes: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", command.port, timeout=20)
    connection.connect()
    assert connection.sock is not None
    connection.sock.sendall(request_bytes)
    first = connection.sock.recv(200)
    assert first == b"" or first.startswith(b"HTTP/1.1 4"), first
    connection.close()
    assert ask(command.address, "/healthz").status == 200


@pytest.fixture
def another(weights: Path, tmp_path: Path) -> Iterator[Command]:
    """One to be ended, with a token."""
    token = tmp_path / "token"
    token.write_text("a-token-of-a-test-0123\n")
    options = ("--model", str(weights), "--token-file", str(token), "--threads", "1")
    running = Command(tmp_path / "workspace", tmp_path / "log", *options)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_ends_with_what_was_begun(another: Command, number: int, code: int) -> None:
    body, answers = encoded(photo(900, 1200)), []
    assert restore(another.address, body).status == 401
    bearer = "Bearer a-token-of-a-test-0123"
    sender = threading.Thread(
        target=lambda: answers.append(restore(another.address, body, Authorization=bearer))
    )
    sender.start()
    deadline = time.monotonic() + 20
    while ask(another.address, "/readyz").told["open"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert another.stop(number) == code
    sender.join()
    assert answers[0].status == 200
    said = another.log.read_text()
    assert "a-token-of-a-test" not in said and "Traceback" not in said
    assert "stopping" in said
