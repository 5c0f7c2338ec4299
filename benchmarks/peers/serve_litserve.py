"""Serve the ONNX model with Lightning's LitServe.

    ../../.venv-peers/litserve/bin/python serve_litserve.py [--port 8047]

Run it in benchmarks/peers/. POST /predict/<version> {"data": [[5 numbers],
...]} -> {"predictions": [[2 numbers], ...]}: LitServe knows no versions, so
each is a separate API with a worker process. Ctrl-C stops it.
"""

import argparse
import os
import signal
from typing import Any

import litserve
import numpy as np
from onnx_model import VERSIONS, OnnxModel


class PredictApi(litserve.LitAPI):
    """One version of the model, as an API of LitServe."""

    def __init__(self, version: str):
        super().__init__(api_path=f"/predict/{version}")
        self.version = version

    def setup(self, device: str) -> None:
        self.model = OnnxModel(self.version)

    def decode_request(self, request: dict[str, Any]) -> list[list[float]]:
        return request["data"]

    def predict(self, rows: list[list[float]]) -> np.ndarray:
        return self.model.predict(rows)

    def encode_response(self, probabilities: np.ndarray) -> dict[str, Any]:
        return {"predictions": probabilities.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8047, help="port (default: 8047)")
    arguments = parser.parse_args()
    # fast_queue=True, which its documentation advises for more than 100 requests per second, changes nothing in 0.2.19:
    # it is lost on its way (github.com/Lightning-AI/LitServe/issues/751).
    server = litserve.LitServer([PredictApi(version) for version in VERSIONS], accelerator="cpu", workers_per_device=1)
    pid = os.getpid()

    def stop(*_: object) -> None:
        """End as on Ctrl-C, the only signal that LitServe handles; its HTTP process inherits this handler."""
        if os.getpid() == pid:
            raise KeyboardInterrupt
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main()
