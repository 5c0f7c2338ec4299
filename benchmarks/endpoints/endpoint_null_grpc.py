"""The floor for gRPC: a server that answers a constant, on the gRPC stack of tfserving/local/server.py."""

from typing import Any

import numpy as np

from endpoints.base import BENCHMARKS_DIR, Endpoint, Request
from endpoints.predict_messages import METHOD, decode_predict_response, encode_predict_request


class NullGrpcEndpoint(Endpoint):
    name = "null-grpc"
    kind = "floor"
    protocol = "gRPC"
    folder = BENCHMARKS_DIR
    default_ports = {"grpc": 8011}
    settings = {"processes": "1", "model": "none"}
    has_model = False

    def command(self) -> list[str]:
        port = self.ports["grpc"]
        options = [] if port == self.default_ports["grpc"] else ["--port", str(port)]
        return ["python", "-m", "endpoints.null_grpc_server", *options]

    def path(self, version: str | None) -> str:
        return METHOD

    def request(self, rows: list[Any], version: str | None) -> Request:
        body = encode_predict_request(rows, "my_model", int(self.native_version(version)) if version else None)
        return Request(self.path(version), body, content_type="application/grpc")

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_predict_response(reply)
