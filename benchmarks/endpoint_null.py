"""The floor: a server that answers a constant, on the HTTP stack of onnx/server.py."""

import json

import numpy as np
from endpoint import BENCHMARKS_DIR, Endpoint


class NullEndpoint(Endpoint):
    name = "null"
    kind = "floor"
    folder = BENCHMARKS_DIR
    default_ports = {"rest": 8010}
    rows_key = "data"
    packages = ("uvicorn", "uvloop", "httptools")
    settings = {"processes": "1", "model": "none", "access log": "off"}
    has_model = False

    def command(self) -> list[str]:
        port = self.ports["rest"]
        return ["python", "null_server.py", *([] if port == self.default_ports["rest"] else ["--port", str(port)])]

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
