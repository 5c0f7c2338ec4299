"""Seldon's MLServer, with a runtime of a few lines: its own are for other model formats."""

from endpoints.open_inference import OpenInferencePeer
from endpoints.peer import read_pins


class MLServerEndpoint(OpenInferencePeer):
    name = "mlserver"
    default_ports = {"rest": 8044, "grpc": 8045, "metrics": 8046}
    settings = {
        "packages": read_pins("mlserver", "mlserver", "onnxruntime"),
        "workers": "1 (in the server's process)",
        "intra-op threads": "1",
        "batching": "none",
        "access log": "off",
    }
