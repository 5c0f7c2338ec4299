"""The whole of what a fifth server needs: this one file, as benchmarks/endpoints/endpoint_toy.py."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from endpoints.base import REPOSITORY_DIR, Endpoint


class Toy(Endpoint):
    name = "toy"
    kind = "local"
    folder = Path(os.environ.get("TOY_FOLDER", REPOSITORY_DIR / "tests"))
    default_ports = {"rest": 9100}
    rows_key = "rows"
    settings = {"threads": "one a connection"}

    def command(self):
        return [sys.executable, "toy_server.py", str(self.ports["rest"]), os.environ.get("TOY_MANNER", "right")]

    def path(self, version):
        return f"/toy/{self.native_version(version)}"

    def decode(self, reply):
        return np.array(json.loads(reply)["answers"])
