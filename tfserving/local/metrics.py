"""Request counts and latencies for Prometheus, under TensorFlow Serving's names (--monitoring_config_file).

TensorFlow Serving 2.21 has many more; these are the two of its request path (its servables/tensorflow/util.cc):

    :tensorflow:serving:request_count{model_name,status}                  every predict, classify and regress
    :tensorflow:serving:request_latency{model_name,API,entrypoint}        those that succeeded, in microseconds
"""

import bisect
import collections
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

DEFAULT_PATH = "/monitoring/prometheus/metrics"
LIMITS_US = [10 * 1.8**i for i in range(33)]  # TensorFlow Serving's own buckets, 10 µs to 25 minutes
FIELD = descriptor_pb2.FieldDescriptorProto


class MonitoringError(Exception):
    """The monitoring config cannot be used; the message is one line."""


def make_config_class() -> type:
    """Return tensorflow.serving.MonitoringConfig, which the stubs of tensorflow-serving-api lack."""
    file = descriptor_pb2.FileDescriptorProto(name="monitoring_config.proto", package="tensorflow.serving")
    prometheus = file.message_type.add(name="PrometheusConfig")
    prometheus.field.add(name="enable", number=1, type=FIELD.TYPE_BOOL, label=FIELD.LABEL_OPTIONAL)
    prometheus.field.add(name="path", number=2, type=FIELD.TYPE_STRING, label=FIELD.LABEL_OPTIONAL)
    file.message_type.add(name="MonitoringConfig").field.add(
        name="prometheus_config",
        number=1,
        type=FIELD.TYPE_MESSAGE,
        type_name=".tensorflow.serving.PrometheusConfig",
        label=FIELD.LABEL_OPTIONAL,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.serving.MonitoringConfig"))


def read_metrics_path(path: Path) -> str | None:
    """Return the URL path in the text-format MonitoringConfig file `path`, None if it switches metrics off.

    Raises MonitoringError.
    """
    try:
        config = text_format.Parse(path.read_text(), make_config_class()())
    except OSError as error:
        raise MonitoringError(f"{path}: {error.strerror}; check --monitoring_config_file") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise MonitoringError(
            f"Error parsing text-format tensorflow.serving.MonitoringConfig: {path}:{reason}"
        ) from None
    prometheus = config.prometheus_config
    return (prometheus.path or DEFAULT_PATH) if prometheus.enable else None


class Histogram:
    def __init__(self):
        self.counts = [0] * (len(LIMITS_US) + 1)  # of the values between each limit and the one before
        self.sum_us = 0.0


class Metrics:
    """Counts requests and their latencies, on the event loop."""

    def __init__(self):
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.latencies: collections.defaultdict[tuple[str, str, str], Histogram] = collections.defaultdict(Histogram)

    def record(self, model: str, api: str, entrypoint: str, status: str, seconds: float) -> None:
        """Count a request; `api` in its interface's spelling, `entrypoint` REST or GRPC, `status` a gRPC code."""
        self.counts[model, status] += 1
        if status == "OK":
            histogram = self.latencies[model, api, entrypoint]
            micros = seconds * 1e6
            histogram.counts[bisect.bisect_right(LIMITS_US, micros)] += 1
            histogram.sum_us += micros

    def write(self) -> bytes:
        """Return the page for Prometheus, laid out as by TensorFlow Serving: without HELP lines."""
        name = ":tensorflow:serving:request_count"
        lines = [f"# TYPE {name} counter"]
        for (model, status), count in sorted(self.counts.items()):
            lines.append(f'{name}{{model_name="{escape(model)}",status="{status}"}} {count}')
        name = ":tensorflow:serving:request_latency"
        lines.append(f"# TYPE {name} histogram")
        for (model, api, entrypoint), histogram in sorted(self.latencies.items()):
            labels = f'model_name="{escape(model)}",API="{api}",entrypoint="{entrypoint}"'
            total = 0
            for limit, count in zip([*map("{:g}".format, LIMITS_US), "+Inf"], histogram.counts, strict=True):
                total += count
                lines.append(f'{name}_bucket{{{labels},le="{limit}"}} {total}')
            lines.append(f"{name}_sum{{{labels}}} {histogram.sum_us:.1f}")
            lines.append(f"{name}_count{{{labels}}} {total}")
        return ("\n".join(lines) + "\n").encode()


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
