"""What a cluster must be able to do for a run, tried on every node: `nafnet cluster preflight`.

    nafnet cluster preflight --address auto --config gopro_width64 --data s3://bucket/gopro

`train` and `tune` do the part of it that costs little before they start workers on several nodes.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import preflight as common
from cluster.preflight import Check, Node
from nafnet_core import CapabilityError, InputError, NAFNetError
from pipelines.config import RunConfig
from pipelines.probe import CREDENTIALS, StageProbe
from pipelines.storage import LocalFolder, RemoteFolder
from pipelines.urls import is_url, public
from pipelines.workspace import Workspace

_Storage = LocalFolder | RemoteFolder
_ANSWER_S = 60.0
_PIECE_BYTES, _BRIEF_BYTES = 8 * 2**20, 2**10
_RATE_S = 0.3
_SLOW_READ_MB_S = 20


def run(
    config: RunConfig | None,
    workspace: Workspace,
    *,
    on_check: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Try out the cluster that this process is connected to.

    Args:
        config: the run that it is for: its stores, its storage, its workers. None leaves these lines out.
        workspace: where runs and the tracking data base are.
        on_check: called with each line as it comes.
    """
    report: list[Check] = []

    def add(check: Check | None) -> None:
        if check is not None:
            report.append(check)
            on_check(check)

    nodes = common.nodes()
    with _probes(nodes) as probes:
        facts, absent = _facts(probes, with_gpus=True)
        add(_present(nodes, absent))
        probes = {node: probe for node, probe in probes.items() if node not in absent}
        for check in common.judge_versions(common.versions(), facts):
            add(check)
        add(common.judge_gpus(facts))
        add(common.judge_disks(facts))
        add(common.judge_shared_memory(facts))
        add(common.judge_clocks(_skews_s(probes)))
        add(common.judge_variables([name for name in CREDENTIALS if os.environ.get(name)], facts))
        add(common.judge_network(_rates(probes)))
        if config is not None:
            add(_room(config))
            for store in _stores(config):
                add(_check_store(probes, store, _PIECE_BYTES))
            from pipelines.train.attempt import storage_of

            storage = storage_of(config, workspace.make().run_dir(config.name))[0]
            with _made(storage):
                add(_check_storage(probes, storage, _PIECE_BYTES))
        add(_check_tracking(probes, workspace, config))
    return report


def in_brief(config: RunConfig | None, storage: _Storage) -> None:
    """What may not be wrong on any node of several, before workers are started.

    Args:
        config: the run whose stores the nodes are to read; None where there is none.
        storage: where all nodes write.

    Raises:
        InputError: a node does not see the run's storage, or a store.
        CapabilityError: nodes have other versions, or do not answer.
    """
    nodes = common.nodes()
    if len(nodes) == 1 and isinstance(storage, LocalFolder):
        return  # this machine, which has just made the folder
    with _probes(nodes) as probes:
        facts, absent = _facts(probes, with_gpus=False)
        probes = {node: probe for node, probe in probes.items() if node not in absent}
        checks = [_present(nodes, absent), *common.judge_versions(common.versions(), facts)]
        for check in checks:
            if check.verdict == "fail":
                raise CapabilityError(
                    f"the cluster has a fault: {check.name}", got=check.found, fix=check.fix
                )
        for check in (
            *(_check_store(probes, store, _BRIEF_BYTES) for store in (_stores(config) if config else ())),
            _check_storage(probes, storage, _BRIEF_BYTES),
        ):
            if check.verdict == "fail":
                raise InputError(
                    f"not every node of the cluster can use the {check.name}", got=check.found, fix=check.fix
                )


@contextmanager
def _probes(nodes: Sequence[Node]) -> Iterator[dict[Node, Any]]:
    """One actor on each node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor = ray.remote(num_cpus=0)(StageProbe)
    probes = {
        node: actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False), max_concurrency=2
        ).remote()
        for node in nodes
    }
    try:
        yield probes
    finally:
        for probe in probes.values():
            ray.kill(probe)


def _facts(probes: dict[Node, Any], *, with_gpus: bool) -> tuple[list[common.Facts], set[Node]]:
    """What nodes say of themselves, and which do not answer."""
    import ray

    asked = {
        node: probe.look.remote(
            gpus=int(node.gpus) if with_gpus else 0,
            object_store_bytes=node.object_store_bytes,
            works=node.works,
        )
        for node, probe in probes.items()
    }
    # What this process needs later takes seconds to import, as nodes do to start.
    import mlflow.tracking  # noqa: F401

    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
    facts, absent = [], set()
    for node, reference in asked.items():
        try:
            facts.append(ray.get(reference, timeout=0))
        except (ray.exceptions.RayError, TimeoutError):
            absent.add(node)
    if not facts:
        raise CapabilityError("no node of the cluster answers", got=f"{len(probes)} nodes, {_ANSWER_S:g} s")
    return facts, absent


def _present(nodes: Sequence[Node], absent: set[Node]) -> Check:
    if absent:
        return Check(
            name="nodes",
            verdict="fail",
            found=f"no answer from {', '.join(sorted(node.host for node in absent))}",
            fix="Is it cut off, or out of memory? `ray status` tells what the cluster knows of it",
        )
    working = [node for node in nodes if node.works]
    cpus, gpus = sum(node.cpus for node in working), sum(node.gpus for node in working)
    return Check(
        name="nodes",
        verdict="ok" if working else "warn",
        found=f"{len(working)} of {len(nodes)} do work, with {cpus:g} CPUs and {gpus:g} GPUs",
        fix="" if working else "An autoscaler brings them when a run waits; the other lines are of the head",
    )


def _get(references: Any) -> Any:
    """What actors answer. Raises `CapabilityError` where one falls silent: not to wait for ever."""
    import ray

    try:
        return ray.get(references, timeout=_ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise CapabilityError(
            "a node of the cluster fell silent while it was looked at",
            got=str(error).splitlines()[0][:150],
            fix="`ray status` tells what the cluster knows of its nodes; then try again",
        ) from error


def _skews_s(probes: dict[Node, Any]) -> dict[str, float]:
    return {
        node.host: common.skew_s(lambda probe=probe: _get(probe.now.remote()))
        for node, probe in probes.items()
    }


def _workers(probes: dict[Node, Any]) -> list[Node]:
    """Nodes that do work; of a cluster that has none yet, the head stands in."""
    return [node for node in probes if node.works] or list(probes)


def _rates(probes: dict[Node, Any]) -> dict[tuple[str, str], float | str]:
    """MB/s from each working node to the next, one after another: together they would share a switch."""
    working = [node for node in probes if node.works]
    if len(working) < 2:
        return {}
    rates: dict[tuple[str, str], float | str] = {}
    for sender, receiver in zip(working, [*working[1:], working[0]], strict=True):
        port = _get(probes[receiver].listen.remote())
        rate = _get(probes[sender].send.remote(receiver.address, port, _RATE_S))
        rates[sender.host, receiver.host] = rate
    return rates


def _room(config: RunConfig) -> Check:
    """Whether workers and readers fit together, node by node."""
    from pipelines.train.room import fitting_workers, workers_wanted

    scaling = config.scaling
    fitting, wanted = fitting_workers(scaling), scaling.least_workers
    found = f"for {fitting}; wanted are {workers_wanted(scaling, wanted)}, its readers included"
    if fitting >= wanted:
        return Check(name="room for workers", verdict="ok", found=found)
    fix = f"A run waits {scaling.wait_minutes:g} min for an autoscaler to bring more, else lower scaling.*"
    return Check(name="room for workers", verdict="warn", found=found, fix=fix)


def _stores(config: RunConfig) -> list[str]:
    places = [store.path for store in config.data.train]
    return [*places, *([] if config.data.val is None else [config.data.val])]


def _check_store(probes: dict[Node, Any], place: str, size: int) -> Check:
    """Whether every working node reads a store, and how fast."""
    working = _workers(probes)
    rates = _get([probes[node].read_store.remote(place, i, size) for i, node in enumerate(working)])
    name = f"store {public(place)}"
    for node, rate in zip(working, rates, strict=True):
        if isinstance(rate, str):
            fix = "Put it on storage that all nodes share under this path, or at a URL"
            return Check(name=name, verdict="fail", found=f"{node.host}: {rate}", fix=fix)
    return _timed(name, "read", rates, size)


def _check_storage(probes: dict[Node, Any], storage: _Storage, size: int) -> Check:
    """Whether what one node writes can be read by the next, and here."""
    working = _workers(probes)
    names = [f"probe-{uuid.uuid4().hex}" for _ in working]
    name = f"storage {public(str(storage))}"
    fix = "Name storage that all nodes share, or a URL, with --set checkpoint.storage=PLACE"
    try:
        wrote = _get(
            [
                probes[node].write.remote(storage, file, size)
                for node, file in zip(working, names, strict=True)
            ]
        )
        readers = [*working[1:], *working[:1]]
        read = _get(
            [
                probes[node].read_back.remote(storage, file, size)
                for node, file in zip(readers, names, strict=True)
            ]
        )
        for node, reader, file, written, back in zip(working, readers, names, wrote, read, strict=True):
            fault = written if isinstance(written, str) else None
            if fault is None and storage.size(file) is None:
                fault = "wrote to a folder of its own, not to this one"
            if fault is not None:
                return Check(name=name, verdict="fail", found=f"node {node.host}: {fault}", fix=fix)
            if isinstance(back, str):
                return Check(name=name, verdict="fail", found=f"node {reader.host}: {back}", fix=fix)
    finally:
        for file in names:
            storage.delete(file)
    return _timed(name, "written and read", [*wrote, *read], size)


def _timed(name: str, done: str, rates: Sequence[float], size: int) -> Check:
    if size < _PIECE_BYTES or not rates:
        return Check(name=name, verdict="ok", found=f"{done} on every node")
    slowest = min(rates)
    is_slow = 0 < slowest < _SLOW_READ_MB_S
    return Check(
        name=name,
        verdict="warn" if is_slow else "ok",
        found=f"{done} on every node, {slowest:.0f} MB/s at the slowest",
        fix="Readers may not keep up: prefer storage in the cluster's own region" if is_slow else "",
    )


def _check_tracking(probes: dict[Node, Any], workspace: Workspace, config: RunConfig | None) -> Check:
    """Whether the server answers here, where the client is, and from the nodes."""
    from pipelines.tracking import mlflow_client
    from pipelines.tracking.client import tracking_uri

    configured = config.tracking.uri if config is not None else None
    uri = tracking_uri(workspace, configured)
    name = f"tracking {public(uri)}"
    try:
        mlflow_client(workspace, configured)
    except NAFNetError as error:
        return Check(name=name, verdict="fail", found=str(error), fix="Set tracking.uri")
    if not is_url(uri) or uri.startswith("sqlite:"):
        return Check(name=name, verdict="ok", found="the workspace's own, which the driver alone opens")
    parts = urlsplit(uri)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 5432)
    faults = _get([probe.reaches.remote(parts.hostname, port) for probe in probes.values()])
    for node, fault in zip(probes, faults, strict=True):
        if fault is not None:
            return Check(
                name=name,
                verdict="warn",
                found=f"answers here, not on {node.host}: {fault}",
                fix="Only the driver asks it; of a submitted job that runs on the head",
            )
    return Check(name=name, verdict="ok", found="answers here and on every node")


@contextmanager
def _made(storage: _Storage) -> Iterator[None]:
    """The run's folder, which is taken away again if it was not there."""
    path = Path(storage.path) if isinstance(storage, LocalFolder) else None
    was_there = path is None or path.exists()
    storage.make()
    try:
        yield
    finally:
        if path is not None and not was_there:
            path.rmdir()
