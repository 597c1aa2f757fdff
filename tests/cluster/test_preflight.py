"""What the facts of nodes mean; how they are gathered is tried on several hosts in test_hosts.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster import preflight
from cluster.preflight import Facts

_GIB = 2**30
_VERSIONS = preflight.versions()
_NODE = Facts(
    host="one",
    versions=_VERSIONS,
    disk_free={"/tmp/ray": 100 * _GIB},
    shared_memory=16 * _GIB,
    object_store_bytes=8 * _GIB,
)
_GPU_NODE = replace(_NODE, gpus_expected=8, gpus_seen=8, gpu_name="H100", nccl="2.29.7")


def test_versions_that_agree() -> None:
    must, should = preflight.judge_versions(_VERSIONS, [_NODE, replace(_NODE, host="two")])
    assert (must.verdict, should.verdict) == ("ok", "ok")
    assert _VERSIONS["torch"] in must.found


def test_another_torch_fails_and_another_numpy_warns() -> None:
    other = replace(_NODE, host="two", versions=_VERSIONS | {"torch": "2.7.0", "numpy": "1.26.4"})
    must, should = preflight.judge_versions(_VERSIONS, [_NODE, other])
    assert must.verdict == "fail"
    assert f"torch {_VERSIONS['torch']} on here, one, 2.7.0 on two" in must.found
    assert (should.verdict, "1.26.4 on two" in should.found) == ("warn", True)


def test_a_build_of_the_same_version_counts_as_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "version", lambda package: "2.13.0+cu130")
    assert preflight.versions()["torch"] == "2.13.0"


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "ok", "16 on 2 nodes: H100; NCCL 2.29.7"),
        ({"gpus_seen": 7}, "fail", "two: Ray has 8, torch sees 7"),
        ({"nccl": ""}, "fail", "no NCCL"),
        ({"nccl": "2.20.1"}, "fail", "2.20.1, 2.29.7"),
        ({"gpu_name": "A10G"}, "warn", "A10G, H100"),
    ],
)
def test_gpus(changes: dict[str, object], verdict: str, words: str) -> None:
    check = preflight.judge_gpus([_GPU_NODE, replace(_GPU_NODE, host="two", **changes)])
    assert check is not None
    assert (check.verdict, words in check.found) == (verdict, True)


def test_a_cluster_without_gpus_has_no_line_of_them() -> None:
    assert preflight.judge_gpus([_NODE]) is None


@pytest.mark.parametrize(("free", "verdict"), [(100, "ok"), (5, "warn"), (0.5, "fail")])
def test_the_fullest_disk_counts(free: float, verdict: str) -> None:
    full = replace(_NODE, host="two", disk_free={"/cache": int(free * _GIB)})
    check = preflight.judge_disks([_NODE, full])
    assert check.verdict == verdict
    assert ("/cache on two" in check.found) == (verdict != "ok")


@pytest.mark.parametrize(
    ("size", "words"), [(64 * 2**20, "two: 0.1 GiB for an object store of 8.0"), (None, "none")]
)
def test_a_small_dev_shm_fails(size: int | None, words: str) -> None:
    check = preflight.judge_shared_memory([_NODE, replace(_NODE, host="two", shared_memory=size)])
    assert (check.verdict, words in check.found) == ("fail", True)
    assert "--shm-size" in check.fix


@pytest.mark.parametrize(("apart", "verdict"), [(0.5, "ok"), (30, "warn"), (900, "fail")])
def test_clocks_are_compared_with_one_another(apart: float, verdict: str) -> None:
    check = preflight.judge_clocks({"one": -apart / 2, "two": apart / 2, "three": 0})
    assert check.verdict == verdict


def test_skew_is_taken_from_the_quickest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked at 0, 20 and 30, the answers take 10, 2 and 6 s. The second tells best: 5 s ahead.
    times = iter([0.0, 10.0, 20.0, 22.0, 30.0, 36.0])
    monkeypatch.setattr(preflight.time, "time", lambda: next(times))
    answers = iter([14.0, 26.0, 36.0])
    assert preflight.skew_s(lambda: next(answers)) == 5.0


def test_the_network() -> None:
    assert preflight.judge_network({}) is None
    fast = preflight.judge_network({("one", "two"): 1200.0, ("two", "one"): 900.0})
    slow = preflight.judge_network({("one", "two"): 1200.0, ("two", "one"): 12.0})
    closed = preflight.judge_network({("one", "two"): 1200.0, ("two", "one"): "Connection refused"})
    assert fast is not None and slow is not None and closed is not None
    assert [fast.verdict, slow.verdict, closed.verdict] == ["ok", "warn", "fail"]
    assert "12 MB/s at the slowest, two to one" in slow.found
    assert "two cannot connect to one: Connection refused" in closed.found


def test_credentials_are_told_by_name() -> None:
    facts = [replace(_NODE, variables=("KEY",)), replace(_NODE, host="two")]
    check = preflight.judge_variables(["KEY"], facts)
    assert check is not None
    assert (check.verdict, check.found) == ("warn", "KEY is not set on two")
    assert preflight.judge_variables(["KEY"], facts[:1]) is None


def test_a_probe_sends_to_another_and_says_what_is_wrong() -> None:
    receiver, sender = preflight.Probe(), preflight.Probe()
    rate = sender.send("127.0.0.1", receiver.listen(), 0.05)
    assert isinstance(rate, float) and rate > 1
    assert sender.send("127.0.0.1", 1, 0.05) == "Connection refused"


def test_a_probe_tells_names_and_not_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "its value")
    facts = preflight.Probe().facts(
        gpus=0, object_store_bytes=1, variables=["PLANTED", "OTHER"], folders=["/no/such"]
    )
    assert facts.variables == ("PLANTED",)
    assert "its value" not in repr(facts)
    assert facts.disk_free["/no/such"] > 0  # its nearest parent's
