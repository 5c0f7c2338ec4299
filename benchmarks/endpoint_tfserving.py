"""TensorFlow Serving, or its stand-in: whatever tfserving/serve.py chooses on this machine."""

import json
import re

import numpy as np
from endpoint import REPOSITORY_DIR, Endpoint


class TensorFlowServingEndpoint(Endpoint):
    name = "tfserving"
    kind = "local"  # until the launcher has said what it chose
    folder = REPOSITORY_DIR / "tfserving"
    default_ports = {"rest": 8501, "grpc": 8500}
    rows_key = "instances"
    packages = ("tensorflow", "uvicorn", "uvloop", "httptools", "grpcio")
    settings = {
        "workers": "1",
        "threads": "1 (local), one per core (native, docker)",
        "batching": "off",
        "access log": "off",
    }
    start_timeout_s = 300.0  # with an engine but no image, the launcher fetches the image first

    def command(self) -> list[str]:
        options = [f"--{role}-port={port}" for role, port in self.ports.items() if port != self.default_ports[role]]
        return ["python", "serve.py", *options]

    def path(self, version: str) -> str:
        return f"/v1/models/my_model/versions/{self.native_version(version)}:predict"

    def decode(self, reply: bytes) -> np.ndarray:
        try:
            probabilities = np.array(json.loads(reply)["predictions"], dtype=float)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no predictions in {reply[:200]!r}") from error
        if probabilities.ndim != 2 or probabilities.shape[1] != 2:
            raise ValueError(f"predictions of shape {probabilities.shape}, wanted (n, 2)")
        return probabilities

    def kind_from_log(self, log: str) -> str:
        said = re.search(r"^serving with (\w+):", log, re.MULTILINE)
        return said[1] if said else self.kind
