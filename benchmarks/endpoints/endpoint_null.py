"""The floor: a server that answers a constant, with no framework between the sockets and the parser."""

import numpy as np

from endpoints.base import BENCHMARKS_DIR, Endpoint, decode_predictions


class NullEndpoint(Endpoint):
    name = "null"
    kind = "floor"
    folder = BENCHMARKS_DIR
    default_ports = {"rest": 8010}
    rows_key = "data"
    packages = ("uvloop", "httptools")
    settings = {"processes": "1", "model": "none", "framework": "none"}
    has_model = False

    def command(self) -> list[str]:
        port = self.ports["rest"]
        return [
            "python",
            "-m",
            "endpoints.null_server",
            *([] if port == self.default_ports["rest"] else ["--port", str(port)]),
        ]

    def path(self, version: str | None) -> str:
        return f"/predict/{self.native_version(version)}" if version else "/predict"

    def decode(self, reply: bytes) -> np.ndarray:
        probabilities = decode_predictions(reply)
        if len(probabilities) != 1:
            raise ValueError(f"{len(probabilities)} predictions, expected one: the constant answer")
        return probabilities
