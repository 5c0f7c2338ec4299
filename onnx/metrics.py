"""Prometheus metrics of server.py: how many requests each version answered, with which status, and how fast."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# A row is answered in some 50 µs here: the library's own buckets begin at 5 ms and would show one bar.
LATENCY_BUCKETS_S = (
    50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6, 1e-3, 2e-3, 3.5e-3, 5e-3, 7.5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 1.0
)  # fmt: skip


class Metrics:
    """The metrics of this process; with several workers (PROMETHEUS_MULTIPROC_DIR is set) of all of them."""

    def __init__(self):
        self.registry = CollectorRegistry()
        names = ["model", "version"]
        self.requests = Counter("onnx_server_requests", "Answered requests", [*names, "status"], registry=self.registry)
        self.latency = Histogram(
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
        self._children: dict[tuple, tuple] = {}

    def observe(self, model: str, version: str, status: int, seconds: float) -> None:
        """Count one request."""
        key = (model, version, status)
        children = self._children.get(key)
        if children is None:  # looking a label up costs more than counting
            children = self.requests.labels(*key), self.latency.labels(model, version)
            self._children[key] = children
        children[0].inc()
        if status == 200:
            children[1].observe(seconds)

    def set_loaded(self, models: dict[str, dict]) -> None:
        """Tell which versions of which models are served."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            self.loaded.clear()
        for name, versions in models.items():
            for version in versions:
                self.loaded.labels(name, version).set(1)

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
            return generate_latest(registry)
        return generate_latest(self.registry)
