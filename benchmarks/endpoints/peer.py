"""The base of the peers: servers that others wrote, with the ONNX model of onnx/.

`make peers` installs each into a separate environment, .venv-peers/<name>, because their requirements conflict.
"""

import os
import re
from pathlib import Path

import numpy as np

from endpoints.base import BENCHMARKS_DIR, REPOSITORY_DIR, Endpoint, ServerError, decode_predictions

PEERS_DIR = BENCHMARKS_DIR / "peers"
ENVIRONMENTS_DIR = REPOSITORY_DIR / ".venv-peers"


def read_pins(name: str, *packages: str) -> str:
    """Return the pinned versions of a peer's packages: "kserve 0.21.0, onnxruntime 1.31.1"."""
    text = (PEERS_DIR / f"requirements-{name}.txt").read_text()
    pins = dict(re.findall(r"^([\w.-]+)(?:\[[\w,-]*\])?==([\w.]+)", text, re.M))
    return ", ".join(f"{package} {pins[package]}" for package in packages)


class PeerEndpoint(Endpoint):
    """A server that peers/serve_<name>.py starts. It takes {"data": rows} and answers {"predictions": rows}.

    That form is ours: LitServe and Ray Serve leave it to whoever serves a model.
    """

    kind = "peer"
    folder = PEERS_DIR
    rows_key = "data"
    how_to_install = "make peers"

    def __init__(self, ports: dict[str, int] | None = None, only_version: str | None = None):
        if only_version is not None:
            raise ValueError(f"{self.name}: a peer serves both versions, not version {only_version} only")
        super().__init__(ports)

    @classmethod
    def environment_dir(cls) -> Path:
        """The folder of its virtual environment."""
        return ENVIRONMENTS_DIR / cls.name

    @classmethod
    def is_installed(cls) -> bool:
        """Whether `make peers` has installed what requirements-<name>.txt pins today."""
        installed, pinned = cls.environment_dir() / "requirements.txt", PEERS_DIR / f"requirements-{cls.name}.txt"
        return installed.exists() and installed.read_bytes() == pinned.read_bytes()

    def command(self) -> list[str]:
        python = os.path.relpath(self.environment_dir() / "bin" / "python", self.folder)
        options = [
            f"--port={port}" if role == "rest" else f"--{role}-port={port}"
            for role, port in self.ports.items()
            if port != self.default_ports[role]
        ]
        return [python, f"serve_{self.name}.py", *options]

    def full_command(self) -> list[str]:
        """The command; ServerError if the peer is not installed."""
        if not self.is_installed():
            raise ServerError(f"{self.name}: not installed; {self.how_to_install}")
        return super().full_command()

    def path(self, version: str | None) -> str:
        return f"/predict/{self.native_version(version or '2')}"

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_predictions(reply)
