"""Packets of photos to workers of a Ray cluster: a Ray Data job with one model a worker.

With side and number of tiles given, results are those of one machine with as many threads to the last bit.
With another number oneDNN may add up in another order, and one level in some 500,000 differs.
"""

from __future__ import annotations

import gc
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nafnet_core import CapabilityError, InputError, NAFNetError
from nafnet_core.memory import free_memory_mib
from nafnet_core.tiling import tile_px_for
from pipelines import nodes
from pipelines.models import LoadedModel
from pipelines.restore.finding import Item
from pipelines.restore.reading import PACKET
from pipelines.restore.record import Restored
from pipelines.restorer import Restorer, RestoreSettings
from pipelines.storage import LocalFolder, RemoteFolder

_MARKED = ".restore"
# A wave is one Ray Data execution: what it keeps of each packet, and takes before the first, is bounded.
_WAVE_PACKETS = 4096
_PACKETS_A_WORKER = 4  # at least, where there are photos enough: the last ones end at about the same time
_CPU_SHARE = 0.9  # of all, of workers that have no GPU: Ray Data's own tasks want some
_MEMORY_SHARE = 0.5  # of what is free on a node, for all of its workers together


def restore_on_cluster(
    items: Sequence[Item],
    before: Mapping[str, Restored],
    loaded: LoadedModel,
    settings: RestoreSettings,
    out: LocalFolder | RemoteFolder,
    *,
    quality: int,
    num_workers: int | None,
) -> Iterator[Restored]:
    """Restore on the cluster that this process is connected to; entries come as they are finished.

    Args:
        items: photos and videos.
        before: entries of earlier runs, by output.
        loaded: the model, which is sent to the workers.
        settings: as for one machine. Without a tile's side each worker takes what fits into its share of the
            memory.
        out: a folder that all nodes see, or a bucket.
        quality: 1 to 100, of JPEG and WebP.
        num_workers: None is one for each GPU, or for each CPU where there is no GPU.

    Raises:
        InputError: nodes do not see the photos or the output folder.
        CapabilityError: storage that does not answer.
    """
    import ray
    import ray.data

    from cluster.connect import quiet_data_context

    quiet_data_context()
    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1.0)
    num_workers = num_workers or num_gpus or max(1, int(num_cpus))
    packets = list(_packets(items, num_workers, settings))
    num_workers = min(num_workers, len(packets))
    token = uuid.uuid4().hex
    marked = out.below(_MARKED)
    marked.make()
    nodes.mark(marked, token)
    is_on_gpu = num_gpus > 0
    # On several nodes workers that find no room wait, for an autoscaler too; a single machine has them share.
    is_alone = len(ray.nodes()) == 1
    cpus = math.floor(100 * _CPU_SHARE * num_cpus / num_workers) / 100 if is_alone else 1.0
    places = {
        "num_gpus": 1 if is_on_gpu else None,
        "num_cpus": None if is_on_gpu else min(1.0, cpus),
        "fn_constructor_kwargs": {
            "model": ray.put(loaded),
            "settings": settings,
            "out": out,
            "quality": quality,
            "token": token,
            "on_node": -(-num_workers // max(1, len(ray.nodes()))),
        },
    }
    try:
        for start in range(0, len(packets), _WAVE_PACKETS):
            rows = [
                {
                    "packet": (
                        packet,
                        {item.output: before[item.output] for item in packet if item.output in before},
                    )
                }
                for packet in packets[start : start + _WAVE_PACKETS]
            ]
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Worker,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_workers),
                **places,
            )
            for row in dataset.iter_rows():
                if row["refused"]:
                    raise (InputError if row["is_input"] else CapabilityError)(row["refused"])
                yield row["entry"]
            # What an execution leaves behind refers to itself: it would lie there for long.
            del dataset, rows
            gc.collect()
    finally:
        marked.remove()


def _packets(items: Sequence[Item], num_workers: int, settings: RestoreSettings) -> Iterator[list[Item]]:
    """Photos that one worker takes at a time, each video by itself.

    Which of them share a batch must not depend on the workers. Where tiles are run one by one, none do.
    """
    photos = [item for item in items if not item.is_video]
    size = PACKET
    if settings.tile_batch == 1:
        size = min(PACKET, max(1, len(photos) // (_PACKETS_A_WORKER * num_workers)))
    yield from ([item] for item in items if item.is_video)
    yield from (photos[start : start + size] for start in range(0, len(photos), size))


class _Worker:
    """One model, on one GPU or on a share of the CPUs."""

    def __init__(
        self,
        *,
        model: Any,
        settings: RestoreSettings,
        out: LocalFolder | RemoteFolder,
        quality: int,
        token: str,
        on_node: int,
    ) -> None:
        import ray

        from pipelines.restore.work import FileWork

        self._out, self._token = out, token
        self._restorer = Restorer(ray.get(model), settings)
        if settings.tile_px is None and self._restorer.device.type == "cpu":
            # Each of a node's workers would take half of what is free.
            free_mib = free_memory_mib(self._restorer.device) * _MEMORY_SHARE / on_node
            self._restorer.limit_tiles(tile_px_for(self._restorer.network, free_mib))
        self._work = FileWork(self._restorer, out, quality=quality)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        items, before = batch["packet"][0]
        # Raised in the actor, it would come out as Ray's own error with pages of trace.
        try:
            nodes.check_folder(self._out.below(_MARKED), self._token)
            nodes.check_images(item.source for item in items)
            for entry in self._work.run(items, before):
                yield _row(entry=entry)
        except NAFNetError as error:
            yield _row(refused=str(error), is_input=isinstance(error, InputError))


def _row(*, entry: Restored | None = None, refused: str = "", is_input: bool = False) -> dict[str, Any]:
    return {"entry": [entry], "refused": [refused], "is_input": [is_input]}
