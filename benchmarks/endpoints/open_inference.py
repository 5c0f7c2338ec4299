"""The Open Inference Protocol, as Triton, KServe, MLServer and the ONNX server speak it.

POST /v2/models/<name>[/versions/<version>]/infer with named tensors in JSON
(github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md), the same with the tensors in
bytes behind the JSON (Triton's binary tensor extension), and gRPC (specification/protocol/open_inference_grpc.proto).
"""

import json
from collections.abc import Iterator
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
    """Return the probabilities, (n, 2), in the one output of a reply; ValueError if there are none."""
    try:
        outputs: list[dict[str, Any]] = json.loads(reply)["outputs"]
        (output,) = outputs
        shape, data = output["shape"], np.array(output["data"], dtype=float)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no output tensor in {reply[:200]!r}") from error
    if len(shape) != 2 or shape[1] != 2 or data.size != shape[0] * 2:
        raise ValueError(f"the output has shape {shape} and {data.size} numbers, expected (n, 2)")
    return data.reshape(shape)


def encode_binary_request(rows: list[list[float]]) -> tuple[bytes, int]:
    """Return the request with a float32 tensor behind the JSON, which asks for such a reply, and the JSON's length."""
    tensor = np.asarray(rows, "<f4")
    described: dict[str, Any] = {"name": INPUT, "shape": tensor.shape, "datatype": "FP32"}
    described["parameters"] = {"binary_data_size": tensor.nbytes}
    asked = {"inputs": [described], "parameters": {"binary_data_output": True}}
    header = json.dumps(asked).encode()
    return header + tensor.tobytes(), len(header)


def decode_binary_reply(reply: bytes) -> np.ndarray:
    """Return the probabilities, (n, 2), behind the JSON of a reply; ValueError if there are none."""
    try:
        described, end = json.JSONDecoder().raw_decode(reply.decode("latin-1"))
        (output,) = described["outputs"]
        return np.frombuffer(reply[end:], "<f4").reshape(output["shape"]).astype(float)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no output tensor in {reply[:200]!r}") from error


GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"


def encode_grpc_request(rows: list[list[float]], version: str | None) -> bytes:
    """Return a ModelInferRequest for `rows`, (n, 5), in raw_input_contents."""
    tensor = np.asarray(rows, "<f4")
    shape = b"".join(_varint(size) for size in tensor.shape)
    described = _field(1, INPUT.encode()) + _field(2, b"FP32") + _field(3, shape)
    named = _field(2, version.encode()) if version else b""
    return _field(1, MODEL.encode()) + named + _field(5, described) + _field(7, tensor.tobytes())


def decode_grpc_reply(reply: bytes) -> np.ndarray:
    """Return the probabilities, (n, 2), in the one raw_output_contents of a ModelInferResponse."""
    found = [value for number, value in _read_fields(reply) if number == 6]
    if len(found) != 1 or len(found[0]) % 8:
        raise ValueError(f"no output tensor in {reply[:200]!r}")
    return np.frombuffer(found[0], "<f4").reshape(-1, 2).astype(float)


def _varint(value: int) -> bytes:
    """Return a number as protobuf writes it (protobuf.dev/programming-guides/encoding)."""
    written = b""
    while value > 127:
        written += bytes([value & 127 | 128])
        value >>= 7
    return written + bytes([value])


def _field(number: int, value: bytes) -> bytes:
    """Return a field of bytes, text or a message."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _read_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of a message's fields; ValueError for one that is not of bytes, text or a message."""
    position = 0

    def read_varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(message):
                raise ValueError("the message is cut off")
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        tag, length = read_varint(), read_varint()
        if tag & 7 != 2 or position + length > len(message):
            raise ValueError("not a ModelInferResponse")
        yield tag >> 3, message[position : position + length]
        position += length


def find_path(version: str | None) -> str:
    """Return the path that predicts with a version, as its server names it; None: the server's default."""
    return f"/v2/models/{MODEL}{f'/versions/{version}' if version else ''}/infer"


class OpenInferencePeer(PeerEndpoint):
    """A peer that speaks the Open Inference Protocol."""

    rows_key = "inputs"

    def path(self, version: str | None) -> str:
        return find_path(self.native_version(version) if version else None)

    def body(self, rows: list[list[float]], version: str | None) -> bytes:
        return encode_request(rows)

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_reply(reply)
