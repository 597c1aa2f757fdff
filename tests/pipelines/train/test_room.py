"""Room for workers: waited for, told, and not for ever. Counting it: tests/pipelines/tune/test_queue.py."""

from __future__ import annotations

import logging

import pytest

from cluster.connect import connect
from nafnet_core import CapabilityError, StoppedError
from pipelines.config.sections import ScalingSection
from pipelines.train import room
from pipelines.train.interface import interface_of


@pytest.mark.ray
def test_room_is_waited_for_and_what_is_asked_is_given_back(caplog: pytest.LogCaptureFixture) -> None:
    import ray

    few = ScalingSection(num_workers=1, cpus_per_worker=0.1, reader_cpus=0.1)
    many = ScalingSection(num_workers=(500, 600), wait_minutes=0.03)
    with connect(), caplog.at_level(logging.INFO, logger="pipelines"):
        room.wait_for_room(few)
        assert not caplog.records, "what is there at once is not worth a line"
        with pytest.raises(CapabilityError, match=r"no room.*500 × a worker with 0.95 CPUs.*1 × a node with"):
            room.wait_for_room(many)
        assert "waiting for room for 500 × a worker with 0.95 CPUs; there are 1 × a node" in caplog.text
        with pytest.raises(StoppedError) as stopped:
            room.wait_for_room(many, exit_code=lambda: 143)
        assert stopped.value.exit_code == 143
        # Several groups are asked for; one that has room is enough to begin.
        room.wait_for_room(few.model_copy(update={"wait_minutes": 0.03}), num_groups=500)
        groups = ray.util.placement_group_table().values()
        assert {group["state"] for group in groups} == {"REMOVED"}


def test_the_interface_is_that_of_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
