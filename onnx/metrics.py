"""Prometheus metrics of server.py, and the protocol's statistics, from the same counters."""

import asyncio
import collections
import os
import time

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# A row takes some 20 µs; the library's default buckets begin at 5 ms and would show one bar.
LATENCY_BUCKETS_S = (
    20e-6, 50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6, 1e-3, 2e-3, 3.5e-3, 5e-3, 7.5e-3, 10e-3, 25e-3, 50e-3, 0.1,
    0.25, 1.0, 2.5, 10.0,
)  # fmt: skip
COUNT_TOGETHER = 256  # requests
COUNT_WITHIN_S = 0.25
LABELS = ["model", "version"]


class BulkHistogram(Histogram):
    """A Histogram that accepts many values at once."""

    def observe_all(self, values: list[float]) -> None:
        """Observe each of `values`; 256 of them take a twentieth of the time of 256 calls of `observe`."""
        self._raise_if_not_observable()
        places = np.searchsorted(self._upper_bounds, values)
        for bucket, count in zip(self._buckets, np.bincount(places, minlength=len(self._buckets)), strict=True):
            if count:
                bucket.inc(int(count))
        self._sum.inc(sum(values))


class Metrics:
    """The metrics of this process, or of all workers if there are several (PROMETHEUS_MULTIPROC_DIR is set).

    Lives on the event loop. Requests are counted in groups, at most a quarter of a second late: counting each one
    separately takes 1.5 µs, a tenth of its total cost.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self.requests = Counter("onnx_server_requests", "Answered requests", [*LABELS, "status"], **of)
        self.latency = BulkHistogram(
            "onnx_server_request_latency_seconds",
            "From the request's head to its reply, successful ones",
            LABELS,
            buckets=LATENCY_BUCKETS_S,
            **of,
        )
        self.inferences = Counter("onnx_server_inferences", "Rows predicted, or runs without rows", LABELS, **of)
        self.executions = Counter("onnx_server_executions", "Runs of the model; requests share them", LABELS, **of)
        self.run_s = Counter("onnx_server_run_seconds", "Time inside the model", LABELS, **of)
        self.failed_s = Counter("onnx_server_failed_seconds", "From head to reply, failed requests", LABELS, **of)
        self.last = Gauge(
            "onnx_server_last_inference_seconds", "When, since 1970", LABELS, multiprocess_mode="max", **of
        )
        self.loaded = Gauge(
            "onnx_server_model_loaded", "1 for each version that is served", LABELS, multiprocess_mode="livemax", **of
        )
        self.models: dict[str, dict] = {}
        self.observed: collections.defaultdict[tuple[tuple[str, str], int], list[float]]
        self.observed = collections.defaultdict(list)  # seconds by model and version, and status

    def observe(self, labels: tuple[str, str], status: int, seconds: float) -> None:
        """Note one request to a model and version."""
        if not self.observed:
            asyncio.get_running_loop().call_later(COUNT_WITHIN_S, self.count)
        times_s = self.observed[labels, status]
        times_s.append(seconds)
        if len(times_s) >= COUNT_TOGETHER:
            self.count()

    def count(self) -> None:
        """Count the noted requests."""
        observed = dict(self.observed)
        self.observed.clear()
        for ((model, version), status), times_s in observed.items():
            self.requests.labels(model, version, status).inc(len(times_s))
            if status == 200:
                self.latency.labels(model, version).observe_all(times_s)
                self.last.labels(model, version).set(time.time())
            else:
                self.failed_s.labels(model, version).inc(sum(times_s))
        for name, versions in self.models.items():
            for version, model in versions.items():
                done = model.batcher.take_counts()
                if done.executions:
                    self.executions.labels(name, version).inc(done.executions)
                    self.inferences.labels(name, version).inc(done.rows)
                    self.run_s.labels(name, version).inc(done.run_s)

    def set_loaded(self, models: dict[str, dict]) -> None:
        """Set which versions of which models are served."""
        self.count()
        self.models = models
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            self.loaded.clear()
        for name, versions in models.items():
            for version in versions:
                self.loaded.labels(name, version).set(1)

    def collect(self) -> CollectorRegistry:
        """Return the registry to read: this process's, or that of all workers."""
        self.count()
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return self.registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return registry

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.collect())

    def statistics(self, wanted: list[tuple[str, str]]) -> list[dict]:
        """Return the protocol's statistics of these models and versions, times in ns; a failure has only its time.

        The parts that are not measured separately (queue, input, output) are left out.
        """
        values: collections.defaultdict[tuple, float] = collections.defaultdict(float)
        for metric in self.collect().collect():
            for sample in metric.samples:
                labels = sample.labels
                kind = labels.get("status") == "200" if "status" in labels else ""
                values[labels.get("model"), labels.get("version"), sample.name, kind] += sample.value

        def describe(name: str, version: str) -> dict:
            def value(metric: str, kind: bool | str = "") -> float:
                return values[name, version, f"onnx_server_{metric}", kind]

            def duration(count: float, seconds: float) -> dict:
                return {"count": int(count), "ns": int(seconds * 1e9)}

            succeeded, executions = value("requests_total", True), value("executions_total")
            return {
                "name": name,
                "version": version,
                "last_inference": int(value("last_inference_seconds") * 1e3),
                "inference_count": int(value("inferences_total")),
                "execution_count": int(executions),
                "inference_stats": {
                    "success": duration(succeeded, value("request_latency_seconds_sum")),
                    "fail": duration(value("requests_total", False), value("failed_seconds_total")),
                    "compute_infer": duration(executions, value("run_seconds_total")),
                },
            }

        return [describe(name, version) for name, version in wanted]
