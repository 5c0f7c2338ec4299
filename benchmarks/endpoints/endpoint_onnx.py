"""The ONNX Runtime server of onnx/."""

from typing import Any

import numpy as np

from endpoints.base import REPOSITORY_DIR, Endpoint, Request, decode_predictions
from endpoints.open_inference import (
    GRPC_METHOD,
    decode_binary_reply,
    decode_grpc_reply,
    encode_binary_request,
    encode_grpc_request,
    find_path,
)


class OnnxEndpoint(Endpoint):
    name = "onnx"
    kind = "local"  # ONNX Runtime is a library: the server is this repository's own
    folder = REPOSITORY_DIR / "onnx"
    default_ports = {"rest": 8000, "grpc": 8001}
    rows_key = "data"
    packages = (
        "onnxruntime-gpu",
        "onnxruntime",
        "onnx",
        "uvloop",
        "httptools",
        "msgspec",
        "grpcio",
        "prometheus-client",
    )
    variant = "default"
    config = "default.toml"
    settings = {"workers": "1", "intra-op threads": "one per core", "batching": "none", "access log": "off"}

    def command(self) -> list[str]:
        options = [] if self.config == "default.toml" else ["--config", self.config]
        if self.ports != self.default_ports:
            options += ["--port", str(self.ports["rest"]), "--grpc-port", str(self.ports["grpc"])]
        options += ["--only-version", self.native_version(self.only_version)] if self.only_version else []
        return ["python", "server.py", *options]

    def path(self, version: str | None) -> str:
        return f"/predict/{self.native_version(version)}" if version else "/predict"

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_predictions(reply)


class TunedOnnxEndpoint(OnnxEndpoint):
    name = "onnx-tuned"
    variant = "tuned"
    config = "tuned.toml"
    settings = {"workers": "1", "intra-op threads": "1", "batching": "by event-loop turn", "access log": "off"}
    image_settings = settings


class BinaryOnnxEndpoint(TunedOnnxEndpoint):
    """The same server asked over the Open Inference Protocol, tensors in bytes."""

    name = "onnx-infer-tuned"

    def path(self, version: str | None) -> str:
        return find_path(self.native_version(version) if version else None)

    def request(self, rows: list[Any], version: str | None) -> Request:
        body, json_bytes = encode_binary_request(rows)
        headers = {"Inference-Header-Content-Length": str(json_bytes)}
        return Request(self.path(version), body, content_type="application/octet-stream", headers=headers)

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_binary_reply(reply)


class GrpcOnnxEndpoint(TunedOnnxEndpoint):
    """The same over gRPC."""

    name = "onnx-grpc-tuned"
    protocol = "gRPC"

    def path(self, version: str | None) -> str:
        return GRPC_METHOD

    def request(self, rows: list[Any], version: str | None) -> Request:
        named = self.native_version(version) if version else None
        return Request(self.path(version), encode_grpc_request(rows, named), content_type="application/grpc")

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_grpc_reply(reply)
