"""Room for a run's workers: how many the nodes hold, and waiting for a cluster that grows or is busy.

A cluster that scales itself has no nodes until something waits for them, and another job may hold what there
is. Ray would wait as well, for ever and without a word.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from nafnet_core import CapabilityError, StoppedError
from pipelines.config.sections import ScalingSection
from pipelines.console import TOLD

log = logging.getLogger(__name__)

_SAY_EVERY_S, _LOOK_EVERY_S = 30.0, 1.0


def cpus_a_worker(scaling: ScalingSection) -> float:
    """CPUs of a training worker and its readers."""
    return scaling.cpus_per_worker + scaling.readers_per_worker * scaling.reader_cpus


def worker_resources(scaling: ScalingSection) -> dict[str, float]:
    """What Ray reserves for a worker: its readers' CPUs too, so that they find room beside it."""
    return {"CPU": cpus_a_worker(scaling), **({"GPU": 1} if scaling.use_gpu else {})}


def nodes() -> list[dict[str, float]]:
    """Resources of the nodes that are alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fitting_workers(scaling: ScalingSection) -> int:
    """How many workers the nodes hold when nothing else runs; a worker and its readers are on one node."""
    fitting = 0
    for node in nodes():
        by_cpu = int((node.get("CPU", 0) + 1e-6) / cpus_a_worker(scaling))
        fitting += min(by_cpu, int(node.get("GPU", 0))) if scaling.use_gpu else by_cpu
    return fitting


def wait_for_room(
    scaling: ScalingSection, *, num_groups: int = 1, exit_code: Callable[[], int | None] = lambda: None
) -> None:
    """Have the cluster bring the nodes that groups of workers need, and wait until they are there and free.

    Args:
        scaling: who the workers are; of an elastic run, the least.
        num_groups: runs that are to go on at the same time. One is enough to begin.
        exit_code: not None once somebody asked to stop.

    Raises:
        CapabilityError: not one group has room within `scaling.wait_minutes`.
        StoppedError: somebody asked to stop.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    num_workers = scaling.least_workers * num_groups
    # An autoscaler starts nodes for a group that waits. It is given back at once, for Ray Train to take its
    # own.
    group = placement_group([worker_resources(scaling)] * num_workers)
    began = said = time.monotonic()
    try:
        while not group.wait(_LOOK_EVERY_S):
            now = time.monotonic()
            if (code := exit_code()) is not None:
                raise StoppedError("stopped, waiting for room in the cluster", exit_code=code)
            if now - began > scaling.wait_minutes * 60:
                if fitting_workers(scaling) >= scaling.least_workers:
                    return
                raise no_room(scaling)
            if now - said >= _SAY_EVERY_S or said == began:
                said = now
                log.warning(
                    "waiting for room for %s; there are %s",
                    workers_wanted(scaling, num_workers),
                    _had(scaling),
                )
    finally:
        remove_placement_group(group)
    if said != began:
        log.info("there is room for all workers now", extra=TOLD)


def no_room(scaling: ScalingSection) -> CapabilityError:
    """That the nodes do not hold the workers."""
    return CapabilityError(
        "no room for the workers on the nodes of this cluster",
        expected=workers_wanted(scaling, scaling.least_workers),
        got=_had(scaling),
        fix="Lower scaling.num_workers, scaling.cpus_per_worker or scaling.reader_cpus, or add nodes",
    )


def workers_wanted(scaling: ScalingSection, num_workers: int) -> str:
    """`4 × a worker with 0.95 CPUs and 1 GPU`."""
    return f"{num_workers} × a worker with {_amount(scaling, worker_resources(scaling))}"


def _had(scaling: ScalingSection) -> str:
    """Nodes with room for anything; of a thousand, the count of each kind."""
    kinds: dict[str, int] = {}
    for node in nodes():
        if node.get("CPU", 0):
            kind = _amount(scaling, node)
            kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(f"{count} × a node with {kind}" for kind, count in kinds.items()) or "no nodes for work"


def _amount(scaling: ScalingSection, resources: dict[str, float]) -> str:
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPU" + "s" * (gpus != 1)) * scaling.use_gpu
