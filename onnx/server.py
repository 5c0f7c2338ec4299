"""Serve a repository of ONNX models over HTTP: ONNX Runtime is a library and brings no server.

    python server.py [--port 8000] [--model-repository models] [--device cpu|cuda|auto]

POST /predict             {"data": [[5 numbers], ...]} -> {"predictions": [[P(malignant), P(benign)], ...]}
POST /predict/<version>   the same with that version; without one the newest answers
GET  /v2...               the Open Inference Protocol: health, metadata and POST .../infer for every model

Serves models/<name>/<version>/model.onnx, as convert_to_onnx.py writes them. Writes nothing. Ctrl-C stops it.
"""

import argparse
import asyncio
import errno
import gc
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import uvicorn
from onnx_inference import PROVIDERS, DeviceError, ModelError, ONNXPredictor

FOLDER = Path(__file__).resolve().parent

MAX_BODY_BYTES = 1_000_000
# One row takes some 10 µs and is best computed on the spot. A body of MAX_BODY_BYTES takes some 20 ms, in which the
# event loop would answer nobody else: above this size the work moves to a thread (ONNX Runtime frees Python's lock).
INLINE_BODY_BYTES = 32_000

UVICORN_SETTINGS = {
    "loop": "uvloop",
    "http": "httptools",
    "ws": "none",
    "lifespan": "off",
    "access_log": False,
    "log_level": "warning",
    "server_header": False,
    "timeout_keep_alive": 75,  # longer than the idle timeout of most proxies: they close first, and no request is lost
    "timeout_graceful_shutdown": 2,
}

Handler = Callable[[bytes], bytes]  # a request's body to a reply's body
encode = msgspec.json.Encoder().encode


class Refusal(Exception):
    """A request that gets `status` and {"error": message} instead of an answer."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()):
        super().__init__(message)
        self.status = status
        self.headers = headers


class InferInput(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw  # flat or nested: decoded once the shape is known


class InferOutput(msgspec.Struct):
    name: str


class InferRequest(msgspec.Struct):
    inputs: list[InferInput]
    outputs: list[InferOutput] = []
    id: str | None = None


class Model:
    """One version of one model: the predictor, and the decoders that turn bytes into its rows."""

    def __init__(self, name: str, version: str, predictor: ONNXPredictor):
        self.name = name
        self.version = version
        self.predictor = predictor
        # Typed decoding refuses what NumPy would quietly accept (true, "1.5"), and says where it stood.
        row = tuple[(float,) * predictor.features]
        predict_request = msgspec.defstruct("PredictRequest", [("data", list[row])], forbid_unknown_fields=True)
        self.decode_predict = msgspec.json.Decoder(predict_request).decode
        self.decode_infer = msgspec.json.Decoder(InferRequest).decode
        self.decode_rows = msgspec.json.Decoder(list[row]).decode
        self.decode_flat = msgspec.json.Decoder(list[float]).decode

    def predict(self, body: bytes) -> bytes:
        """Answer POST /predict; Refusal where the body is not rows."""
        rows = self.decode(self.decode_predict, body).data
        return encode({"predictions": self.compute(rows).tolist()})

    def infer(self, body: bytes) -> bytes:
        """Answer POST /v2/models/<name>/infer; Refusal where the body is not one FP32 tensor of rows."""
        request: InferRequest = self.decode(self.decode_infer, body)
        expected = self.predictor.input.name
        if [tensor.name for tensor in request.inputs] != [expected]:
            raise Refusal(400, f"inputs: expected exactly one, called {expected!r}")
        for output in request.outputs:
            if output.name != self.predictor.output.name:
                raise Refusal(400, f"outputs: {output.name!r} is unknown; there is {self.predictor.output.name!r}")
        tensor = request.inputs[0]
        if tensor.datatype != "FP32":
            raise Refusal(400, f"inputs[0].datatype: expected 'FP32', got {tensor.datatype!r}")
        if len(tensor.shape) != 2 or tensor.shape[0] < 1 or tensor.shape[1] != self.predictor.features:
            raise Refusal(400, f"inputs[0].shape: expected [n, {self.predictor.features}], got {tensor.shape}")

        nested = re.match(rb"\s*\[\s*\[", bytes(tensor.data)) is not None
        values = self.decode(self.decode_rows if nested else self.decode_flat, tensor.data, "$.inputs[0].data")
        count = len(values) * self.predictor.features if nested else len(values)
        if count != tensor.shape[0] * tensor.shape[1]:
            raise Refusal(400, f"inputs[0].data: {count} numbers do not fill the shape {tensor.shape}")
        probabilities = self.compute(values if nested else np.reshape(values, tensor.shape))
        output = {
            "name": self.predictor.output.name,
            "datatype": "FP32",
            "shape": list(probabilities.shape),
            "data": probabilities.ravel().tolist(),
        }
        reply = {"model_name": self.name, "model_version": self.version, "outputs": [output]}
        return encode(reply if request.id is None else {"id": request.id, **reply})

    def compute(self, rows) -> np.ndarray:
        """Return the probabilities (n, 2); Refusal where a row is not finite in float32 or there is none."""
        try:
            return self.predictor.predict(rows)
        except ValueError as error:
            raise Refusal(400, str(error)) from None

    def decode(self, decoder: Callable, body: bytes | msgspec.Raw, root: str = "$"):
        """Return what `decoder` makes of `body`; Refusal with the place and the feature's name where it fails."""
        try:
            return decoder(body)
        except msgspec.ValidationError as error:
            message = str(error).replace("`$", f"`{root}")
            names = self.predictor.feature_names
            if place := re.search(r"\[(\d+)\]\[(\d+)\]`$", message):
                message += f" (row {place[1]}, {names[int(place[2])]})"
            elif place := re.search(r" of length .*\[(\d+)\]`$", message):
                message += f" (row {place[1]}; the features are {', '.join(names)})"
            elif decoder == self.decode_predict:
                message += f'; send {{"data": [[{self.predictor.features} numbers], ...]}}'
            raise Refusal(400, message) from None
        except msgspec.DecodeError as error:
            reason = "the body is empty" if not body else str(error).removeprefix("JSON is malformed: ")
            hint = "; JSON has no NaN and no Infinity" if b"NaN" in body or b"Infinity" in body else ""
            raise Refusal(400, f"malformed JSON: {reason}{hint}") from None
        except UnicodeDecodeError:
            raise Refusal(400, "the body is not UTF-8") from None
        except RecursionError:
            raise Refusal(400, "the JSON is nested too deep") from None


def load_repository(folder: Path, device: str, intra_op_threads: int) -> dict[str, dict[str, Model]]:
    """Return the models by name and version, the newest version last; a version that fails is told and left out.

    Raises DeviceError where the demanded device cannot be used at all.
    """
    models: dict[str, dict[str, Model]] = {}
    paths = [path for path in folder.glob("*/*/model.onnx") if path.parent.name.isdecimal()]
    for path in sorted(paths, key=lambda path: (path.parts[-3], int(path.parent.name))):
        name, version = path.parts[-3:-1]
        try:
            predictor = ONNXPredictor(path, device, intra_op_threads)  # predicts once before it is served
        except DeviceError:
            raise
        except ModelError as error:
            print(f"server: {name} version {version} is left out: {error}", file=sys.stderr, flush=True)
        else:
            models.setdefault(name, {})[version] = Model(name, version, predictor)
    return models


def make_routes(models: dict[str, dict[str, Model]], model_name: str) -> dict[str, dict[str, Handler]]:
    """Return every path that is served, and its handler by method."""

    def constant(value) -> dict[str, Handler]:
        reply = encode(value)
        return {"GET": lambda _: reply}

    server = constant({"name": "onnxruntime", "version": ort.__version__, "extensions": []})
    routes = {
        "/v2": server,
        "/v2/": server,
        "/v2/health/live": constant({"live": True}),
        "/v2/health/ready": constant({"ready": True}),
    }
    for name, versions in models.items():
        newest = list(versions)[-1]
        for version, model in versions.items():
            predictor = model.predictor
            paths = [f"/v2/models/{name}/versions/{version}"]
            if version == newest:
                paths.append(f"/v2/models/{name}")
            for path in paths:
                routes[path] = constant(
                    {
                        "name": name,
                        "versions": list(versions),
                        "platform": "onnxruntime_onnx",
                        "inputs": [
                            {"name": predictor.input.name, "datatype": "FP32", "shape": [-1, predictor.features]}
                        ],
                        "outputs": [
                            {
                                "name": predictor.output.name,
                                "datatype": "FP32",
                                "shape": [-1, predictor.output.shape[1]],
                            }
                        ],
                    }
                )
                routes[f"{path}/ready"] = constant({"name": name, "ready": True})
                routes[f"{path}/infer"] = {"POST": model.infer}
    for version, model in models[model_name].items():
        routes[f"/predict/{version}"] = {"POST": model.predict}
        routes["/predict"] = {"POST": model.predict}  # the newest comes last and stays
    return routes


class Application:
    """The ASGI application: find the handler, read the body, answer in JSON."""

    def __init__(self, models: dict[str, dict[str, Model]], model_name: str):
        self.models = models
        self.model_name = model_name
        self.routes = make_routes(models, model_name)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        status, headers = 200, ()
        try:
            handler = self.find_handler(scope["path"], scope["method"])
            if scope["method"] == "POST":
                refuse_wrong_headers(scope["headers"])
                body = await read_body(receive)
            else:
                body = b""
            reply = handler(body) if len(body) <= INLINE_BODY_BYTES else await asyncio.to_thread(handler, body)
        except ConnectionResetError:
            return  # the client has gone
        except Refusal as refusal:
            # A body that is still on its way is read and dropped by uvicorn, so a kept connection stays in step.
            status, headers, reply = refusal.status, refusal.headers, encode({"error": str(refusal)})
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", b"%d" % len(reply)),
                    *headers,
                ],
            }
        )
        await send({"type": "http.response.body", "body": reply})

    def find_handler(self, path: str, method: str) -> Handler:
        """Return the handler; Refusal 404 or 405 where there is none."""
        methods = self.routes.get(path)
        if methods is None:
            raise Refusal(404, self.explain_unknown(path))
        if method not in methods:
            allowed = ", ".join(methods)
            raise Refusal(405, f"{path} takes {allowed}, not {method}", ((b"allow", allowed.encode()),))
        return methods[method]

    def explain_unknown(self, path: str) -> str:
        """Return why `path` is not served: the model, the version, or the path itself."""
        found = re.match(r"/v2/models/([^/]+)(?:/versions/([^/]+))?", path) or re.match(r"/predict()/([^/]+)$", path)
        name, version = (found[1] or self.model_name, found[2]) if found else (None, None)
        if name is not None and name not in self.models:
            return f"model {name!r} is not served; there are {', '.join(self.models)}"
        if version is not None and version not in self.models[name]:
            return f"version {version!r} of {name} is not served; there are {', '.join(self.models[name])}"
        return f"no such path: {path!r}; there are /predict, /predict/<version> and /v2"


def refuse_wrong_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """Raise Refusal 415 for a body that is not JSON and 413 for one announced as too large, before reading any."""
    for name, value in headers:
        if name == b"content-type" and value.partition(b";")[0].strip().lower() != b"application/json":
            raise Refusal(415, f"Content-Type is {value.decode('latin-1')!r}, expected 'application/json'")
        if name == b"content-length" and int(value) > MAX_BODY_BYTES:
            raise too_large()


async def read_body(receive: Callable) -> bytes:
    """Return the request's body; Refusal 413 as soon as it grows too large, ConnectionResetError if it breaks off."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise too_large()
        if not message.get("more_body", False):
            return body


def too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer rows at a time")


def stop(*_) -> None:
    """End with exit code 0: being asked to stop is no failure. uvicorn hands the signal on after its clean-up.

    Raising SystemExit instead would be lost now and then: Python ignores what is raised inside a destructor.
    """
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--model-repository", type=Path, default=FOLDER / "models", help="folder of the models (default: models)"
    )
    parser.add_argument("--model", default="my_model", help="the model behind /predict (default: my_model)")
    parser.add_argument("--device", choices=list(PROVIDERS), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--intra-op-threads", type=int, default=1, help="threads in one operator (default: 1)")
    arguments = parser.parse_args()
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port {arguments.port}: expected 0 (any free port) to 65535")
    if arguments.intra_op_threads < 0:
        parser.error(f"--intra-op-threads {arguments.intra_op_threads}: expected 0 (one per core) or more")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    try:
        models = load_repository(arguments.model_repository, arguments.device, arguments.intra_op_threads)
    except DeviceError as error:
        print(f"server: {error}", file=sys.stderr)
        return 1
    if arguments.model not in models:
        print(
            f"server: no version of {arguments.model} to serve in {arguments.model_repository}: "
            "run python convert_to_onnx.py",
            file=sys.stderr,
        )
        return 1
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    try:
        listener = socket.create_server((arguments.host, arguments.port), family=family)
    except OSError as error:
        address = f"{arguments.host}:{arguments.port}"
        if error.errno == errno.EADDRINUSE:
            problem = f"{address} is in use; stop the program that listens there, or choose another --port"
        else:
            problem = f"cannot listen on {address} ({error.strerror}); choose another --host or --port"
        print(f"server: {problem}", file=sys.stderr)
        return 1

    application = Application(models, arguments.model)
    gc.collect()
    gc.freeze()  # what is loaded stays: the collector need not look through it again and again
    served = "; ".join(f"{name} {', '.join(versions)}" for name, versions in models.items())
    providers = next(iter(models[arguments.model].values())).predictor.providers
    print(f"models and versions: {served} ({providers[0]})")
    print(f"serving on http://{arguments.host}:{listener.getsockname()[1]}, Ctrl-C to stop", flush=True)
    uvicorn.Server(uvicorn.Config(application, **UVICORN_SETTINGS)).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
