"""TorchServe, started by its folder's serve.py."""

import functools
import json
from typing import Any

import numpy as np

from endpoints.base import REPOSITORY_DIR, Endpoint, Request


class TorchServeEndpoint(Endpoint):
    name = "torchserve"
    kind = "native"
    folder = REPOSITORY_DIR / "torchserve"
    default_ports = {
        "rest": 8080,
        "management": 8081,
        "metrics": 8082,
        "grpc": 7070,
        "grpc-management": 7071,
    }
    versions = {"1": "1.0", "2": "2.0"}
    rows_key = "data"
    metrics_port = "metrics"
    packages = ("torchserve", "torch")
    variant = "default"
    options: tuple[str, ...] = ()
    settings = {
        "workers": "one per usable core and version (default)",
        "batching": "off (batchSize 1, default)",
        "queue": "100 (default)",
        "network threads": "two per usable core (default)",
        "access log": "on (default)",
    }
    image_settings: dict[str, str] | None = {**settings, "access log": "off"}

    def command(self) -> list[str]:
        options = list(self.options)
        for role, port in self.ports.items():
            if port != self.default_ports[role]:
                options += [f"--{role}-port", str(port)]
        options += ["--only-version", self.native_version(self.only_version)] if self.only_version else []
        return ["python", "serve.py", *options]

    def path(self, version: str | None) -> str:
        return f"/predictions/my_model/{self.native_version(version)}" if version else "/predictions/my_model"

    def request(self, rows: list[Any], version: str | None) -> Request:
        return Request(self.path(version), self.body(rows, version), headers=self.token("inference"))

    def token(self, kind: str) -> dict[str, str]:
        """The header that a server with tokens needs, `kind` inference or management; none if there are no keys."""
        try:
            keys = json.loads((self.folder / "keys" / f"{self.ports['rest']}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # a server without tokens, or not up yet
            return {}
        return {"Authorization": f"Bearer {keys[kind]['key']}"}

    def decode(self, reply: bytes) -> np.ndarray:
        try:
            probabilities = np.array(json.loads(reply), dtype=float)
        except TypeError as error:  # an object: TorchServe's own form of an error
            raise ValueError(f"torchserve: not a list of probability pairs: {reply[:200]!r}") from error
        if probabilities.ndim != 2 or probabilities.shape[1] != 2:
            raise ValueError(f"torchserve: not a list of probability pairs: {reply[:200]!r}")
        return probabilities


class TorchServeGrpcEndpoint(TorchServeEndpoint):
    """The same server asked over gRPC, in a separate process, so that each row has its own cost."""

    name = "torchserve-grpc"
    protocol = "gRPC"

    def path(self, version: str | None) -> str:
        return "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"

    def request(self, rows: list[Any], version: str | None) -> Request:
        field = _messages()["Field"](key=self.rows_key, value=json.dumps(rows).encode())
        message = _messages()["PredictionsRequest"](
            model_name="my_model", model_version=self.native_version(version) if version else "", input=[field]
        )
        return Request(
            self.path(version), message.SerializeToString(), "POST", "application/grpc", self.token("inference")
        )

    def decode(self, reply: bytes) -> np.ndarray:
        from google.protobuf.message import DecodeError

        try:
            prediction = _messages()["PredictionResponse"].FromString(reply).prediction
        except DecodeError as error:
            raise ValueError(f"torchserve: no PredictionResponse: {reply[:200]!r}") from error
        return super().decode(prediction)  # over gRPC a refusal has status OK too; it is no list of pairs


TUNED_OPTIONS = ("--config", "config-tuned.properties", "--log-config", "log4j2-tuned.xml")
TUNED_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
TUNED_SETTINGS = {
    "workers": "1 per version",
    "threads": "1 per worker",
    "batching": "up to 64, 1 ms",
    "queue": "1,000",
    "network threads": "1",
    "access log": "off",
    "system metrics": "off",
    "tokens": "required",
}


class TunedTorchServeEndpoint(TorchServeEndpoint):
    name = "torchserve-tuned"
    variant = "tuned"
    options = TUNED_OPTIONS
    settings = TUNED_SETTINGS
    image_settings = None

    def environment(self) -> dict[str, str]:
        return TUNED_ENVIRONMENT


class TunedTorchServeGrpcEndpoint(TorchServeGrpcEndpoint):
    name = "torchserve-grpc-tuned"
    variant = "tuned"
    options = TUNED_OPTIONS
    settings = TUNED_SETTINGS
    image_settings = None

    def environment(self) -> dict[str, str]:
        return TUNED_ENVIRONMENT


@functools.cache
def _messages() -> dict[str, Any]:
    """Return the messages of the Predictions call by name. The numbers are those of TorchServe's inference.proto.

    In a separate pool, so that they meet no other definition in this process. A map is on the wire
    what a repeated message of key and value is.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    fields = {
        "Field": [("key", 1, kinds.TYPE_STRING), ("value", 2, kinds.TYPE_BYTES)],
        "PredictionsRequest": [
            ("model_name", 1, kinds.TYPE_STRING),
            ("model_version", 2, kinds.TYPE_STRING),
            ("input", 3, kinds.TYPE_MESSAGE),
        ],
        "PredictionResponse": [("prediction", 1, kinds.TYPE_BYTES)],
    }
    file = descriptor_pb2.FileDescriptorProto(name="predictions.proto", syntax="proto3")
    for message, members in fields.items():
        description = file.message_type.add(name=message)
        for name, number, kind in members:
            if kind == kinds.TYPE_MESSAGE:
                description.field.add(
                    name=name, number=number, type=kind, label=kinds.LABEL_REPEATED, type_name=".Field"
                )
            else:
                description.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in fields}
