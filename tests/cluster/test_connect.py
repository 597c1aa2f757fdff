"""Connecting to Ray: a local instance for the time of a `with` block."""

from __future__ import annotations

import re

import pytest

from cluster import connect as connect_module
from cluster.connect import connect
from nafnet_core import CapabilityError, InputError


@pytest.mark.ray
def test_a_local_instance_lives_as_long_as_the_block() -> None:
    import ray

    with connect():
        assert ray.is_initialized()

        @ray.remote(num_cpus=0)
        def packages() -> list[str]:
            import cluster
            import nafnet_core
            import pipelines

            return [module.__name__ for module in (nafnet_core, pipelines, cluster)]

        assert ray.get(packages.remote()) == ["nafnet_core", "pipelines", "cluster"]
        with connect():
            assert ray.is_initialized()
        # The inner block found a connection, and so leaves it.
        assert ray.is_initialized()
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("http://head:8265", InputError, "nafnet cluster submit -- COMMAND"),
        ("head", InputError, "not the address of a Ray cluster"),
        ("ray://head", InputError, "not the address of a Ray cluster"),
        ("auto", CapabilityError, "no node of a Ray cluster"),
        ("127.0.0.1:1", CapabilityError, "use ray://HOST:10001"),
        ("ray://127.0.0.1:1", CapabilityError, "'ray://127.0.0.1:1' (got Connection refused)"),
        ("ray://no.such.host.invalid:1", CapabilityError, "no Ray cluster answers there"),
    ],
)
def test_an_address_that_cannot_be_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(connect_module, "_is_node", lambda: False)
    with pytest.raises(kind, match=re.escape(words)), connect(address):
        pass


def test_rays_paragraphs_become_a_line() -> None:
    """Of 2.60, as it says them."""
    versions = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: 3.9.18\n"
        "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    line = str(connect_module._explained("ray://head:10001", versions))
    assert "expected Ray 2.40.0, Python 3.9.18 there" in line and "\n" not in line
    token = RuntimeError("Authentication failed: the token is missing")
    assert "wants its token" in str(connect_module._explained("ray://head:10001", token))
    other = RuntimeError("Something else entirely")
    assert "Something else entirely" in str(connect_module._explained("ray://head:10001", other))
