"""Lightning's LitServe: FastAPI before one worker process for each version."""

from endpoints.peer import PeerEndpoint, read_pins


class LitServeEndpoint(PeerEndpoint):
    name = "litserve"
    default_ports = {"rest": 8047}
    start_timeout_s = 180.0  # five processes, each of which imports LitServe
    settings = {
        "packages": read_pins("litserve", "litserve", "onnxruntime"),
        "workers": "1 a version",
        "HTTP processes": "1",
        "intra-op threads": "1",
        "batching": "none",
        "access log": "off",
    }
