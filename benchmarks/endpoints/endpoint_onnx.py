"""The ONNX Runtime server of onnx/."""

import numpy as np

from endpoints.base import REPOSITORY_DIR, Endpoint, decode_predictions


class OnnxEndpoint(Endpoint):
    name = "onnx"
    kind = "local"  # ONNX Runtime is a library: the server is this repository's own
    folder = REPOSITORY_DIR / "onnx"
    default_ports = {"rest": 8000}
    rows_key = "data"
    packages = (
        "onnxruntime-gpu",
        "onnxruntime",
        "onnx",
        "uvicorn",
        "uvloop",
        "httptools",
        "msgspec",
        "prometheus-client",
    )
    variant = "default"
    config = "default.toml"
    settings = {"workers": "1", "intra-op threads": "one per core", "batching": "none", "access log": "off"}

    def command(self) -> list[str]:
        port = self.ports["rest"]
        options = [] if self.config == "default.toml" else ["--config", self.config]
        options += [] if port == self.default_ports["rest"] else ["--port", str(port)]
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
