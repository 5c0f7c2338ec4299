"""Ask TensorFlow Serving for predictions over REST and over gRPC.

    python client.py

Sends the first rows of ../data/test.csv both ways and prints the probabilities;
writes nothing. From Python:

    from client import predict
    predict(np.array([[13.82, 24.49, 0.1162, 0.1357, 0.2275]]))
    # array([[0.99914283, 0.00085716]])
"""

import argparse
import contextlib
import csv
import importlib.util
import sys
import types
from pathlib import Path

try:
    import grpc
    import numpy as np
    import requests
except ModuleNotFoundError as error:
    sys.exit(f"client: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

DATA_DIR = Path(__file__).resolve().parent.parent / "data"
MODEL_NAME = "my_model"
TIMEOUT_S = 30.0
OTHER_PROGRAM = "is it another program that listens there?"


class ClientError(Exception):
    """No prediction came; the message is one line with the reason."""


def predict(data, host: str = "127.0.0.1", port: int = 8501, version: str = "", label: str = "") -> np.ndarray:
    """Return the probabilities (n, 2), [P(malignant), P(benign)], for raw features (n, 5), over REST.

    The newest version answers if neither `version` nor `label` is given. Raises ClientError.
    """
    choice = f"/versions/{version}" if version else f"/labels/{label}" if label else ""
    url = f"http://{host}:{port}/v1/models/{MODEL_NAME}{choice}:predict"
    try:
        reply = requests.post(url, json={"instances": np.asarray(data).tolist()}, timeout=TIMEOUT_S)
    except requests.ConnectionError:
        raise ClientError(f"nothing answers at {host}:{port}; start the server: python serve.py") from None
    except requests.Timeout:
        raise ClientError(f"no answer from {host}:{port} within {TIMEOUT_S:.0f} s") from None
    except requests.RequestException as error:  # cut off, wrongly compressed, sent elsewhere without end
        raise ClientError(f"{url}: no whole answer ({type(error).__name__}); {OTHER_PROGRAM}") from None
    if reply.status_code != 200:
        raise ClientError(f"{url} answered {reply.status_code}: {' '.join(reply.text.split())}")
    try:
        return np.array(reply.json()["predictions"], dtype=float).reshape(len(data), 2)
    except (ValueError, KeyError, TypeError):
        raise ClientError(f"{url} answered without probabilities; {OTHER_PROGRAM}") from None


def predict_grpc(data, host: str = "127.0.0.1", port: int = 8500, version: str = "", label: str = "") -> np.ndarray:
    """Return the probabilities as `predict` does, over gRPC."""
    predict_pb2, prediction_service_pb2_grpc = import_stubs()
    array = np.asarray(data, dtype="<f4")  # gRPC converts nothing: the type must be the signature's, float32

    request = predict_pb2.PredictRequest()
    request.model_spec.name = MODEL_NAME
    if version:
        request.model_spec.version.value = int(version)
    elif label:
        request.model_spec.version_label = label
    tensor = request.inputs["features"]
    tensor.dtype = 1  # DT_FLOAT
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = array.tobytes()

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            response = stub.Predict(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ClientError(f"nothing answers at {host}:{port}; start the server: python serve.py") from None
            raise ClientError(f"{host}:{port} answered {error.code().name}: {error.details()}") from None
    try:
        return np.array(response.outputs["probabilities"].float_val).reshape(len(array), 2)
    except ValueError:
        raise ClientError(f"{host}:{port} answered without probabilities; {OTHER_PROGRAM}") from None


@contextlib.contextmanager
def messages_without_tensorflow():
    """Let tensorflow-serving-api's stubs be imported inside the block without importing TensorFlow.

    The stubs import message definitions that lie inside the tensorflow package, and importing any part of
    a package runs its whole __init__: 6 to 9 seconds, of no use to a client. An empty module of that name
    with the package's search path makes the definitions importable without it. It is removed afterwards,
    so a later import gets the real TensorFlow.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    stand_in = types.ModuleType("tensorflow")
    stand_in.__path__ = importlib.util.find_spec("tensorflow").submodule_search_locations
    sys.modules["tensorflow"] = stand_in
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorflow"]:
            del sys.modules[name]


def import_stubs():
    """Return the message and the service module of tensorflow-serving-api."""
    with messages_without_tensorflow():
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    return predict_pb2, prediction_service_pb2_grpc


def load_rows(path: Path, count: int) -> tuple[list[list[float]], list[str]]:
    """Return the first `count` rows of features and the names of their true classes."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))[1 : count + 1]
    return [[float(value) for value in line[:-1]] for line in lines], [
        ("malignant", "benign")[int(line[-1])] for line in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="the server's host (default: 127.0.0.1)")
    parser.add_argument("--rest-port", type=int, default=8501, help="its REST port (default: 8501)")
    parser.add_argument("--grpc-port", type=int, default=8500, help="its gRPC port (default: 8500)")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to send (default: 3)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--version", type=int, help="1 or 2 (default: the newest)")
    choice.add_argument("--label", help="stable or canary (default: none)")
    arguments = parser.parse_args()

    try:
        rows, truths = load_rows(DATA_DIR / "test.csv", arguments.rows)
    except FileNotFoundError as error:
        sys.exit(f"client.py: {error.filename} not found: run python make_data.py in data")
    asked = {"host": arguments.host, "version": str(arguments.version or ""), "label": arguments.label or ""}
    try:
        for transport, function, port in (
            ("REST", predict, arguments.rest_port),
            ("gRPC", predict_grpc, arguments.grpc_port),
        ):
            for i, (malignant, benign) in enumerate(function(rows, port=port, **asked)):
                print(f"{transport} row {i + 1}: malignant {malignant:.6f}, benign {benign:.6f} (truth: {truths[i]})")
    except ClientError as error:
        sys.exit(f"client.py: {error}")
    print(f"{len(rows)} rows predicted over REST and over gRPC")


if __name__ == "__main__":
    main()
