"""What Prometheus is told, for each replica."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.serve.batching import Answer, Served

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """Counters of one replica, in a registry of their own; each line names the replica."""

    def __init__(self, replica: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry, self._replica = CollectorRegistry(), replica

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"nafnet_{name}", told, ["replica", *labels], registry=self._registry)

        def gauge(name: str, told: str, *labels: str) -> Gauge:
            return Gauge(f"nafnet_{name}", told, ["replica", *labels], registry=self._registry)

        def histogram(name: str, told: str) -> Histogram:
            return Histogram(f"nafnet_{name}", told, ["replica"], registry=self._registry, buckets=_SECONDS)

        self._requests = counter("requests", "Answers of /v1/restore", "status")
        self._seconds = histogram(
            "request_seconds", "From the end of the upload to the answer, where it was 200"
        )
        self._network = histogram("network_seconds", "In the network and around it")
        self._queue_seconds = histogram("queue_seconds", "In the queue")
        self._open = gauge("requests_open", "Requests that are being worked on or wait")
        self._waiting = gauge("queue_length", "Decoded images before the network")
        self._tiles = counter("tiles", "Tiles through the network")
        self._batches = counter("batches", "Groups of images that went through the network together")
        broken = counter("tiles_broken", "Tiles that the network broke", "mended_by")
        # With labels from the start: of a series that begins at its first count, that count is not seen.
        self._redone = broken.labels(replica, "no local statistics")
        self._kept = broken.labels(replica, "keeping the input")
        self._model = gauge("model_info", "The model that answers", "label", "version", "digest", "backend")
        self._taken = counter("champions_taken", "Promotions that were followed").labels(replica)
        self._refused = counter("champions_refused", "Champions that were refused").labels(replica)
        self._silent = gauge("registry_silent", "1 while the registry does not answer")

    def answered(self, status: int) -> None:
        """One request, however it ended."""
        self._requests.labels(self._replica, str(status)).inc()

    def restored(self, answer: Answer, queue_s: float, seconds: float) -> None:
        """One image."""
        done = answer.restoration
        self._seconds.labels(self._replica).observe(seconds)
        self._network.labels(self._replica).observe(answer.network_s)
        self._queue_seconds.labels(self._replica).observe(queue_s)
        self._tiles.labels(self._replica).inc(done.num_tiles)
        self._redone.inc(done.num_redone)
        self._kept.inc(done.num_kept)

    def batch(self) -> None:
        """A group of images went through the network together."""
        self._batches.labels(self._replica).inc()

    def champion(self, *, is_refused: bool) -> None:
        """The alias moved."""
        (self._refused if is_refused else self._taken).inc()

    def text(self, *, served: Served, num_open: int, num_waiting: int, is_silent: bool) -> bytes:
        """All of it, in Prometheus's text format."""
        from prometheus_client import generate_latest

        for gauge, value in (
            (self._open, num_open),
            (self._waiting, num_waiting),
            (self._silent, is_silent),
        ):
            gauge.labels(self._replica).set(value)
        self._model.clear()
        backend = served.restorer.loaded.backend
        self._model.labels(self._replica, served.label, served.version or "", served.digest, backend).set(1)
        return generate_latest(self._registry)
