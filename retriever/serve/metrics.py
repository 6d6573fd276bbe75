"""Counters of the service in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The service's counters, in a registry of their own, and those of the process (CPU, memory, descriptors)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "retriever_requests", "Requests answered.", ("route", "method", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "retriever_request_seconds", "Time of a request.", ("route",), buckets=SECONDS, registry=self._registry
        )
        self._texts = Counter("retriever_embedded", "Texts and images embedded.", ("side",), registry=self._registry)
        self._batches = Histogram(
            "retriever_batch_size", "Texts and images per batch.", buckets=BATCHES, registry=self._registry
        )
        self._reloads = Counter(
            "retriever_index_reloads", "Changed indexes opened while serving.", ("outcome",), registry=self._registry
        )
        self._gauge = Gauge("retriever_state", "Current state.", ("of",), registry=self._registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, sizes: dict[str, int]) -> None:
        """Count a batch: side ("query" or "document") -> number of texts and images."""
        for side, size in sizes.items():
            self._texts.labels(side).inc(size)
        self._batches.observe(sum(sizes.values()))

    def reload(self, outcome: str) -> None:
        """Count a reload: "done" or "failed"."""
        self._reloads.labels(outcome).inc()

    def watch(self, name: str, value: Callable[[], float]) -> None:
        """Report a value that is read when the metrics are asked for."""
        self._gauge.labels(name).set_function(value)

    def response(self) -> Response:
        """All metrics in Prometheus's text format."""
        return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})
