"""Prometheus metrics of server.py: how many requests each version answered, with which status, and how fast."""

import asyncio
import collections
import os

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# A row is answered in some 50 µs here: the library's own buckets begin at 5 ms and would show one bar.
LATENCY_BUCKETS_S = (
    50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6, 1e-3, 2e-3, 3.5e-3, 5e-3, 7.5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 1.0
)  # fmt: skip
COUNT_TOGETHER = 256  # requests
COUNT_WITHIN_S = 0.25


class BulkHistogram(Histogram):
    """A Histogram that takes many values at once."""

    def observe_all(self, values: list[float]) -> None:
        """The same as `observe` for each of `values`, 256 of them in a twentieth of the time."""
        self._raise_if_not_observable()
        places = np.searchsorted(self._upper_bounds, values)
        for bucket, count in zip(self._buckets, np.bincount(places, minlength=len(self._buckets)), strict=True):
            if count:
                bucket.inc(int(count))
        self._sum.inc(sum(values))


class Metrics:
    """The metrics of this process; with several workers (PROMETHEUS_MULTIPROC_DIR is set) of all of them.

    Lives on the event loop. What is observed is counted together with what comes after it, a quarter of a second later
    at most: counting each request by itself takes 1.5 µs, a third of what this server adds to the HTTP stack.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        names = ["model", "version"]
        self.requests = Counter("onnx_server_requests", "Answered requests", [*names, "status"], registry=self.registry)
        self.latency = BulkHistogram(
            "onnx_server_request_latency_seconds",
            "From the request's head to its reply, successful ones",
            names,
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.loaded = Gauge(
            "onnx_server_model_loaded",
            "1 for each version that is served",
            names,
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._observed: collections.defaultdict[tuple[str, str, int], list[float]] = collections.defaultdict(list)

    def observe(self, model: str, version: str, status: int, seconds: float) -> None:
        """Note one request."""
        if not self._observed:
            asyncio.get_running_loop().call_later(COUNT_WITHIN_S, self.count)
        times_s = self._observed[model, version, status]
        times_s.append(seconds)
        if len(times_s) >= COUNT_TOGETHER:
            self.count()

    def count(self) -> None:
        """Count what was observed."""
        observed = dict(self._observed)
        self._observed.clear()
        for (model, version, status), times_s in observed.items():
            self.requests.labels(model, version, status).inc(len(times_s))
            if status == 200:
                self.latency.labels(model, version).observe_all(times_s)

    def set_loaded(self, models: dict[str, dict]) -> None:
        """Tell which versions of which models are served."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            self.loaded.clear()
        for name, versions in models.items():
            for version in versions:
                self.loaded.labels(name, version).set(1)

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        self.count()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
            return generate_latest(registry)
        return generate_latest(self.registry)
