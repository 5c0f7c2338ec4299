"""TensorFlow Serving's Predict call as bytes, for the endpoints that speak it over gRPC.

The message definitions are those of the tensorflow-serving-api package; TensorFlow itself is not imported.
"""

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

METHOD = "/tensorflow.serving.PredictionService/Predict"
DT_FLOAT = 1


@contextlib.contextmanager
def _tensorflow_stand_in() -> Iterator[None]:
    """Inside the block the package `tensorflow` is a search path only: importing the real one takes seconds.

    The definitions import others that lie inside TensorFlow's package. Afterwards the stand-in is gone.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    found = importlib.util.find_spec("tensorflow")
    if found is None:
        raise ModuleNotFoundError("tensorflow is not installed: run make setup")
    stand_in = types.ModuleType("tensorflow")
    stand_in.__path__ = found.submodule_search_locations or []
    sys.modules["tensorflow"] = stand_in
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorflow"]:
            del sys.modules[name]


@functools.cache
def import_messages() -> types.ModuleType:
    """Return the module with PredictRequest and PredictResponse."""
    with _tensorflow_stand_in():
        return importlib.import_module("tensorflow_serving.apis.predict_pb2")


def encode_predict_request(rows: list[Any], model: str, version: int | None) -> bytes:
    """Return the PredictRequest for `rows` (n, 5), sent as float32, the type of the model's signature.

    If `version` is None it names none.
    """
    array = np.asarray(rows, dtype="<f4")
    request = import_messages().PredictRequest()
    request.model_spec.name = model
    if version is not None:
        request.model_spec.version.value = version
    tensor = request.inputs["features"]
    tensor.dtype = DT_FLOAT
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = array.tobytes()
    message: bytes = request.SerializeToString()
    return message


def decode_predict_response(reply: bytes) -> np.ndarray:
    """Return the probabilities (n, 2) of a PredictResponse; ValueError if there are none."""
    from google.protobuf.message import DecodeError

    try:
        outputs = import_messages().PredictResponse.FromString(reply).outputs
    except DecodeError as error:
        raise ValueError(f"no PredictResponse: {reply[:200]!r}") from error
    if "probabilities" not in outputs:
        raise ValueError(f"no probabilities among the outputs {sorted(outputs)}")
    tensor = outputs["probabilities"]
    # A server may write the numbers one by one, as TensorFlow Serving does, or as raw memory.
    values = np.frombuffer(tensor.tensor_content, "<f4") if tensor.tensor_content else np.array(tensor.float_val)
    probabilities = values.astype(float).reshape([dim.size for dim in tensor.tensor_shape.dim])
    if probabilities.ndim != 2 or probabilities.shape[1] != 2:
        raise ValueError(f"probabilities of shape {probabilities.shape}, wanted (n, 2)")
    return probabilities
