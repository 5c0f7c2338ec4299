"""Serve the ONNX model with KServe's Python server, over the Open Inference
Protocol.

    ../../.venv-peers/kserve/bin/python serve_kserve.py [--port 8043]

Run it in benchmarks/peers/. KServe knows no versions of a model ("Model
versioning not supported yet"), so it serves the models my_model-1 and
my_model-2. It listens on every interface, for which it has no option. Ctrl-C
stops it.
"""

import argparse
import logging

import kserve
from kserve.utils.utils import get_predict_input, get_predict_response
from onnx_model import VERSIONS, OnnxModel


class Predictor(kserve.Model):
    """One version of the model, as a model of KServe."""

    def __init__(self, version: str):
        super().__init__(f"my_model-{version}")
        self.version = version
        self.load()

    def load(self) -> bool:
        self.model = OnnxModel(self.version)
        self.ready = True
        return True

    async def predict(
        self, payload: kserve.InferRequest, headers: dict[str, str] | None = None
    ) -> kserve.InferResponse:
        return get_predict_response(payload, self.model.predict(get_predict_input(payload)), self.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8043, help="REST port (default: 8043)")
    arguments = parser.parse_args()
    server = kserve.ModelServer(
        http_port=arguments.port, workers=1, enable_grpc=False, enable_latency_logging=False, grace_period=5
    )
    for name in ("uvicorn.access", "kserve.trace"):  # each would write a line a request
        logging.getLogger(name).setLevel(logging.WARNING)
    server.start([Predictor(version) for version in VERSIONS])


if __name__ == "__main__":
    main()
