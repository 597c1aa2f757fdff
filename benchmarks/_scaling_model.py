"""What a step of data-parallel training takes: gradients summed bucket by bucket beside the backward pass.

A bucket is sent once its last gradient is there and the bucket before it is through. Ring and tree as in
Patarasuk & Yuan (2009) and in NCCL, which takes the faster; on nodes of several GPUs each sums with its
neighbours first, then all of a node share its card. What moves bytes on a processor's own cores (copies of
the kernel, sums) keeps them from computing, so it is never hidden; on a GPU it is taken for free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MIB = 2**20
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = MIB, 25 * MIB  # DDP's own


@dataclass(frozen=True, kw_only=True)
class Step:
    """One worker's step without any other worker."""

    forward_s: float
    backward_s: float
    rest_s: float = 0.0
    """Clipping, the optimiser's step."""
    sizes_bytes: tuple[int, ...]
    """Of pieces of the gradient, in the order in which they are ready."""
    ready_s: tuple[float, ...]
    """After the backward pass began."""

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s + self.rest_s

    def lasting(self, seconds: float) -> Step:
        """The same course in another time."""
        factor = seconds / self.seconds
        return replace(
            self,
            forward_s=self.forward_s * factor,
            backward_s=self.backward_s * factor,
            rest_s=self.rest_s * factor,
            ready_s=tuple(factor * at for at in self.ready_s),
        )

    def accumulating(self, count: int) -> Step:
        """So many passes a step, of which the last one's backward pass hides the sum."""
        more_s = (count - 1) * (self.forward_s + self.backward_s)
        return replace(self, forward_s=self.forward_s + more_s)

    def buckets(self, bucket_mib: float | None) -> list[tuple[int, float]]:
        """Bytes, and when ready, as DDP puts the pieces together."""
        limits = [_FIRST_BUCKET_BYTES] if bucket_mib is None else [round(bucket_mib * MIB)]
        after = _BUCKET_BYTES if bucket_mib is None else limits[0]
        found, size, at = [], 0, 0.0
        for piece, at in zip(self.sizes_bytes, self.ready_s, strict=True):
            size += piece
            if size >= (limits[0] if not found else after):
                found.append((size, at))
                size = 0
        return [*found, (size, at)] if size else found


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way between neighbours."""

    bytes_per_s: float
    latency_s: float = 0.0

    def all_reduce_s(self, size_bytes: float, number: int) -> float:
        """Sum over so many."""
        if number < 2:
            return 0.0
        ring_s = 2 * (number - 1) * (self.latency_s + size_bytes / number / self.bytes_per_s)
        tree_s = 2 * math.ceil(math.log2(number)) * self.latency_s + 2 * size_bytes / self.bytes_per_s
        return min(ring_s, tree_s)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers, and what is between them."""

    num_nodes: int
    between: Link
    workers_a_node: int = 1
    inside: Link = Link(bytes_per_s=math.inf)
    host_s_per_byte: float = 0.0
    """Of a worker's computing time that a byte of the gradient takes."""
    jitter: float = 0.0
    """Standard deviation of one worker's time to compute, in parts of it."""

    @property
    def num_workers(self) -> int:
        return self.num_nodes * self.workers_a_node

    def all_reduce_s(self, size_bytes: float) -> float:
        inside_s = self.inside.all_reduce_s(size_bytes, self.workers_a_node)
        return inside_s + self.between.all_reduce_s(size_bytes, self.num_nodes)

    def step_s(self, step: Step, *, bucket_mib: float | None = None, bytes_share: float = 1.0) -> float:
        """Seconds of a step; `bytes_share` of the gradient's bytes travel, 0.5 in bf16."""
        # The slowest of n normal times is about √(2 ln n) deviations late.
        slowest = 1 + self.jitter * math.sqrt(2 * math.log(self.num_workers))
        host_s, through_s = 0.0, 0.0
        for size, at in step.buckets(bucket_mib):
            begin_s = max(at * slowest + host_s, through_s)
            through_s = begin_s + self.all_reduce_s(size * bytes_share)
            host_s += size * self.host_s_per_byte
        backward_s = max(step.backward_s * slowest + host_s, through_s)
        return (step.forward_s + step.rest_s) * slowest + backward_s

    def efficiency(self, step: Step, *, bucket_mib: float | None = None, bytes_share: float = 1.0) -> float:
        """Throughput against as many workers that know of no other."""
        return step.seconds / self.step_s(step, bucket_mib=bucket_mib, bytes_share=bytes_share)


def error(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Mean and largest relative deviation."""
    shares = [abs(a / b - 1) for a, b in zip(predicted, measured, strict=True)]
    return sum(shares) / len(shares), max(shares)
