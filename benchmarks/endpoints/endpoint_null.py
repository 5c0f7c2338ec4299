"""The floor: a server that answers a constant, with no framework between the sockets and the parser."""

import json

import numpy as np

from endpoints.base import BENCHMARKS_DIR, Endpoint


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
        try:
            probabilities = np.array(json.loads(reply)["predictions"], dtype=float)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no predictions in {reply[:200]!r}") from error
        if probabilities.shape != (1, 2):
            raise ValueError(f"predictions have shape {probabilities.shape}, expected (1, 2): the constant answer")
        return probabilities
