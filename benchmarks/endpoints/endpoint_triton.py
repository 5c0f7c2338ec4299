"""NVIDIA Triton Inference Server, the binary of the wheel nvidia-pytriton, with its Python backend."""

from endpoints.open_inference import OpenInferencePeer
from endpoints.peer import read_pins


class TritonEndpoint(OpenInferencePeer):
    name = "triton"
    default_ports = {"rest": 8041, "metrics": 8042}
    settings = {
        "packages": read_pins("triton", "nvidia-pytriton", "onnxruntime"),
        "backend": "Python",
        "instances": "1 a version",
        "intra-op threads": "1",
        "batching": "dynamic (no delay)",
    }
