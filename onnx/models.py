"""The models that server.py serves: bytes of a request to bytes of a reply, and the folder that they come from."""

import asyncio
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from batching import Batcher
from onnx_inference import DeviceError, ModelError, ONNXPredictor
from settings import Settings

# One row takes some 10 µs and is best computed on the spot. A body of a megabyte takes some 20 ms, in which the
# event loop would answer nobody else: above this size the work moves to a thread (ONNX Runtime frees Python's lock).
INLINE_BODY_BYTES = 32_000

FLOAT32_MAX = float(np.finfo(np.float32).max)
Number = Annotated[float, msgspec.Meta(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]  # checked while it is decoded, for nothing

encode = msgspec.json.Encoder().encode

NOT_FINITE = "the model has no finite answer to these features: they are too large"


class Refusal(Exception):
    """A request that gets `status` and {"error": message} instead of an answer."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()):
        super().__init__(message)
        self.status = status
        self.headers = headers


class BinaryReply(NamedTuple):
    """A reply of the binary tensor extension: JSON, then tensors as they lie in memory."""

    body: bytes
    json_bytes: int


def encode_predictions(predictions: list) -> bytes:
    """Return the reply to POST /predict; Refusal where a probability is not finite, which JSON writes as null."""
    reply = encode({"predictions": predictions})
    if b"null" in reply:
        row = next(row for row, pair in enumerate(predictions) if not all(map(math.isfinite, pair)))
        raise Refusal(400, f"row {row}: {NOT_FINITE}")
    return reply


class Parameters(msgspec.Struct):
    """Those of the binary tensor extension; others are ignored, as the protocol allows."""

    binary_data_size: int | None = None  # of an input: its bytes behind the JSON
    binary_data: bool | None = None  # of an output: send it behind the JSON
    binary_data_output: bool = False  # of the request: the same for all its outputs


class InferInput(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()  # flat or nested: decoded once the shape is known
    parameters: Parameters = msgspec.field(default_factory=Parameters)


class InferOutput(msgspec.Struct):
    name: str
    parameters: Parameters = msgspec.field(default_factory=Parameters)


class InferRequest(msgspec.Struct):
    inputs: list[InferInput]
    outputs: list[InferOutput] = []
    id: str | None = None
    parameters: Parameters = msgspec.field(default_factory=Parameters)


class Model:
    """One version of one model: the predictor, and the decoders that turn bytes into its rows."""

    def __init__(self, name: str, version: str, predictor: ONNXPredictor, batch_rows: int = 0):
        self.name = name
        self.version = version
        self.key = name, version
        self.predictor = predictor
        self.batcher = Batcher(self.predict_rows, batch_rows) if batch_rows else None
        # Typed decoding refuses what NumPy would quietly accept (true, "1.5"), and says where it stood.
        row = tuple[(Number,) * predictor.features]
        predict_request = msgspec.defstruct("PredictRequest", [("data", list[row])], forbid_unknown_fields=True)
        self.decode_predict = msgspec.json.Decoder(predict_request).decode
        self.decode_infer = msgspec.json.Decoder(InferRequest).decode
        self.decode_rows = msgspec.json.Decoder(list[row]).decode
        self.decode_flat = msgspec.json.Decoder(list[Number]).decode

    def describe(self, versions: list[str]) -> dict:
        """Return the metadata of the Open Inference Protocol, with all `versions` of the model."""
        features, columns = self.predictor.features, self.predictor.output.shape[1]
        return {
            "name": self.name,
            "versions": versions,
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": self.predictor.input.name, "datatype": "FP32", "shape": [-1, features]}],
            "outputs": [{"name": self.predictor.output.name, "datatype": "FP32", "shape": [-1, columns]}],
        }

    async def predict(self, body: bytes, _json_bytes: int | None, alone: bool) -> bytes:
        """Answer POST /predict; Refusal where the body is not rows. `alone`: no other request is under way."""
        if len(body) > INLINE_BODY_BYTES:
            return await asyncio.to_thread(self.predict_alone, body)
        if alone or self.batcher is None:
            return self.predict_alone(body)
        return encode_predictions(await self.batcher.add(self.decode_predict_rows(body)))

    def predict_alone(self, body: bytes) -> bytes:
        """The same in a run of its own."""
        return encode_predictions(self.predict_rows(self.decode_predict_rows(body)).tolist())

    def decode_predict_rows(self, body: bytes) -> list:
        """Return the rows in the body of POST /predict, at least one; Refusal where they are not."""
        rows = self.decode(self.decode_predict, body).data
        if not rows:
            raise Refusal(400, "rows are empty: send at least one")
        return rows

    def predict_rows(self, rows: list) -> np.ndarray:
        """Return the probabilities (n, 2) of decoded rows, whose numbers the decoder has checked."""
        return self.predictor.run(np.array(rows, np.float32))

    async def infer(self, body: bytes, json_bytes: int | None, _alone: bool) -> bytes | BinaryReply:
        """Answer POST /v2/models/<name>/infer, the first `json_bytes` of `body` JSON (None: all of it).

        Refusal where there is not exactly one FP32 tensor of rows.
        """
        if len(body) > INLINE_BODY_BYTES:
            return await asyncio.to_thread(self.infer_alone, body, json_bytes)
        return self.infer_alone(body, json_bytes)

    def infer_alone(self, body: bytes, json_bytes: int | None) -> bytes | BinaryReply:
        if json_bytes is not None and not 0 <= json_bytes <= len(body):
            raise Refusal(400, f"Inference-Header-Content-Length is {json_bytes}, but the body has {len(body)} bytes")
        binary = b"" if json_bytes is None else memoryview(body)[json_bytes:]
        request: InferRequest = self.decode(self.decode_infer, body if json_bytes is None else body[:json_bytes])
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

        probabilities = self.compute(self.read_tensor(tensor, binary))
        output = {"name": self.predictor.output.name, "datatype": "FP32", "shape": list(probabilities.shape)}
        wanted = [output.parameters.binary_data for output in request.outputs]
        as_binary = request.parameters.binary_data_output if wanted in ([], [None]) else any(wanted)
        data = probabilities.astype("<f4").tobytes() if as_binary else b""
        if as_binary:
            output["parameters"] = {"binary_data_size": len(data)}
        else:
            output["data"] = probabilities.ravel().tolist()
        reply = {"model_name": self.name, "model_version": self.version, "outputs": [output]}
        encoded = encode(reply if request.id is None else {"id": request.id, **reply})
        return BinaryReply(encoded + data, len(encoded)) if as_binary else encoded

    def read_tensor(self, tensor: InferInput, binary: memoryview | bytes):
        """Return the rows of the one input, from `binary` where its parameters say so, else from its JSON."""
        size = tensor.parameters.binary_data_size
        count = tensor.shape[0] * tensor.shape[1]
        if size is not None:
            if size != len(binary) or size != 4 * count:
                raise Refusal(
                    400,
                    f"inputs[0]: binary_data_size is {size}, {len(binary)} bytes follow the JSON and the shape "
                    f"{tensor.shape} takes {4 * count}; the three must be equal",
                )
            return np.frombuffer(binary, "<f4").reshape(tensor.shape)
        if len(binary):
            raise Refusal(400, f"{len(binary)} bytes follow the JSON, but no input has a binary_data_size")
        if not bytes(tensor.data):
            raise Refusal(400, "inputs[0]: neither data nor the parameter binary_data_size is there")
        nested = re.match(rb"\s*\[\s*\[", bytes(tensor.data)) is not None
        values = self.decode(self.decode_rows if nested else self.decode_flat, tensor.data, "$.inputs[0].data")
        given = len(values) * self.predictor.features if nested else len(values)
        if given != count:
            raise Refusal(400, f"inputs[0].data: {given} numbers do not fill the shape {tensor.shape}")
        return values if nested else np.reshape(values, tensor.shape)

    def compute(self, rows) -> np.ndarray:
        """Return the probabilities (n, 2); Refusal where a row or its answer is not finite, or there is none."""
        try:
            probabilities = self.predictor.predict(rows)
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        finite = np.isfinite(probabilities).all(axis=1)  # (n,)
        if not finite.all():
            raise Refusal(400, f"row {finite.argmin()}: {NOT_FINITE}")
        return probabilities

    def decode(self, decoder: Callable, body: bytes | msgspec.Raw, root: str = "$"):
        """Return what `decoder` makes of `body`; Refusal with the place and the feature's name where it fails."""
        try:
            return decoder(body)
        except msgspec.ValidationError as error:
            message = str(error).replace("`$", f"`{root}")
            message = re.sub(r"`float` [<>]= \S+", "a number that is finite in float32", message)
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


class Repository:
    """The folder <name>/<version>/model.onnx: what is in it is served, also what changes while the server runs."""

    def __init__(self, folder: Path, settings: Settings, only_version: str | None = None):
        self.folder = folder
        self.settings = settings
        self.only_version = only_version  # of every model; None: all of them
        self.models: dict[str, dict[str, Model]] = {}  # by name and version, the newest version last
        self.defaults: dict[str, str] = {}  # by name, the version that answers where a request names none
        self.bad_defaults: dict[str, tuple[str, str]] = {}  # what was told of: the version named, the one kept
        self.failures: dict[tuple[str, str], str] = {}  # what is there and cannot be loaded: the reason for clients
        self.seen: dict[tuple[str, str], tuple] = {}  # the files that were tried

    def scan(self) -> bool:
        """Load what is new or changed, drop what is gone, choose the defaults; return whether anything has changed.

        A file that cannot be loaded is told in one line and changes nothing: a version that was served before it
        goes on as it was. `models` is replaced as a whole, so that a request in another thread sees the old or the
        new. Raises DeviceError where the demanded device cannot be used at all.
        """
        found = self.list_files()
        versions = {
            key: model for name in self.models.values() for model in name.values() if (key := model.key) in found
        }
        changed = len(versions) != sum(map(len, self.models.values()))
        for key in self.seen.keys() - found:
            self.failures.pop(key, None)
            print(f"server: {key[0]} version {key[1]} is gone and no longer served", file=sys.stderr, flush=True)
        for key, (path, file) in found.items():
            if self.seen.get(key) == file:
                continue
            name, version = key
            try:
                # Predicts once before it is served.
                predictor = ONNXPredictor(
                    path, self.settings.device, self.settings.intra_op_threads, self.settings.allow_spinning
                )
            except DeviceError:
                raise
            except ModelError as error:
                self.failures[key] = error.reason
                kept = "stays as it was" if key in versions else "is left out"
                print(f"server: {name} version {version} {kept}: {error}", file=sys.stderr, flush=True)
            else:
                self.failures.pop(key, None)
                versions[key] = Model(name, version, predictor, self.settings.batch_rows)
                changed = True
        self.seen = {key: file for key, (_, file) in found.items()}
        models: dict[str, dict[str, Model]] = {}
        for name, version in sorted(versions, key=lambda key: (key[0], int(key[1]))):
            models.setdefault(name, {})[version] = versions[name, version]
        defaults = {name: self.choose_default(name, list(models[name])) for name in models}
        changed |= defaults != self.defaults
        self.models, self.defaults = models, defaults
        return changed

    def choose_default(self, name: str, versions: list[str]) -> str:
        """Return the version that the file <name>/default names, or the newest where there is no such file.

        What cannot be followed is told once, and the default stays, or is the newest where that one is gone.
        """
        path = self.folder / name / "default"
        try:
            wanted = None if self.only_version else path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            wanted = None
        if wanted is None or wanted in versions:
            self.bad_defaults.pop(name, None)
            return wanted or versions[-1]
        kept = self.defaults.get(name) if self.defaults.get(name) in versions else versions[-1]
        if self.bad_defaults.get(name) != (wanted, kept):
            self.bad_defaults[name] = wanted, kept
            print(f"server: {path} names {wanted!r}, not one of {', '.join(versions)}; {kept} stays", file=sys.stderr)
        return kept

    def describe(self) -> str:
        """Return what is served in a line, and the defaults that are not the newest."""
        words = []
        for name, versions in self.models.items():
            default = self.defaults[name]
            chosen = "" if default == list(versions)[-1] else f" (default {default})"
            words.append(f"{name} {', '.join(versions)}{chosen}")
        return "; ".join(words) or "none"

    def index(self) -> list[dict]:
        """Return every version that is there, as the repository index of the Open Inference Protocol has it."""
        served = [
            {"name": name, "version": version, "state": "READY", "reason": ""}
            for name, versions in self.models.items()
            for version in versions
        ]
        failed = [
            {"name": name, "version": version, "state": "UNAVAILABLE", "reason": reason}
            for (name, version), reason in self.failures.items()
            if version not in self.models.get(name, {})
        ]
        return served + failed

    def list_files(self) -> dict[tuple[str, str], tuple[Path, tuple]]:
        """Return path and identity (it changes when the file does) of every model, by name and version."""
        files = {}
        for path in self.folder.glob("*/*/model.onnx"):
            if path.parent.name.isdecimal() and self.only_version in (None, path.parent.name):
                try:
                    status = path.stat()
                except OSError:
                    continue  # it went between the listing and now
                files[path.parts[-3], path.parts[-2]] = path, (status.st_ino, status.st_mtime_ns, status.st_size)
        return dict(sorted(files.items()))

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Scan every `poll_s` seconds, in a thread, for ever; call `on_change` when what is served has changed."""
        while self.settings.poll_s:
            await asyncio.sleep(self.settings.poll_s)
            try:
                changed = await asyncio.to_thread(self.scan)
            except (OSError, DeviceError) as error:
                print(f"server: the model repository cannot be read: {error}", file=sys.stderr, flush=True)
            else:
                if changed:
                    print(f"models and versions: {self.describe()}\n", end="", flush=True)
                    on_change()
