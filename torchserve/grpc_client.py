"""Ask a running TorchServe for predictions over gRPC.

    python grpc_client.py
    python grpc_client.py 13.82 24.49 0.1162 0.1357 0.2275

Sends one row of five raw features to both versions and prints their
probabilities; writes nothing. If serve.py has made keys/8080.json, the server
requires a key, and each request carries it.
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import grpc
except ModuleNotFoundError as error:
    sys.exit(f"grpc_client: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

KEYS_PATH = Path(__file__).resolve().parent / "keys" / "8080.json"
SAMPLE_ROW = [13.82, 24.49, 0.1162, 0.1357, 0.2275]

# This compiles the .proto file, which gRPC looks up by name on the import path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
messages, services = grpc.protos_and_services("inference.proto")


def predict(channel: grpc.Channel, rows: list, version: str = "", key: str = "") -> list[list[float]]:
    """Return [P(malignant), P(benign)] per row; without `version` the default version answers.

    `key` is the inference key of a server with tokens.

    Raises ValueError if the handler refuses the rows, grpc.RpcError if TorchServe refuses the request.
    """
    request = messages.PredictionsRequest(
        model_name="my_model", model_version=version, input={"data": json.dumps(rows).encode()}
    )
    metadata = [("authorization", f"Bearer {key}")] if key else []
    call = services.InferenceAPIsServiceStub(channel).Predictions
    reply = json.loads(call(request, timeout=30, metadata=metadata).prediction)
    # The gRPC status is OK even for a refusal: TorchServe drops the status that a handler sets.
    if isinstance(reply, dict):
        raise ValueError(reply["message"])
    return reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", type=float, nargs="*", default=SAMPLE_ROW, help="raw features (default: a test row)")
    parser.add_argument("--address", default="127.0.0.1:7070", help="TorchServe's address (default: 127.0.0.1:7070)")
    parser.add_argument(
        "--keys", type=Path, default=KEYS_PATH, help="the server's keys, if it needs any (default: keys/8080.json here)"
    )
    arguments = parser.parse_args()
    try:
        key = json.loads(arguments.keys.read_text())["inference"]["key"] if arguments.keys.is_file() else ""
    except (OSError, ValueError, KeyError, TypeError):
        sys.exit(f"grpc_client: {arguments.keys} holds no keys of a TorchServe; start python serve.py again")
    with grpc.insecure_channel(arguments.address) as channel:
        for version in ("1.0", "2.0"):
            try:
                [[malignant, benign]] = predict(channel, [arguments.row], version, key)
            except ValueError as error:
                sys.exit(f"grpc_client: {error}")
            except grpc.RpcError as error:
                problem = (error.details() or error.code().name).splitlines()[0]
                sys.exit(f"grpc_client: {arguments.address}: {problem}; is python serve.py running?")
            print(f"version {version}: malignant {malignant:.4f}, benign {benign:.4f}")


if __name__ == "__main__":
    main()
