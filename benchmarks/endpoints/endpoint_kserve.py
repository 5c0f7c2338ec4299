"""KServe's Python server. It knows no versions, so each version is a model: my_model-1 and my_model-2."""

from endpoints.open_inference import OpenInferencePeer
from endpoints.peer import read_pins


class KServeEndpoint(OpenInferencePeer):
    name = "kserve"
    default_ports = {"rest": 8043}
    versions = {"1": "my_model-1", "2": "my_model-2"}
    settings = {
        "packages": read_pins("kserve", "kserve", "onnxruntime"),
        "workers": "1",
        "intra-op threads": "1",
        "batching": "none",
        "access log": "off",
    }

    def path(self, version: str | None) -> str:
        return f"/v2/models/{self.native_version(version or '2')}/infer"
