"""TensorFlow Serving, or its stand-in: whatever tfserving/serve.py chooses on this machine."""

import re
from typing import Any

import numpy as np

from endpoints.base import REPOSITORY_DIR, Endpoint, Request, decode_predictions
from endpoints.predict_messages import METHOD, decode_predict_response, encode_predict_request


class TensorFlowServingEndpoint(Endpoint):
    name = "tfserving"
    kind = "local"  # until the launcher has logged its choice
    folder = REPOSITORY_DIR / "tfserving"
    default_ports = {"rest": 8501, "grpc": 8500}
    rows_key = "instances"
    metrics_path = "/monitoring/prometheus/metrics"
    packages = ("tensorflow", "uvicorn", "uvloop", "httptools", "grpcio")
    variant = "default"
    options: tuple[str, ...] = ()
    settings = {
        "workers": "1",
        "threads": "1 (local), one per core (native, docker)",
        "batching": "off",
        "access log": "off",
    }
    image_settings: dict[str, str] | None = settings
    start_timeout_s = 300.0  # with an engine but no image, the launcher fetches the image first

    def command(self) -> list[str]:
        options = [f"--{role}-port={port}" for role, port in self.ports.items() if port != self.default_ports[role]]
        if self.only_version:
            options.append(f"--model-config=models-{self.native_version(self.only_version)}.config")
        return ["python", "serve.py", *self.options, *options]

    def path(self, version: str | None) -> str:
        named = f"/versions/{self.native_version(version)}" if version else ""
        return f"/v1/models/my_model{named}:predict"

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_predictions(reply)

    def kind_from_log(self, log: str) -> str:
        said = re.search(r"^serving with (\w+):", log, re.MULTILINE)
        return said[1] if said else self.kind


class TensorFlowServingGrpcEndpoint(TensorFlowServingEndpoint):
    """The same server asked over gRPC, in a separate process, so that each row has its own cost."""

    name = "tfserving-grpc"
    protocol = "gRPC"

    def path(self, version: str | None) -> str:
        return METHOD

    def request(self, rows: list[Any], version: str | None) -> Request:
        body = encode_predict_request(rows, "my_model", int(self.native_version(version)) if version else None)
        return Request(self.path(version), body, content_type="application/grpc")

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_predict_response(reply)


TUNED_OPTIONS = ("--batching-config", "batching.config")
TUNED_SETTINGS = {
    **TensorFlowServingEndpoint.settings,
    "batching": "batching.config: up to 1,024 rows, at most 2 ms (local: while as many as before are to come)",
}


class TunedTensorFlowServingEndpoint(TensorFlowServingEndpoint):
    name = "tfserving-tuned"
    variant = "tuned"
    options = TUNED_OPTIONS
    settings = TUNED_SETTINGS
    image_settings = None


class TunedTensorFlowServingGrpcEndpoint(TensorFlowServingGrpcEndpoint):
    name = "tfserving-grpc-tuned"
    variant = "tuned"
    options = TUNED_OPTIONS
    settings = TUNED_SETTINGS
    image_settings = None
