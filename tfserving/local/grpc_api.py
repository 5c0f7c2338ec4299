"""TensorFlow Serving's gRPC interface: PredictionService and ModelService."""

import asyncio
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import examples
import grpc
import numpy as np
from google.protobuf.message import DecodeError
from metrics import Metrics
from quiet_tensorflow import tf
from servables import DEFAULT_SIGNATURE, FLOAT, Library, Servable, ServingError, read_tensors
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

MAX_INLINE_BYTES = 64 * 2**10  # a larger request is answered on a thread, so that others do not wait for it
MAX_ERROR_BYTES = 1024  # of a status: a client refuses headers of more than some 8 kB, and the error would be lost
OPTIONS = [
    ("grpc.so_reuseport", 0),  # otherwise a second server would silently share the port
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]
MAX_KNOWN, MAX_KNOWN_BYTES = 4096, 1024  # requests that are read without parsing: how many heads, and the bytes of one
FLOAT32 = np.dtype(np.float32)
SIGNATURE_FIELD = "signature_def"  # the only metadata field
VALUE_FIELDS = {  # of a TensorProto, by type
    np.dtype(np.float32): "float_val",
    np.dtype(np.float64): "double_val",
    np.dtype(np.int8): "int_val",
    np.dtype(np.int16): "int_val",
    np.dtype(np.int32): "int_val",
    np.dtype(np.uint8): "int_val",
    np.dtype(np.int64): "int64_val",
    np.dtype(np.uint32): "uint32_val",
    np.dtype(np.uint64): "uint64_val",
    np.dtype(np.bool_): "bool_val",
    np.dtype(object): "string_val",
}


def write_tensor(array: np.ndarray, tensor: tensor_pb2.TensorProto) -> None:
    """Fill `tensor` with typed values, as TensorFlow Serving does; make_tensor_proto takes four times as long."""
    field = VALUE_FIELDS.get(array.dtype)
    if field is None:
        tensor.CopyFrom(tf.make_tensor_proto(array))
        return
    tensor.dtype = tf.dtypes.as_dtype(array.dtype).as_datatype_enum
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    getattr(tensor, field).extend(array.ravel().tolist())


def encode_response(servable: Servable, signature_name: str, outputs: dict[str, np.ndarray]) -> bytes:
    """Return a serialized PredictResponse.

    If every output is a small float array, it is written byte by byte: making the message first takes 40 µs, twice
    the run of the graph. (protobuf.dev/programming-guides/encoding: a field is its number and wire type,
    then for type 2 a length; the lengths here are below 128, one byte each.)
    """
    encoded = b""
    for alias, array in outputs.items():
        values = array.tobytes() if array.dtype == FLOAT32 else b"." * 128
        shape = b"".join(b"\x12\x02\x08%c" % size if 0 < size < 128 else b"." * 128 for size in array.shape)
        key = alias.encode()
        tensor = b"\x08\x01\x12%c%b*%c%b" % (len(shape) % 128, shape, len(values) % 128, values)
        entry = b"\n%c%b\x12%c%b" % (len(key) % 128, key, len(tensor) % 128, tensor)
        if max(len(values), len(shape), len(key), len(tensor), len(entry)) > 127 or not values:
            return make_response(servable, signature_name, outputs).SerializeToString()
        encoded += b"\n%c%b" % (len(entry), entry)
    return encoded + encode_model_spec(servable.name, servable.version, signature_name)


@functools.lru_cache(1024)
def encode_model_spec(name: str, version: int, signature_name: str) -> bytes:
    spec = model_pb2.ModelSpec(name=name, signature_name=signature_name)
    spec.version.value = version
    return predict_pb2.PredictResponse(model_spec=spec).SerializeToString()


def make_response(
    servable: Servable, signature_name: str, outputs: dict[str, np.ndarray]
) -> predict_pb2.PredictResponse:
    response = predict_pb2.PredictResponse()
    response.model_spec.name = servable.name
    response.model_spec.version.value = servable.version
    response.model_spec.signature_name = signature_name
    for alias, array in outputs.items():
        write_tensor(array, response.outputs[alias])
    return response


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """A PredictRequest that was not parsed: see RequestReader."""

    model_spec: model_pb2.ModelSpec
    arrays: dict[str, np.ndarray]  # the inputs


@dataclass(frozen=True, slots=True)
class Head:
    """The meaning of a request's bytes before its numbers, which come last."""

    model_spec: model_pb2.ModelSpec
    alias: str  # of the one input
    shape: tuple[int, ...]


class RequestReader:
    """Reads PredictRequests, and parses only those that are unlike all before.

    A client mostly sends the same request with other numbers. If the length and the bytes before the numbers equal
    those of a parsed request, so does their meaning.
    """

    def __init__(self):
        self.heads: dict[bytes, Head] = {}
        self.sizes: dict[int, int] = {}  # length of a request → how many of its bytes are numbers

    def read(self, message: bytes) -> KnownRequest | predict_pb2.PredictRequest:
        """Return the request, parsed only if necessary. Raises DecodeError."""
        size = self.sizes.get(len(message))
        if size:
            head = self.heads.get(message[:-size])
            if head:
                array = np.frombuffer(message, "<f4", offset=len(message) - size).reshape(head.shape)
                return KnownRequest(head.model_spec, {head.alias: array.copy()})  # TensorFlow needs its own memory
        request = predict_pb2.PredictRequest.FromString(message)
        if len(message) <= MAX_INLINE_BYTES:
            self._learn(message, request)
        return request

    def _learn(self, message: bytes, request: predict_pb2.PredictRequest) -> None:
        if len(request.inputs) != 1 or request.output_filter or not request.HasField("model_spec"):
            return
        [(alias, tensor)] = request.inputs.items()
        numbers = tensor.tensor_content
        shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
        if tensor.dtype != FLOAT or min(shape, default=1) < 1 or not len(numbers) == 4 * math.prod(shape) > 0:
            return
        head = message[: -len(numbers)]
        if len(head) > MAX_KNOWN_BYTES:
            return
        others = bytes(255 - byte for byte in numbers)
        if predict_pb2.PredictRequest.FromString(head + others).inputs[alias].tensor_content != others:
            return  # its numbers are not its last bytes
        if len(self.heads) >= MAX_KNOWN:
            self.heads.clear()
            self.sizes.clear()
        spec = model_pb2.ModelSpec()
        spec.CopyFrom(request.model_spec)  # the request's own would keep the whole request in memory
        self.heads[head] = Head(spec, alias, shape)
        self.sizes[len(message)] = len(numbers)


def cut_error(message: str) -> str:
    """Return an error message as TensorFlow Serving sends it: the beginning of a long one."""
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= MAX_ERROR_BYTES:
        return message
    return f"{encoded[:MAX_ERROR_BYTES].decode('utf-8', 'ignore')}...TRUNCATED"


def parses(read: Callable) -> Callable:
    """Return the error of a request that is no message, for `reports_errors`: gRPC would tell Python's name of it."""

    def parse(message: bytes):
        try:
            return read(message)
        except DecodeError as error:
            return error

    return parse


def reports_errors(method):
    """Turn a ServingError into the call's status."""

    @functools.wraps(method)
    async def wrapped(self, request, context):
        if isinstance(request, DecodeError):  # gRPC's own code for it, see its statuscodes.md
            await context.abort(grpc.StatusCode.INTERNAL, f"The request is no valid message for {method.__name__}")
        try:
            return await method(self, request)
        except ServingError as error:
            await context.abort(grpc.StatusCode[error.code], cut_error(error.message))
        except Exception as error:  # noqa: BLE001 - any failure is this call's error only
            print(f"local server: {method.__name__}: {error!r}", file=sys.stderr, flush=True)
            await context.abort(grpc.StatusCode.INTERNAL, f"Internal error: {type(error).__name__}")

    return wrapped


def is_counted(method):
    """Record the call in the metrics, if they are on."""

    @functools.wraps(method)
    async def wrapped(self, request):
        if not self.metrics:
            return await method(self, request)
        started_s = time.perf_counter()
        code = "INTERNAL"  # reports_errors uses it for any other failure
        try:
            reply = await method(self, request)
            code = "OK"
            return reply
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except ServingError as error:
            code = error.code
            raise
        finally:
            name = request.model_spec.name
            if name in self.library.models:
                self.metrics.record(name, method.__name__, "GRPC", code, time.perf_counter() - started_s)

    return wrapped


def find_servable(library: Library, spec: model_pb2.ModelSpec) -> Servable:
    return library.find(spec.name, *chosen_version(spec))


def chosen_version(spec: model_pb2.ModelSpec) -> tuple[int | None, str | None]:
    """Return (version, label), of which at most one is given."""
    match spec.WhichOneof("version_choice"):
        case "version":
            return spec.version.value, None
        case "version_label":
            return None, spec.version_label
    return None, None


def require_model_spec(request) -> None:
    if not request.HasField("model_spec"):
        raise ServingError("INVALID_ARGUMENT", "Missing ModelSpec")


READERS = {  # of the requests, by service and method
    "PredictionService": {
        "Classify": classification_pb2.ClassificationRequest.FromString,
        "Regress": regression_pb2.RegressionRequest.FromString,
        "MultiInference": inference_pb2.MultiInferenceRequest.FromString,
        "GetModelMetadata": get_model_metadata_pb2.GetModelMetadataRequest.FromString,
    },
    "ModelService": {
        "GetModelStatus": get_model_status_pb2.GetModelStatusRequest.FromString,
        "HandleReloadConfigRequest": model_management_pb2.ReloadConfigRequest.FromString,
    },
}


class PredictionService:
    def __init__(self, library: Library, metrics: Metrics | None):
        self.library = library
        self.metrics = metrics

    @reports_errors
    @is_counted
    async def Predict(self, request: KnownRequest | predict_pb2.PredictRequest) -> bytes:
        if isinstance(request, KnownRequest) or request.ByteSize() <= MAX_INLINE_BYTES:
            servable, arguments = self.read(request)
        else:
            servable, arguments = await asyncio.to_thread(self.read, request)
            if not (self.library.batching and servable.is_slow):  # for a quick graph it is a batch by itself
                return await asyncio.to_thread(self.predict, servable, arguments)
        if self.library.batching:
            return encode_response(servable, arguments[1], await servable.predict_batched(*arguments))
        if servable.is_slow:
            return await asyncio.to_thread(self.predict, servable, arguments)
        return self.predict(servable, arguments)

    def predict(self, servable: Servable, arguments: tuple) -> bytes:
        return encode_response(servable, arguments[1], servable.predict(*arguments))

    def read(self, request: KnownRequest | predict_pb2.PredictRequest) -> tuple[Servable, tuple]:
        """Return the requested servable and the arguments of its `predict`."""
        if isinstance(request, KnownRequest):
            spec = request.model_spec
            return find_servable(self.library, spec), (request.arrays, spec.signature_name or DEFAULT_SIGNATURE, ())
        require_model_spec(request)
        servable = find_servable(self.library, request.model_spec)
        signature_name = request.model_spec.signature_name or DEFAULT_SIGNATURE
        return servable, (read_tensors(request.inputs), signature_name, request.output_filter)

    @reports_errors
    async def GetModelMetadata(self, request) -> get_model_metadata_pb2.GetModelMetadataResponse:
        require_model_spec(request)
        if not request.metadata_field:
            raise ServingError("INVALID_ARGUMENT", "GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != SIGNATURE_FIELD:
                raise ServingError("INVALID_ARGUMENT", f"Metadata field {name} is not supported")
        return find_servable(self.library, request.model_spec).metadata()

    @reports_errors
    @is_counted
    async def Classify(self, request) -> classification_pb2.ClassificationResponse:
        return await self.run_examples(request, examples.classify, classification_pb2.ClassificationResponse)

    @reports_errors
    @is_counted
    async def Regress(self, request) -> regression_pb2.RegressionResponse:
        return await self.run_examples(request, examples.regress, regression_pb2.RegressionResponse)

    async def run_examples(self, request, run, response_class):
        require_model_spec(request)
        servable = find_servable(self.library, request.model_spec)
        signature_name = request.model_spec.signature_name or DEFAULT_SIGNATURE
        response = response_class(result=await asyncio.to_thread(run, servable, signature_name, request.input))
        response.model_spec.name = servable.name
        response.model_spec.version.value = servable.version
        response.model_spec.signature_name = signature_name
        return response

    @reports_errors
    async def MultiInference(self, request) -> inference_pb2.MultiInferenceResponse:
        find = functools.partial(find_servable, self.library)
        return await asyncio.to_thread(examples.multi_inference, find, request)


class ModelService:
    def __init__(self, library: Library):
        self.library = library

    @reports_errors
    async def GetModelStatus(self, request) -> get_model_status_pb2.GetModelStatusResponse:
        require_model_spec(request)
        return self.library.status(request.model_spec.name, *chosen_version(request.model_spec))

    @reports_errors
    async def HandleReloadConfigRequest(self, request) -> model_management_pb2.ReloadConfigResponse:
        """Serve the models of the request's config; the reply comes when everything is loaded."""
        response = model_management_pb2.ReloadConfigResponse()
        try:
            if not request.config.HasField("model_config_list"):
                raise ServingError("INVALID_ARGUMENT", "ServerCore expects model_config_list to be set")
            changes = await asyncio.to_thread(self.library.reload, list(request.config.model_config_list.config))
            for change in changes:
                print(f"local server: {change}", file=sys.stderr, flush=True)
        except ServingError as error:  # in the reply, not in the call's status, as TensorFlow Serving does
            response.status.error_code = grpc.StatusCode[error.code].value[0]
            response.status.error_message = error.message
        return response


async def start_server(
    library: Library, addresses: list[str], options: list[tuple[str, int | str]], metrics: Metrics | None
) -> grpc.aio.Server:
    """Start both services on each of `addresses`. RuntimeError if one is taken. `options` override OPTIONS."""
    server = grpc.aio.server(options=list({**dict(OPTIONS), **dict(options)}.items()))
    services = {"PredictionService": PredictionService(library, metrics), "ModelService": ModelService(library)}
    for name, service in services.items():
        # Not the generated handlers: they answer an unreadable request with Python's words. Predict returns bytes.
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                getattr(service, method), parses(read), lambda reply: reply.SerializeToString()
            )
            for method, read in READERS[name].items()
        }
        if name == "PredictionService":
            handlers["Predict"] = grpc.unary_unary_rpc_method_handler(service.Predict, parses(RequestReader().read))
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(f"tensorflow.serving.{name}", handlers)])
    for address in addresses:
        server.add_insecure_port(address)
    await server.start()
    return server
