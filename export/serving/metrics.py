"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own.

    Labels are routes, statuses and the names of the models: never what a client chose.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "epdistill_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "epdistill_request_seconds", "From header to answer.", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._images = Histogram(
            "epdistill_batch_images", "Images in a batch.", ["model"],
            buckets=_IMAGES, registry=registry,
        )  # fmt: skip
        self._computed = Histogram(
            "epdistill_compute_seconds", "onnxruntime, per batch.", ["model"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._queued = Histogram(
            "epdistill_queue_seconds", "Waiting, per request.", ["model"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._waiting = Gauge(
            "epdistill_waiting_images", "Images in the queue.", ["model"], registry=registry
        )

        # What `labels` would look up, with locks, in every request; there are few.
        self._of_request = cache(
            lambda route, status: (
                self._requests.labels(route, str(status)),
                self._seconds.labels(route),
            )
        )
        self._of_model = cache(
            lambda model: (
                self._images.labels(model),
                self._computed.labels(model),
                self._queued.labels(model),
            )
        )

    def watch(self, model: str, waiting: Callable[[], float]) -> None:
        """Read a model's queue whenever it is asked for."""
        self._waiting.labels(model).set_function(waiting)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One request was answered."""
        counter, histogram = self._of_request(route, status)
        counter.inc()
        histogram.observe(seconds)

    def batch(self, model: str, images: int, seconds: float) -> None:
        """One batch was computed."""
        sizes, computed, _ = self._of_model(model)
        sizes.observe(images)
        computed.observe(seconds)

    def queued(self, model: str, seconds: float) -> None:
        """One request left the queue."""
        self._of_model(model)[2].observe(seconds)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)
