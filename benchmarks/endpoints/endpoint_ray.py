"""Ray Serve: HAProxy, one replica with both versions behind it, and the processes of a Ray cluster."""

from endpoints.peer import PeerEndpoint, read_pins


class RayEndpoint(PeerEndpoint):
    name = "ray"
    default_ports = {"rest": 8048, "replica": 8049, "metrics": 8050, "stats": 8051}
    start_timeout_s = 240.0  # eight processes that each import Ray, on one core
    settings = {
        "packages": read_pins("ray", "ray", "onnxruntime"),
        "replicas": "1",
        "intra-op threads": "1",
        "batching": "none",
        "ingress": "HAProxy",
        "throughput-optimized": "on",
        "access log": "off",
    }
