"""TorchServe, started by its folder's serve.py."""

import json

import numpy as np
from endpoint import REPOSITORY_DIR, Endpoint


class TorchServeEndpoint(Endpoint):
    name = "torchserve"
    kind = "native"
    folder = REPOSITORY_DIR / "torchserve"
    default_ports = {
        "rest": 8080,
        "management": 8081,
        "metrics": 8082,
        "grpc": 7070,
        "grpc-management": 7071,
    }
    versions = {"1": "1.0", "2": "2.0"}
    rows_key = "data"
    packages = ("torchserve", "torch")
    settings = {
        "workers": "one per usable core and version (default)",
        "batching": "off (batchSize 1, default)",
        "access log": "on (default)",
    }

    def command(self) -> list[str]:
        options = []
        for role, port in self.ports.items():
            if port != self.default_ports[role]:
                options += [f"--{role}-port", str(port)]
        return ["python", "serve.py", *options]

    def path(self, version: str) -> str:
        return f"/predictions/my_model/{self.native_version(version)}"

    def decode(self, reply: bytes) -> np.ndarray:
        probabilities = np.array(json.loads(reply), dtype=float)
        if probabilities.ndim != 2 or probabilities.shape[1] != 2:
            raise ValueError(f"torchserve: not a list of probability pairs: {reply[:200]!r}")
        return probabilities
