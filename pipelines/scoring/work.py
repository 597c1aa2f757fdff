"""The work of an evaluation, image by image: in this process, or on workers of a Ray cluster.

One thread an image, wherever it is done: sums of fp32 are split by the number of threads, and then outputs
differ by a level here and there. So workers on many cores give a single process's scores to the last bit.
"""

from __future__ import annotations

import gc
import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nafnet_core import CapabilityError, InputError, NAFNetError
from nafnet_core.perceptual import feature_distance
from nafnet_core.tiling import Network, restore_image
from pipelines.png import decode_png, encode_png
from pipelines.scoring.image import ImageScore, score_image, with_sharpness
from pipelines.scoring.pairs import PairPlace, Pairs
from pipelines.shards import Pair

# A wave is one Ray Data execution: what it keeps of each image, and takes before the first, is bounded.
_WAVE_IMAGES = 4096
# A core's share that is left to Ray's own tasks, where workers would take all there are.
_CPU_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What became of one image."""

    index: int
    score: ImageScore
    seconds: float
    """The network and its conversions, without reading and scoring."""
    digest: bytes
    """Of the pair, see `Pair.digest`."""
    peak_memory_mib: float
    """Largest resident size of the process so far."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A network, and by what its results are judged."""

    model: Network
    train_patch_px: int | None
    features: nn.Module | None = None
    """For the perceptual distance; None leaves it out."""

    def restore(self, pair: Pair) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, by the protocol: whole, fp32, on one thread."""
        with one_thread():
            restored = restore_image(self.model, pair.lq, train_patch_px=self.train_patch_px, tile_px=None)
        assert restored.dtype == np.uint8
        return restored  # type: ignore[return-value]

    def score(self, index: int, pair: Pair) -> Scored:
        """Restore and score one pair."""
        start = time.perf_counter()
        restored = self.restore(pair)
        seconds = time.perf_counter() - start
        with one_thread():
            score = score_image(pair.key, pair.scene, pair.lq, restored, pair.gt)
            score = with_sharpness(score, pair.lq, restored, pair.gt)
            if self.features is not None:
                truth = _nchw(pair.gt)
                blurred, clear = (
                    feature_distance(self.features, _nchw(image), truth).item()
                    for image in (pair.lq, restored)
                )
                score = replace(score, perceptual_blurred=blurred, perceptual_restored=clear)
        return Scored(
            index=index,
            score=score,
            seconds=seconds,
            digest=pair.digest(),
            peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )


def score_all(scorer: Scorer, pairs: Pairs, *, num_workers: int | None = None) -> Iterator[Scored]:
    """Score every pair, in the order in which they are done.

    Args:
        scorer: the network and its judges.
        pairs: what to score.
        num_workers: actors of the Ray cluster that this process is connected to; None is this process alone.

    Raises:
        InputError: a pair is unreadable, or a node does not see the folder.
        CapabilityError: a bucket or disk that does not answer.
    """
    if num_workers is None:
        for index, pair in enumerate(pairs):
            yield scorer.score(index, pair)
        return
    for row in _on_workers(scorer, pairs, range(len(pairs)), num_workers, wants="score"):
        told = json.loads(row["told"])
        score = ImageScore(**told.pop("score"))
        yield Scored(index=row["index"], score=score, digest=row["content"], **told)


def restore_some(
    scorer: Scorer, pairs: Pairs, indices: Sequence[int], *, num_workers: int | None = None
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Restore some pairs again, for pictures: their numbers, and (H, W, 3) uint8 RGB. As `score_all`."""
    if num_workers is None:
        for index in indices:
            yield index, scorer.restore(pairs[index])
        return
    for row in _on_workers(scorer, pairs, indices, num_workers, wants="image"):
        yield row["index"], decode_png(row["content"])


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_workers(
    scorer: Scorer, pairs: Pairs, indices: Sequence[int], num_workers: int, *, wants: str
) -> Iterator[dict[str, Any]]:
    import ray
    import ray.data

    from cluster.connect import quiet_data_context

    quiet_data_context()
    held = ray.put(scorer)  # once a node, not once a worker
    num_cpus = ray.cluster_resources().get("CPU", 1.0)
    waiting = iter(indices)
    while rows := [{"place": pairs.place_of(index)} for index in islice(waiting, _WAVE_IMAGES)]:
        # A task an image: of a worker that is killed, Ray gives what it had begun to others.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=(held, wants),
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=num_workers,
                initial_size=min(num_workers, len(rows)),
                max_tasks_in_flight_per_actor=2,
            ),
            num_cpus=round(min(1.0, _CPU_SHARE * num_cpus / num_workers), 3),
        )
        for row in dataset.iter_rows():
            if row["refused"]:
                raise (InputError if row["is_input"] else CapabilityError)(row["refused"])
            yield row
        # What an execution leaves behind refers to itself: it would lie there for long.
        del dataset, rows
        gc.collect()


class _Worker:
    """One process of the cluster, with the network in it."""

    def __init__(self, held: Any, wants: str) -> None:
        import ray

        self._scorer: Scorer = ray.get(held)
        self._wants = wants

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        # Raised in the task, it would come out as Ray's own error with pages of trace.
        place: PairPlace = row["place"]
        done = {"index": place.index, "told": "", "content": b"", "refused": "", "is_input": False}
        try:
            return {**done, **self._do(place)}
        except NAFNetError as error:
            return {**done, "refused": str(error), "is_input": isinstance(error, InputError)}
        except OSError as error:
            line = CapabilityError(error.strerror or str(error), file=error.filename)
            return {**done, "refused": str(line)}

    def _do(self, place: PairPlace) -> dict[str, Any]:
        pair = place.read()
        if self._wants == "image":
            return {"content": encode_png(self._scorer.restore(pair))}
        scored = self._scorer.score(place.index, pair)
        told = {
            "score": scored.score.to_dict(),
            "seconds": scored.seconds,
            "peak_memory_mib": scored.peak_memory_mib,
        }
        return {"told": json.dumps(told), "content": scored.digest}


def _nchw(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].float() / 255
