"""The Open Inference Protocol over gRPC: inference.GRPCInferenceService, with the same answers and refusals as REST.

Of NVIDIA Triton's extensions, repository index, statistics and the stream of requests are supported; the others are
refused by name.
"""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc_messages as messages
import numpy as np
from batching import Job, threads
from google.protobuf.message import DecodeError
from http_messages import Refusal
from models import INLINE_BYTES, Model
from open_inference import MANY_ROWS, check_names, check_output, make_job, refuse_parameters
from settings import Settings
from tensors import to_string

MANY_KNOWN, MAX_KNOWN_BYTES = 256, 2048  # messages that are read without parsing
MAX_DETAILS = 500  # characters of a status: gRPC clients refuse headers above 8 KB, %-encoded
RAW_TAG = 7 << 3 | 2  # of raw_input_contents on the wire
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
UNSUPPORTED = {  # methods of Triton's extensions
    "ModelConfig": "model configurations are not supported: ask for the metadata",
    "RepositoryModelLoad": "loading is not supported: every model in the repository is served",
    "RepositoryModelUnload": "unloading is not supported: every model in the repository is served",
    "SystemSharedMemoryStatus": "shared memory is not supported",
    "SystemSharedMemoryRegister": "shared memory is not supported",
    "SystemSharedMemoryUnregister": "shared memory is not supported",
    "CudaSharedMemoryStatus": "shared memory is not supported",
    "CudaSharedMemoryRegister": "shared memory is not supported",
    "CudaSharedMemoryUnregister": "shared memory is not supported",
    "TraceSetting": "tracing is not supported",
    "LogSettings": "log settings are not supported",
}


class InferCodec:
    """Reads and writes the messages to one model."""

    def __init__(self, model: Model):
        self.model = model
        self.all_names = list(model.outputs)
        self.starts: dict[tuple[int, int], bytes] = {}  # a reply up to its values, by shape

    def read(self, request: Any) -> Job:
        """Return the job of a ModelInferRequest; Refusal if it does not fit this model."""
        if self.model.is_rows and self.is_usual(request):
            return self.read_rows(request.raw_input_contents[0], request.id)
        wanted: list[str] = []
        for number, output in enumerate(request.outputs):
            check_output(number, output.name, wanted, self.model)
            refuse_parameters(f"outputs[{number}]", output.parameters)
            wanted.append(output.name)
        check_names([tensor.name for tensor in request.inputs], self.model)
        raw = request.raw_input_contents
        if raw and len(raw) != len(request.inputs):
            for number, tensor in enumerate(request.inputs):  # in shared memory, perhaps
                refuse_parameters(f"inputs[{number}]", tensor.parameters)
            raise Refusal(400, f"raw_input_contents: {len(raw)} for {len(request.inputs)} inputs; give all or none")
        feeds: Any = {}
        for number, tensor in enumerate(request.inputs):
            place = f"inputs[{number}]"
            declared = self.model.inputs[tensor.name]
            shape = list(tensor.shape)
            count = declared.check(place, tensor.datatype, shape)
            refuse_parameters(place, tensor.parameters)
            if not raw:
                feeds[tensor.name] = self.read_contents(tensor, declared, shape, count, place)
            elif tensor.HasField("contents"):
                raise Refusal(400, f"{place}: both contents and raw_input_contents; give one of them")
            else:
                feeds[tensor.name] = declared.from_bytes(raw[number], shape, count, place)
        return make_job(feeds, self.model, (request.id, wanted or self.all_names))

    def is_usual(self, request: Any) -> bool:
        """Return whether a request to a model of rows holds a few rows in bytes, and nothing else."""
        inputs, raw, width = request.inputs, request.raw_input_contents, self.model.features
        if len(inputs) != 1 or len(raw) != 1 or request.outputs:
            return False
        tensor = inputs[0]
        shape = tensor.shape
        if tensor.datatype != "FP32" or len(shape) != 2 or tensor.parameters or tensor.HasField("contents"):
            return False
        if tensor.name != self.model.input_name or shape[1] != width or not 0 < shape[0] <= MANY_ROWS:
            return False
        return len(raw[0]) == 4 * shape[0] * width

    def read_rows(self, values: bytes, request_id: str) -> Job:
        """Return the job of a usual request, from its bytes."""
        flat, width = memoryview(values).cast("f").tolist(), self.model.features
        rows = [flat] if len(flat) == width else [flat[at : at + width] for at in range(0, len(flat), width)]
        return Job(rows, len(rows), len(flat), True, (request_id, self.all_names))

    def read_contents(self, tensor: Any, declared: Any, shape: list[int], count: int, place: str) -> np.ndarray:
        """Return the array in the typed fields of a tensor."""
        field = declared.datatype.contents
        if not field:
            raise Refusal(400, f"{place}: {declared.datatype.name} comes in raw_input_contents only")
        others = [other.name for other, _ in tensor.contents.ListFields() if other.name != field]
        if others:
            raise Refusal(400, f"{place}: {declared.datatype.name} stands in {field}, not in {', '.join(others)}")
        values = getattr(tensor.contents, field)
        if field == "bytes_contents":
            values = [to_string(word, place) for word in values]
        return declared.from_values(list(values), shape, count, place)

    def write(self, wanted: tuple[str, list[str]], answer: list) -> Any:
        """Return the reply or its bytes: tensors in raw_output_contents, as Triton sends them."""
        model, (request_id, names) = self.model, wanted
        if model.is_rows and type(answer[0]) is list:
            shape = len(answer), len(answer[0])
            flat = answer[0] if shape[0] == 1 else [value for row in answer for value in row]
            if shape not in self.starts:
                described = messages.ModelInferResponse(model_name=model.name, model_version=model.version)
                described.outputs.add(name=self.all_names[0], datatype="FP32", shape=shape)
                described.raw_output_contents.append(bytes(4 * len(flat)))
                self.starts[shape] = described.SerializeToString()[: -4 * len(flat)]
            reply = self.starts[shape] + struct.pack(f"<{len(flat)}f", *flat)
            # Protobuf reads concatenated messages as one.
            return reply + messages.ModelInferResponse(id=request_id).SerializeToString() if request_id else reply
        reply = messages.ModelInferResponse(model_name=model.name, model_version=model.version, id=request_id)
        by_name = dict(zip(self.all_names, answer, strict=True))
        for name in names:
            tensor, array = model.outputs[name], np.asarray(by_name[name])
            reply.outputs.add(name=name, datatype=tensor.datatype.name, shape=list(array.shape))
            reply.raw_output_contents.append(tensor.to_bytes(array))
        return reply


class Servicer:
    """The methods of the service; `serving` holds the models, as for REST.

    A method whose name begins with a capital belongs to the protocol; it returns the fields of its reply.
    """

    def __init__(self, serving: Any):
        self.serving = serving
        self.served = serving.messages  # the models for which `known` is valid
        self.known: dict[bytes, tuple[Model, InferCodec, int]] = {}  # by a message without the values at its end
        self.sizes: dict[int, int] = {}  # size of those values, by the message's length

    async def ServerLive(self, _request: Any) -> dict:
        return {"live": True}

    async def ServerReady(self, _request: Any) -> dict:
        return {"ready": self.serving.is_ready()}

    async def ModelReady(self, request: Any) -> dict:
        try:
            self.serving.find_model(request.name, request.version)
        except Refusal:
            return {"ready": False}
        return {"ready": True}

    async def ServerMetadata(self, _request: Any) -> dict:
        return self.serving.describe()

    async def ModelMetadata(self, request: Any) -> dict:
        return self.serving.describe_model(request.name, request.version)

    async def ModelStatistics(self, request: Any) -> dict:
        return self.serving.statistics(request.name, request.version)

    async def RepositoryIndex(self, request: Any) -> dict:
        return {"models": self.serving.index(request.ready)}

    async def stream(self, requests: AsyncIterator[bytes], _context: grpc.aio.ServicerContext) -> AsyncIterator:
        """ModelStreamInfer: `infer` for one request after another; an error is a reply and does not end the stream."""
        async for data in requests:
            try:
                reply = await self.infer(data)
            except Refusal as refusal:
                nothing = messages.ModelInferResponse(id=read_id(data))
                yield messages.ModelStreamInferResponse(error_message=str(refusal), infer_response=nothing)
            else:
                if isinstance(reply, bytes):
                    reply = messages.ModelInferResponse.FromString(reply)
                yield messages.ModelStreamInferResponse(infer_response=reply)

    async def infer(self, data: bytes, _context: grpc.aio.ServicerContext | None = None) -> Any:
        """ModelInfer: return the reply to a request, both in bytes; Refusal if there is none."""
        started_s, status = time.perf_counter(), 500
        known = self.find_known(data)
        if known is None:
            request = parse(data)
            model, codec = self.serving.find_messages(request.model_name, request.model_version)
        else:
            model, codec, size = known
        try:
            if known is not None:
                job = codec.read_rows(data[-size:], "")
                reply = codec.write(job.wanted, await compute(job, model))
            elif len(data) > INLINE_BYTES:
                loop = asyncio.get_running_loop()
                reply = await loop.run_in_executor(threads, model.answer_apart, codec, request)
            else:
                job = codec.read(request)
                reply = codec.write(job.wanted, await compute(job, model))
                self.remember(data, request, model, codec)
            status = 200
        except Refusal as refusal:
            status = refusal.status
            raise
        finally:
            self.serving.observe_model(model, status, time.perf_counter() - started_s)
        return reply

    def find_known(self, data: bytes) -> tuple[Model, InferCodec, int] | None:
        """Return model, codec and size of the values if only its values differ from an earlier request's."""
        if self.served is not self.serving.messages:  # the served models have changed
            self.known.clear()
            self.served = self.serving.messages
        size = self.sizes.get(len(data), 1)
        known = self.known.get(data[:-size])
        return known if known is not None and known[2] == size else None

    def remember(self, data: bytes, request: Any, model: Model, codec: InferCodec) -> None:
        """Let the next request that differs only in its values skip parsing: clients repeat the rest byte for byte."""
        if not model.is_rows or request.id or len(data) > MAX_KNOWN_BYTES or not codec.is_usual(request):
            return
        if self.serving.messages.get((request.model_name, request.model_version)) != (model, codec):
            return  # another model is served by now
        size = len(request.raw_input_contents[0])
        usual = messages.ModelInferRequest(
            model_name=request.model_name, model_version=request.model_version, inputs=request.inputs
        )
        if size > 127 or data[:-size] != usual.SerializeToString() + bytes([RAW_TAG, size]):
            return  # many values, or values elsewhere
        if len(self.known) >= MANY_KNOWN:
            self.known.clear()
            self.sizes.clear()
        self.known[data[:-size]] = model, codec, size
        self.sizes[len(data)] = size


async def compute(job: Job, model: Model) -> Any:
    """Return the answer to a job; raise its error."""
    given: list = []  # the answer; until it arrives, a future if it is not immediate
    job.asker, job.done = given, _settle
    model.batcher.add(job)
    if not given:
        given.append(asyncio.get_running_loop().create_future())
        return await given[0]
    if isinstance(given[0], Exception):
        raise given[0]
    return given[0]


def _settle(job: Job, answer: Any) -> None:
    given = job.asker
    if not given:
        given.append(answer)
    elif given[0].done():
        pass  # cancelled: its client has gone
    elif isinstance(answer, Exception):
        given[0].set_exception(answer)
    else:
        given[0].set_result(answer)


def parse(data: bytes) -> Any:
    """Return the ModelInferRequest in `data`; Refusal if it is not one."""
    try:
        return messages.ModelInferRequest.FromString(data)
    except DecodeError:
        raise Refusal(400, "the message is no ModelInferRequest") from None


def read_id(data: bytes) -> str:
    """Return the id of a request, "" if it cannot be read."""
    try:
        return str(parse(data).id)
    except Refusal:
        return ""


def make_handler(method: Callable) -> Callable:
    """Return the method in the form that gRPC calls: a Refusal becomes a status."""

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(request)
        except Refusal as refusal:
            await context.abort(CODES.get(refusal.status, grpc.StatusCode.INTERNAL), str(refusal)[:MAX_DETAILS])

    return call


def refuse(reason: str) -> Callable:
    """Return a handler that refuses a method that is not supported."""

    async def call(_request: bytes, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, reason)

    return call


def serialize(reply: Any) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


def make_handlers(serving: Any) -> grpc.GenericRpcHandler:
    """Return the handler of each method of the service."""
    servicer = Servicer(serving)
    handlers = {name: grpc.unary_unary_rpc_method_handler(refuse(reason)) for name, reason in UNSUPPORTED.items()}
    for name in dir(servicer):
        if name[0].isupper():
            read, reply_class = messages.CLASSES[f"{name}Request"].FromString, messages.CLASSES[f"{name}Response"]
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                make_handler(getattr(servicer, name)), read, lambda fields, make=reply_class: serialize(make(**fields))
            )
    handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(make_handler(servicer.infer), None, serialize)
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(servicer.stream, None, serialize)
    return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)


async def start(
    serving: Any, host: str, port: int, shares_port: bool, settings: Settings
) -> tuple[grpc.aio.Server, int]:
    """Return a server that listens at the address (port 0: any) and its port; OSError if it cannot."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:  # gRPC's own error is a page long
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares_port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind((host.strip("[]"), port))
    options = [
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_send_message_length", -1),
    ]
    server = grpc.aio.server(handlers=[make_handlers(serving)], options=options)
    port = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    return server, port
