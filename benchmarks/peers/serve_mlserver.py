r"""Serve the ONNX model with Seldon's MLServer, over the Open Inference
Protocol.

    ../../.venv-peers/mlserver/bin/python serve_mlserver.py \
        [--port 8044] [--grpc-port 8045] [--metrics-port 8046]

Run it in benchmarks/peers/. MLServer runs models in worker processes unless
told otherwise; with none (parallel_workers 0) it runs them in its own, as its
documentation advises for models that take no time. Ctrl-C stops it.
"""

import argparse
import asyncio

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import install_uvloop_event_loop
from onnx_model import VERSIONS, OnnxModel


class OnnxRuntime(MLModel):
    """A runtime of MLServer for ONNX."""

    async def load(self) -> bool:
        self.model = OnnxModel(self.version)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        probabilities = self.model.predict(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[NumpyCodec.encode_output("output", probabilities)],
        )


async def serve(settings: Settings) -> None:
    """Serve both versions until a signal ends it."""
    await MLServer(settings).start(
        [
            ModelSettings(name="my_model", implementation=OnnxRuntime, parameters=ModelParameters(version=version))
            for version in VERSIONS
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8044, help="REST port (default: 8044)")
    parser.add_argument("--grpc-port", type=int, default=8045, help="gRPC port, which it always opens (default: 8045)")
    parser.add_argument("--metrics-port", type=int, default=8046, help="port of the metrics (default: 8046)")
    arguments = parser.parse_args()
    settings = Settings(
        host="127.0.0.1",
        http_port=arguments.port,
        grpc_port=arguments.grpc_port,
        metrics_port=arguments.metrics_port,
        parallel_workers=0,
        debug=False,  # no line a request
    )
    install_uvloop_event_loop()
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
