"""POST .../infer of the Open Inference Protocol: JSON with binary tensors to arrays, and arrays to JSON with tensors.

github.com/kserve/open-inference-protocol (inference_rest.md), and its binary tensor extension as NVIDIA Triton
documents it. A request is decoded twice at most: first by a decoder for models of rows, which accepts almost every
request, and if that finds anything unusual, by the general decoder, which serves it or reports the error.
"""

import itertools
import struct
from collections.abc import Container
from typing import Any

import msgspec
import numpy as np
from batching import Job
from http_messages import JSON, Refusal, Request
from models import Model
from tensors import NO_JSON_NUMBER, Float32, decode_json, encode

OCTETS = b"application/octet-stream"
LENGTH = b"inference-header-content-length"
MANY_KNOWN, MAX_KNOWN_BYTES = 256, 2048
MANY_ROWS = 64  # with more than these, arrays are cheaper than lists of rows
REFUSED = {  # parameters for features that this server lacks: ignoring them would give a wrong answer
    "shared_memory_region": "shared memory is not supported: send the tensor's data",
    "classification": "the classification extension is not supported: ask for the output itself",
}


class Parameters(msgspec.Struct):
    """The parameters that this server uses; others are ignored, as the protocol allows."""

    binary_data_size: int | None = None  # of an input: its bytes behind the JSON
    binary_data: bool | None = None  # of an output: send it behind the JSON
    binary_data_output: bool = False  # of the request: the same for all its outputs
    shared_memory_region: Any = None
    classification: Any = None

    def __contains__(self, name: str) -> bool:
        return getattr(self, name) is not None


class Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()  # flat or nested: decoded once the shape is known
    parameters: Parameters | None = None


class Output(msgspec.Struct):
    name: str
    parameters: Parameters | None = None


class InferRequest(msgspec.Struct):
    inputs: list[Input] = []
    outputs: list[Output] | None = None
    id: str | None = None
    parameters: Parameters | None = None


decode_request = msgspec.json.Decoder(InferRequest).decode


class Wanted:
    """The outputs that a request wants, in order, each as JSON or bytes."""

    __slots__ = ("binary", "names", "request_id", "starts")

    def __init__(self, names: list[str], binary: list[bool], request_id: str | None):
        self.names = names
        self.binary = binary
        self.request_id = request_id
        self.starts: dict[int, tuple[bytes, bytes]] = {}  # JSON before the bytes of this many rows, and its line


class InferCodec:
    """Reads and writes the requests to one model."""

    def __init__(self, model: Model):
        self.model = model
        self.head = f'"model_name":{_json(model.name)},"model_version":{_json(model.version)},"outputs":['.encode()
        self.start = b"{" + self.head  # of a reply without an id
        self.all_names = list(model.outputs)
        self.as_json = Wanted(self.all_names, [False] * len(self.all_names), None)
        self.as_bytes = Wanted(self.all_names, [True] * len(self.all_names), None)
        # Clients repeat the JSON before their bytes, like their heads: maps it to the number of rows and the outputs.
        self.known: dict[bytes, tuple[int, Wanted]] = {}
        if model.is_rows:
            self.row_bytes = 4 * model.features
            row = list[Float32]  # msgspec 0.22.0 crashes on a union of a number with bounds and a tuple of fixed length
            tensor = msgspec.defstruct(
                "RowsInput",
                [
                    ("name", str), ("shape", list[int]), ("datatype", str),
                    ("data", list[Float32 | row] | None, None), ("parameters", Parameters | None, None),
                ],
            )  # fmt: skip
            fields: list = [("inputs", list[tensor]), ("outputs", list[Output] | None, None)]
            fields += [("id", str | None, None), ("parameters", Parameters | None, None)]
            self.decode_rows = msgspec.json.Decoder(msgspec.defstruct("RowsRequest", fields)).decode
            self.output_name = self.all_names[0]
            self.row_head = (f'{{"name":{_json(self.output_name)},"datatype":"FP32","shape":[').encode()

    # Reading

    def read(self, request: Request) -> Job:
        """Return the job of a request; Refusal if it does not fit this model."""
        body, tail = request.body, b""
        length = request.head.headers.get(LENGTH)
        if length is not None:
            body, tail = split_body(body, length)
            count, wanted = self.known.get(body, (0, self.as_bytes))
            if count and len(tail) == count * self.row_bytes:
                return self.make_rows_job(self.split_rows(memoryview(tail).cast("f").tolist(), count), wanted)
        if self.model.is_rows:
            try:
                asked = self.decode_rows(body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass  # the general decoder reports the error
            else:
                rows = self.find_rows(asked, tail)
                if rows is not None:
                    wanted = self.find_wanted(asked)
                    if tail and not asked.id and len(body) <= MAX_KNOWN_BYTES:  # an id differs each time
                        if len(self.known) >= MANY_KNOWN:
                            self.known.clear()
                        self.known[body] = len(rows), wanted
                    return self.make_rows_job(rows, wanted)
        return self.read_any(body, tail)

    def make_rows_job(self, rows: list[list[float]], wanted: Wanted) -> Job:
        return Job(rows, len(rows), len(rows) * self.model.features, True, wanted)

    def split_rows(self, flat: list[float], count: int) -> list[list[float]]:
        width = self.model.features
        return [flat] if count == 1 else [flat[start : start + width] for start in range(0, len(flat), width)]

    def find_rows(self, asked: Any, tail: bytes | memoryview) -> list | None:
        """Return the rows of a usual request, None if anything about it is unusual."""
        if len(asked.inputs) != 1:
            return None
        tensor, features = asked.inputs[0], self.model.features
        shape = tensor.shape
        if tensor.name != self.model.input_name or tensor.datatype != "FP32" or len(shape) != 2:
            return None
        count = shape[0]
        if shape[1] != features or not 0 < count <= MANY_ROWS:
            return None
        data, parameters = tensor.data, tensor.parameters
        if parameters is not None and parameters.shared_memory_region is not None:
            return None
        if parameters is not None and parameters.binary_data_size is not None:
            if data is not None or not len(tail) == parameters.binary_data_size == count * self.row_bytes:
                return None
            data = memoryview(tail).cast("f").tolist()
        elif data is None or len(tail):
            return None
        if len(data) == count and type(data[0]) is list:
            return data if all(type(row) is list and len(row) == features for row in data) else None
        if len(data) != count * features or list in map(type, data):
            return None
        return self.split_rows(data, count)

    def read_any(self, body: bytes, tail: bytes | memoryview) -> Job:
        """Read a request to any model."""
        asked: InferRequest = decode_json(decode_request, body)
        feeds, position = {}, 0
        check_names([tensor.name for tensor in asked.inputs], self.model)
        for number, tensor in enumerate(asked.inputs):
            place = f"inputs[{number}]"
            declared = self.model.inputs[tensor.name]
            count = declared.check(place, tensor.datatype, tensor.shape)
            refuse_parameters(place, tensor.parameters)
            size = None if tensor.parameters is None else tensor.parameters.binary_data_size
            if size is not None:
                if bytes(tensor.data):
                    raise Refusal(400, f"{place}: both data and the parameter binary_data_size are given")
                if not 0 <= size <= len(tail) - position:
                    left = len(tail) - position
                    raise Refusal(400, f"{place}: binary_data_size is {size}, but {left} bytes are left for it")
                part = tail[position : position + size]
                feeds[tensor.name] = declared.from_bytes(part, tensor.shape, count, place)
                position += size
            elif not bytes(tensor.data):
                raise Refusal(400, f"{place}: neither data nor the parameter binary_data_size is given")
            else:
                try:
                    feeds[tensor.name] = declared.from_json(tensor.data, tensor.shape, count, place)
                except Refusal as refusal:
                    raise Refusal(400, self.model.name_place(str(refusal))) from None
        if position != len(tail):
            raise Refusal(400, f"{len(tail) - position} bytes follow the JSON that no input's binary_data_size counts")
        return make_job(feeds, self.model, self.find_wanted(asked))

    def find_wanted(self, asked: Any) -> Wanted:
        """Return the outputs to send; Refusal if one is not an output of this model."""
        parameters = asked.parameters
        usual = False if parameters is None else parameters.binary_data_output
        if not asked.outputs:
            wanted = self.as_bytes if usual else self.as_json
            return Wanted(wanted.names, wanted.binary, asked.id) if asked.id else wanted
        names, binary = [], []
        for number, output in enumerate(asked.outputs):
            check_output(number, output.name, names, self.model)
            refuse_parameters(f"outputs[{number}]", output.parameters)
            chosen = None if output.parameters is None else output.parameters.binary_data
            names.append(output.name)
            binary.append(usual if chosen is None else chosen)
        return Wanted(names, binary, asked.id)

    # Writing

    def write(self, wanted: Wanted, answer: list) -> tuple[bytes, bytes, bytes]:
        """Return body, content type and further lines of the reply's head."""
        start = b'{"id":%b,%b' % (encode(wanted.request_id), self.head) if wanted.request_id else self.start
        if type(answer[0]) is not list:
            described, tail = self.write_arrays(wanted, answer)
            body = b"%b%b]}" % (start, described)
            if not any(wanted.binary):
                return body, JSON, b""
            return body + tail, OCTETS, name_length(body)
        flat = answer[0] if len(answer) == 1 else list(itertools.chain.from_iterable(answer))
        if not wanted.binary[0]:
            data = encode(flat)
            if b"null" in data:
                raise Refusal(400, not_finite(answer))
            return b'%b%b%d,%d],"data":%b}]}' % (start, self.row_head, len(answer), len(answer[0]), data), JSON, b""
        if len(answer) not in wanted.starts:
            shape, size = (len(answer), len(answer[0])), 4 * len(flat)
            body = b'%b%b%d,%d],"parameters":{"binary_data_size":%d}}]}' % (start, self.row_head, *shape, size)
            wanted.starts[len(answer)] = body, name_length(body)
        body, line = wanted.starts[len(answer)]
        return body + struct.pack(f"<{len(flat)}f", *flat), OCTETS, line

    def write_arrays(self, wanted: Wanted, answer: list[np.ndarray]) -> tuple[bytes, bytes]:
        """Return the JSON of the wanted outputs, and the bytes of those that are not in the JSON."""
        by_name = dict(zip(self.all_names, answer, strict=True))
        described, tail = [], b""
        for name, as_bytes in zip(wanted.names, wanted.binary, strict=True):
            tensor, array = self.model.outputs[name], np.asarray(by_name[name])
            words = {"name": name, "datatype": tensor.datatype.name, "shape": list(array.shape)}
            if as_bytes:
                data = tensor.to_bytes(array)
                tail += data
                described.append(encode(words | {"parameters": {"binary_data_size": len(data)}}))
            else:
                described.append(encode(words | {"data": msgspec.Raw(tensor.to_json(array))}))
        return b",".join(described), tail


def _json(text: str) -> str:
    return encode(text).decode()


def name_length(json: bytes) -> bytes:
    """Return the line of a reply's head with the length of its JSON, after which its bytes begin."""
    return b"%b: %d\r\n" % (LENGTH, len(json))


def not_finite(rows: list[list[float]]) -> str:
    """Return the error message for an answer to one of `rows` that JSON cannot carry."""
    row = next(number for number, values in enumerate(rows) if not np.isfinite(values).all())
    return f"row {row}: the model has no finite answer to these features: they are too large; {NO_JSON_NUMBER}"


def split_body(body: bytes, length: bytes) -> tuple[bytes, memoryview]:
    """Return JSON and tensors of a body; Refusal if the header Inference-Header-Content-Length is wrong."""
    if not length.isdigit() or len(length) > 12:
        raise Refusal(400, f"Inference-Header-Content-Length is {length.decode('latin-1')!r}, expected a number")
    end = int(length)
    if end > len(body):
        raise Refusal(400, f"Inference-Header-Content-Length is {end}, but the body has {len(body)} bytes")
    return body[:end], memoryview(body)[end:]


def check_names(names: list[str], model: Model) -> None:
    """Refuse inputs that are not exactly the model's."""
    if sorted(names) != sorted(model.inputs):
        expected = ", ".join(map(repr, model.inputs)) or "none"
        raise Refusal(400, f"inputs: expected exactly {expected}, got {', '.join(map(repr, names)) or 'none'}")


def check_output(number: int, name: str, others: list[str], model: Model) -> None:
    """Refuse an output that the model does not have, or that is named twice."""
    if name not in model.outputs:
        raise Refusal(400, f"outputs[{number}]: {name!r} is unknown; there is {', '.join(map(repr, model.outputs))}")
    if name in others:
        raise Refusal(400, f"outputs[{number}]: {name!r} is named twice")


def refuse_parameters(place: str, parameters: Container[str] | None) -> None:
    """Refuse a parameter whose request would be answered wrongly if it were ignored."""
    for name, reason in REFUSED.items() if parameters else ():
        if name in parameters:
            raise Refusal(400, f"{place}: {reason}")


def make_job(feeds: dict[str, np.ndarray], model: Model, wanted: Any) -> Job:
    """Return the job of any model's inputs; it may share a run with jobs whose arrays differ only in rows."""
    size = sum(array.size for array in feeds.values())
    rows = {array.shape[:1] for array in feeds.values()}
    if not model.batcher.max_rows or len(rows) != 1 or rows <= {(0,), ()}:
        return Job(feeds, 1, size, None, wanted)
    (count,) = rows.pop()
    return Job(feeds, count, size, tuple((name, feeds[name].shape[1:]) for name in model.inputs), wanted)
