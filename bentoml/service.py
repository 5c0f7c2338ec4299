"""Serve both versions of the classifier over HTTP.

    bentoml serve service:svc

POST /predict takes {"features": [f1, …, f5]} for one row or {"features": [[…], …]} for many, and
optionally "version". The reply is nested as the request was:
{"version": "v2.0.0", "prediction": 1, "probability": [P(malignant), P(benign)]}. POST /predict_ab takes only
the features and lets chance choose the version; POST /predict_batched shares a call of the model between
requests.
"""

import functools
import os
import random
from typing import Annotated, Any

import bentoml
import guard
import numpy as np
from bentoml.exceptions import BentoMLException, NotFound
from bodies import JsonOnly
from pydantic import ConfigDict, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from sklearn.pipeline import Pipeline

MODEL_NAME = "my_model"
VERSIONS = ["v1.0.0", "v2.0.0"]  # as in bentofile.yaml; the last one answers when a request names none
if only_version := os.environ.get("ONLY_VERSION"):
    VERSIONS = [only_version]  # for one of the servers behind a gateway that splits requests between versions
FEATURES = ["mean radius", "mean texture", "mean smoothness", "mean concavity", "mean symmetry"]
MAX_CONNECTIONS = 512  # to one worker; beyond them 503, so that no client waits long
SHARE_OF_V2 = 0.5  # of the requests to /predict_ab
MONITOR = os.environ.get("MONITOR", "")  # the name of a log of all features and predictions; empty: no log
HOST, PORT = "127.0.0.1", 3000  # in a container: --host 0.0.0.0 or BENTOML_HOST=0.0.0.0

# The largest double that is not rounded to infinity: programs print the largest float32 as 3.4028235e38, a little more.
FLOAT32_MOST = 2.0**128 - 2.0**103 - 2.0**75
JSON_NAMES = {str: "a string", bool: "a boolean", type(None): "null", list: "an array", dict: "an object"}


def check_features(value: Any) -> list[float] | list[list[float]]:
    """Return `value`, as parsed from JSON, if it is one row of numbers or a list of such rows; else raise.

    Strict, unlike pydantic and NumPy: "1.5", true and null are not numbers here.
    """
    if not isinstance(value, list):
        raise refusal(f"features is {name_type(value)}; send 5 numbers, or a list of rows of 5 numbers")
    if not value:
        raise refusal("features is empty; send 5 numbers, or a list of rows of 5 numbers")
    for i, row in enumerate(value if isinstance(value[0], list) else [value]):
        if not isinstance(row, list):
            raise refusal(f"row {i} is {name_type(row)}, not an array of 5 numbers")
        if len(row) != len(FEATURES):
            raise refusal(f"row {i} has {len(row)} values; 5 are needed: {', '.join(FEATURES)}")
        for name, number in zip(FEATURES, row, strict=True):
            if type(number) not in (int, float):
                raise refusal(f"row {i}: {name} is {name_type(number)}, not a number")
            if not abs(number) <= FLOAT32_MOST:  # also true for NaN
                raise refusal(f"row {i}: {name} is not finite, or beyond the range of float32")
    return value


def check_rows(value: Any) -> np.ndarray:
    """Return `value` as an array (n, 5) if it is a list of rows; else raise.

    Each request is checked before it joins others: one bad row would fail their shared call.
    """
    features = check_features(value)
    if not isinstance(features[0], list):
        raise refusal("rows is one row; send a list of rows of 5 numbers")
    return np.array(features, dtype=np.float64)


def check_version(value: Any) -> str:
    """Return `value` if it is a served version; else raise."""
    if value not in VERSIONS:
        raise refusal(f"version is not one that is served: {', '.join(VERSIONS)}")
    return value


def refusal(message: str) -> PydanticCustomError:
    """Return the error that BentoML answers with status 400 and `message` as its "detail"."""
    return PydanticCustomError("bad_request", message)


def name_type(value: Any) -> str:
    return JSON_NAMES.get(type(value), "a number")


ROW_SCHEMA = {"type": "array", "items": {"type": "number"}, "minItems": len(FEATURES), "maxItems": len(FEATURES)}
ROWS_SCHEMA = {"type": "array", "items": ROW_SCHEMA, "minItems": 1}
FEATURES_SCHEMA = {"anyOf": [ROW_SCHEMA, ROWS_SCHEMA]}


class PredictInput(bentoml.IODescriptor):
    """The request's body. An unknown key is an error: a misspelt "version" must not get the default version."""

    model_config = ConfigDict(extra="forbid")

    features: Annotated[list, PlainValidator(check_features), WithJsonSchema(FEATURES_SCHEMA)]
    version: Annotated[str, PlainValidator(check_version), WithJsonSchema({"enum": VERSIONS})] = VERSIONS[-1]


class PredictAbInput(bentoml.IODescriptor):
    """The body of /predict_ab: the server chooses the version."""

    model_config = ConfigDict(extra="forbid")

    features: Annotated[list, PlainValidator(check_features), WithJsonSchema(FEATURES_SCHEMA)]


class PredictOutput(bentoml.IODescriptor):
    """The reply's body: for n rows lists of n, for one unnested row single values.

    A model, not a plain dict, for which BentoML would derive a JSON schema at every reply.
    """

    version: str  # that answered
    prediction: int | list[int]  # 0 malignant, 1 benign
    probability: list[float] | list[list[float]]  # [P(malignant), P(benign)], per row


class Classifier:
    """Holds every version and answers with the one that the request names."""

    def __init__(self):
        self.models = load_models()

    @bentoml.on_deployment
    def check_before_serving() -> None:
        """Check port and models once, in the supervisor, before any worker starts; an error is shown as one line.

        A worker cannot do that: when it fails, the supervisor keeps starting others.
        """
        guard.refuse_taken_port(HOST, PORT)
        guard.stop_on_hangup()
        Classifier()

    @bentoml.on_startup
    def end_with_supervisor(self) -> None:
        guard.end_with_supervisor()

    @bentoml.api(input_spec=PredictInput, output_spec=PredictOutput)
    async def predict(self, features: list, version: str) -> PredictOutput:
        """Classify one row or many.

        `async`, though nothing is awaited: BentoML runs a plain method in a thread, and the handover
        takes as long as this model.
        """
        one_row = not isinstance(features[0], list)
        rows = np.array([features] if one_row else features, dtype=np.float64)  # (n, 5)
        probabilities = self.models[version].predict_proba(rows)  # (n, 2)
        predictions = probabilities.argmax(axis=1)  # (n,)
        if MONITOR:
            log_predictions(rows, version, probabilities)
        return PredictOutput(
            version=version,
            prediction=int(predictions[0]) if one_row else predictions.tolist(),
            probability=probabilities[0].tolist() if one_row else probabilities.tolist(),
        )

    @bentoml.api(input_spec=PredictAbInput, output_spec=PredictOutput)
    async def predict_ab(self, features: list) -> PredictOutput:
        """Classify by a random version; the reply's "version" says which.

        The same user may meet both. A valid A/B test chooses by user, in front of the server.
        """
        return await self.predict(features, VERSIONS[-1] if random.random() < SHARE_OF_V2 else VERSIONS[0])

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=128, max_latency_ms=100)
    async def predict_batched(
        self, rows: Annotated[np.ndarray, PlainValidator(check_rows), WithJsonSchema(ROWS_SCHEMA)]
    ) -> list:
        """Return the probabilities (n, 2) of rows (n, 5) by the newest version; requests close in time share a call."""
        return self.models[VERSIONS[-1]].predict_proba(rows).tolist()


def log_predictions(rows: np.ndarray, version: str, probabilities: np.ndarray) -> None:
    """Write a line of JSON for each row (n, 5) to monitoring/<MONITOR>/data with bentoml.monitor."""
    with bentoml.monitor(MONITOR) as monitor:
        for name, column in zip(FEATURES, rows.T.tolist(), strict=True):
            monitor.log_batch(column, name, "feature", "numerical")
        monitor.log_batch([version] * len(rows), "version", "feature", "categorical")
        monitor.log_batch(probabilities[:, 1].tolist(), "P(benign)", "prediction", "numerical")


@functools.cache
def load_models() -> dict[str, Pipeline]:
    """Load every version, once for each process."""
    return {version: load_model(f"{MODEL_NAME}:{version}") for version in VERSIONS}


def load_model(tag: str) -> Pipeline:
    """Load `tag` from the model store and try it; raise BentoMLException with one line if that fails."""
    remedy = "run python train_and_save.py, with the same BENTOML_HOME"
    try:
        model = bentoml.sklearn.load_model(tag)
        model.predict_proba(np.zeros((1, len(FEATURES))))
    except NotFound as error:
        raise BentoMLException(f"{tag} not found: {remedy}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise BentoMLException(f"{tag} cannot be loaded ({type(error).__name__}): {remedy}") from error
    return model


def make_service(middleware: type) -> bentoml.Service:
    """Return the service behind `middleware`, JsonOnly or a subclass."""
    # Not `@bentoml.service` on the class with `svc = Classifier` below: the module would hold the same service
    # under two names, and `bentoml build` refuses to choose.
    service = bentoml.service(name="my_model_service", http={"host": HOST, "port": PORT})(Classifier)
    service.add_asgi_middleware(middleware)
    guard.limit_connections(MAX_CONNECTIONS)
    guard.accept_faster()
    return service


svc = make_service(JsonOnly)
