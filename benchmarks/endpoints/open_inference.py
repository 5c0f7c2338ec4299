"""The Open Inference Protocol over REST, as Triton, KServe and MLServer speak it.

POST /v2/models/<name>[/versions/<version>]/infer with named tensors in JSON
(github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md).
"""

import json
from typing import Any

import numpy as np

from endpoints.peer import PeerEndpoint

INPUT = "input"  # the names in onnx/models/my_model/*/model.onnx
MODEL = "my_model"


def encode_request(rows: list[list[float]]) -> bytes:
    """Return the body that asks for the predictions of `rows`, (n, 5), one FP32 tensor with its data flat."""
    shape = [len(rows), len(rows[0]) if rows else 0]
    data = [value for row in rows for value in row]
    return json.dumps({"inputs": [{"name": INPUT, "shape": shape, "datatype": "FP32", "data": data}]}).encode()


def decode_reply(reply: bytes) -> np.ndarray:
    """Return the probabilities, (n, 2), in the one output of a reply; ValueError where there are none."""
    try:
        outputs: list[dict[str, Any]] = json.loads(reply)["outputs"]
        (output,) = outputs
        shape, data = output["shape"], np.array(output["data"], dtype=float)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no output tensor in {reply[:200]!r}") from error
    if len(shape) != 2 or shape[1] != 2 or data.size != shape[0] * 2:
        raise ValueError(f"the output has shape {shape} and {data.size} numbers, expected (n, 2)")
    return data.reshape(shape)


class OpenInferencePeer(PeerEndpoint):
    """A peer that speaks the Open Inference Protocol."""

    rows_key = "inputs"

    def path(self, version: str | None) -> str:
        chosen = f"/versions/{self.native_version(version)}" if version else ""
        return f"/v2/models/{MODEL}{chosen}/infer"

    def body(self, rows: list[list[float]], version: str | None) -> bytes:
        return encode_request(rows)

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_reply(reply)
