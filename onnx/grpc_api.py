"""The Open Inference Protocol over gRPC: inference.GRPCInferenceService, with the answers and refusals of REST.

Of NVIDIA Triton's extensions repository index, statistics and the stream of requests are answered, the others refused
by name.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc_messages as messages
import numpy as np
from batching import Job, threads
from http_messages import Refusal
from models import INLINE_BYTES, Model
from open_inference import MANY_ROWS, check_names, check_output, make_job, refuse_parameters
from settings import Settings
from tensors import to_string

MAX_DETAILS = 500  # characters of a status: gRPC's clients refuse headers of more than 8 KB, %-encoded
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
UNSUPPORTED = {  # methods of Triton's extensions
    "ModelConfig": "model configurations are not supported: ask for the metadata",
    "RepositoryModelLoad": "loading is not supported: what lies in the model repository is served",
    "RepositoryModelUnload": "unloading is not supported: what lies in the model repository is served",
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
        self.described: dict[tuple[int, int], bytes] = {}  # replies of rows without their values, by shape

    def read(self, request: Any) -> Job:
        """Return what a ModelInferRequest wants computed; Refusal where it is not one for this model."""
        if self.model.is_rows and (rows := self.find_rows(request)) is not None:
            return Job(rows, len(rows), len(rows) * self.model.features, True, (request.id, self.all_names))
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
                raise Refusal(400, f"{place}: contents beside raw_input_contents; give one of them")
            else:
                feeds[tensor.name] = declared.from_bytes(raw[number], shape, count, place)
        return make_job(feeds, self.model, (request.id, wanted or self.all_names))

    def find_rows(self, request: Any) -> list[list[float]] | None:
        """Return the rows of a usual request to a model of rows, None where anything is unusual about it."""
        inputs, raw, width = request.inputs, request.raw_input_contents, self.model.features
        if len(inputs) != 1 or len(raw) != 1 or request.outputs:
            return None
        tensor = inputs[0]
        shape = tensor.shape
        if tensor.datatype != "FP32" or len(shape) != 2 or tensor.parameters or tensor.HasField("contents"):
            return None
        count = shape[0]
        if tensor.name != self.model.input_name or shape[1] != width or not 0 < count <= MANY_ROWS:
            return None
        if len(raw[0]) != 4 * count * width:
            return None
        flat = memoryview(raw[0]).cast("f").tolist()
        return [flat] if count == 1 else [flat[at : at + width] for at in range(0, len(flat), width)]

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
            if shape not in self.described:  # protobuf takes messages that follow each other for one
                described = messages.ModelInferResponse(model_name=model.name, model_version=model.version)
                described.outputs.add(name=self.all_names[0], datatype="FP32", shape=shape)
                self.described[shape] = described.SerializeToString()
            flat = answer[0] if shape[0] == 1 else [value for row in answer for value in row]
            values = struct.pack(f"<{len(flat)}f", *flat)
            reply = messages.ModelInferResponse(id=request_id, raw_output_contents=[values])
            return self.described[shape] + reply.SerializeToString()
        reply = messages.ModelInferResponse(model_name=model.name, model_version=model.version, id=request_id)
        by_name = dict(zip(self.all_names, answer, strict=True))
        for name in names:
            tensor, array = model.outputs[name], np.asarray(by_name[name])
            reply.outputs.add(name=name, datatype=tensor.datatype.name, shape=list(array.shape))
            reply.raw_output_contents.append(tensor.to_bytes(array))
        return reply


class Servicer:
    """The methods of the service; `serving` knows the models and answers for REST, too.

    A method whose name begins with a capital is one of the protocol; it returns the fields of its reply.
    """

    def __init__(self, serving: Any):
        self.serving = serving

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

    async def ModelInfer(self, request: Any) -> Any:
        return await self.infer(request)

    async def stream(self, requests: AsyncIterator, _context: grpc.aio.ServicerContext) -> AsyncIterator:
        """ModelStreamInfer: the same for one request after the other; an error is an answer, and not the end."""
        async for request in requests:
            try:
                reply = await self.infer(request)
            except Refusal as refusal:
                nothing = messages.ModelInferResponse(id=request.id)
                yield messages.ModelStreamInferResponse(error_message=str(refusal), infer_response=nothing)
            else:
                if isinstance(reply, bytes):
                    reply = messages.ModelInferResponse.FromString(reply)
                yield messages.ModelStreamInferResponse(infer_response=reply)

    async def infer(self, request: Any) -> Any:
        """Return the reply to one ModelInferRequest; Refusal where there is none."""
        model, codec = self.serving.find_messages(request.model_name, request.model_version)
        with self.serving.counting(model):
            if request.ByteSize() > INLINE_BYTES:
                return await asyncio.get_running_loop().run_in_executor(threads, model.answer_apart, codec, request)
            job = codec.read(request)
            job.asker, job.done = asyncio.get_running_loop().create_future(), _settle
            model.batcher.add(job)
            return codec.write(job.wanted, await job.asker)


def _settle(job: Job, answer: Any) -> None:
    if job.asker.done():
        return  # cancelled: its client has gone
    if isinstance(answer, Exception):
        job.asker.set_exception(answer)
    else:
        job.asker.set_result(answer)


def make_handler(method: Callable) -> Callable:
    """Return the method as gRPC calls it: a Refusal becomes a status."""
    reply_class = messages.CLASSES[f"{method.__name__}Response"]

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            reply = await method(request)
        except Refusal as refusal:
            await context.abort(CODES.get(refusal.status, grpc.StatusCode.INTERNAL), str(refusal)[:MAX_DETAILS])
        return reply_class(**reply) if isinstance(reply, dict) else reply

    return call


def refuse(reason: str) -> Callable:
    """Return what gRPC calls for a method that is not supported."""

    async def call(_request: bytes, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, reason)

    return call


def serialize(reply: Any) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


def make_handlers(serving: Any) -> grpc.GenericRpcHandler:
    """Return what answers each method of the service."""
    servicer = Servicer(serving)
    handlers = {name: grpc.unary_unary_rpc_method_handler(refuse(reason)) for name, reason in UNSUPPORTED.items()}
    for name in dir(servicer):
        if name[0].isupper():
            read = messages.CLASSES[f"{name}Request"].FromString
            handlers[name] = grpc.unary_unary_rpc_method_handler(make_handler(getattr(servicer, name)), read, serialize)
    read = messages.ModelInferRequest.FromString
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(servicer.stream, read, serialize)
    return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)


async def start(
    serving: Any, host: str, port: int, shares_port: bool, settings: Settings
) -> tuple[grpc.aio.Server, int]:
    """Return a server that answers at the address, 0 for any port, and its port; OSError where it cannot."""
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
