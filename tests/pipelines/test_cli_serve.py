"""`nafnet serve` before it serves: what is refused, and how that is said."""

from __future__ import annotations

import socket
import sys
import warnings
from pathlib import Path

import pytest

from nafnet_core import CapabilityError, InputError, save_model
from pipelines.serve.settings import ServeSettings, check_port, digest_of, is_loopback, read_token
from tests.nafnet_core.networks import SMALL, lively_network
from tests.pipelines.conftest import Run


@pytest.fixture(autouse=True, scope="module")
def ray_serve() -> None:
    """While it is imported it warns of its own types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.serve  # noqa: F401


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NAFNET_TOKEN", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "photos.example"])
def test_no_other_machine_is_let_in_without_a_token(run: Run, host: str) -> None:
    code, out, err = run("serve", "--host", host)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "--token-file" in err and "NAFNET_TOKEN" in err and host in err


@pytest.mark.parametrize("token", ["", "short", "a token with spaces in it", "a-töken-with-an-umlaut"])
def test_a_token_that_can_be_guessed_is_refused(run: Run, tmp_path: Path, token: str) -> None:
    file = tmp_path / "token"
    file.write_text(token + "\n")
    code, _, err = run("serve", "--host", "0.0.0.0", "--token-file", file)
    assert code == 2 and "not a safe token" in err and "openssl" in err
    assert not token or token not in err


def test_where_the_token_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("the-token-of-the-file\n")
    assert read_token(None, None) is None and read_token(None, "") is None
    assert read_token(file, "the-one-of-the-environment") == digest_of("the-token-of-the-file")
    assert read_token(None, "the-one-of-the-environment") == digest_of("the-one-of-the-environment")
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path / "gone", None)


def test_a_model_that_breaks_a_known_image_is_not_served(run: Run, tmp_path: Path) -> None:
    model = lively_network(SMALL)
    model.intro.weight.data[0] = float("nan")
    save_model(model, tmp_path / "bad.safetensors", metadata={"train_patch_px": 64})
    code, _, err = run("serve", "--model", tmp_path / "bad.safetensors", "--port", _free_port())
    assert code == 2 and "breaks a known image" in err


def test_a_port_that_is_taken_is_told_at_once(run: Run) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        code, _, err = run("serve", "--port", port)
        assert code == 4 and str(port) in err and "--port" in err
        with pytest.raises(CapabilityError):
            check_port("127.0.0.1", port)
    with pytest.raises(InputError, match="no such address"):
        check_port("no-such-host.invalid", 8000)


def test_without_the_extra_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    code, _, err = run("serve")
    assert code == 4 and "pip install 'nafnet-ray[serve]'" in err


@pytest.mark.parametrize(
    "options",
    [("--max-mib", 0), ("--max-megapixels", 0), ("--max-megapixels", 1000), ("--timeout-s", -1),
     ("--precision", "fp8"), ("--max-queue", 0), ("--replicas", 0)],
)  # fmt: skip
def test_limits_that_cannot_be(run: Run, options: tuple[object, ...]) -> None:
    code, _, err = run("serve", *options)
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("127.0.0.1.example", False), ("0.0.0.0", False), ("", False), ("10.0.0.1", False)],
)  # fmt: skip
def test_names_of_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_addresses_for_browsers(tmp_path: Path) -> None:
    digest = digest_of("a-token-of-a-test-0123")
    for host, address in (
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("localhost", "localhost"),
    ):
        settings = ServeSettings(workspace=tmp_path, host=host, token_digest=digest)
        assert settings.address == f"http://{address}:8000"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
