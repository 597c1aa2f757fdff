"""Connecting to Ray: a local instance for the time of a `with` block."""

from __future__ import annotations

import pytest

from cluster.connect import connect


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
