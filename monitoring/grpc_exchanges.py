"""Read the rows of a gRPC request and the probabilities of its reply, as exchanges.py does over REST.

    rows = read_rows(path, body)                     # (n, 5)
    probabilities = read_probabilities(path, body)   # (n, 2)

`path` is "/package.Service/Method"; `body` is HTTP/2's payload, five bytes of framing and the message. Supported are
TensorFlow Serving's Predict, the Open Inference Protocol's ModelInfer and TorchServe's Predictions. Only the fields
below are needed, so their numbers suffice (protobuf.dev/programming-guides/encoding), without generated code or a
package. Both raise Unreadable.
"""

import struct
import zlib
from collections import defaultdict
from itertools import chain

from exchanges import Rows, Unreadable, check_table, choose_probabilities, fold, parse

PREDICT = "/tensorflow.serving.PredictionService/Predict"
INFER = "/inference.GRPCInferenceService/ModelInfer"
PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
LONGEST_VARINT = 10  # bytes
FLOATS = {1: "f", 2: "d"}  # TensorFlow's DT_FLOAT and DT_DOUBLE
# Whose requests have no end: they are not read.
STREAMS = (
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/org.pytorch.serve.grpc.inference.InferenceAPIsService/StreamPredictions",
    "/org.pytorch.serve.grpc.inference.InferenceAPIsService/StreamPredictions2",
)
MOST_DECOMPRESSED = 100_000  # bytes
MOST_NUMBERS = 100_000  # that a few bytes may stand for
DATATYPES = {"FP32": "f", "FP64": "d"}
Fields = dict[int, list[bytes]]


def read_rows(path: str, body: bytes) -> Rows:
    """Return the rows of a request, (n, k); raise Unreadable if there are none."""
    message = read_fields(unframe(body))
    if path == PREDICT:
        return check_table(find_only(read_tensors(message[2]), "inputs"))
    if path == INFER:
        return check_table(find_only(read_inference(message[5], message[7]), "inputs"))
    if path == PREDICTIONS:
        fields = {entry[1][-1]: entry[2][-1] for entry in map(read_fields, message[3]) if entry[1] and entry[2]}
        if b"data" not in fields:
            raise Unreadable("no input 'data'")
        value = parse(fields[b"data"])
        return check_table(value if isinstance(value, list) and value and isinstance(value[0], list) else [value])
    raise Unreadable("the path predicts nothing")


def read_probabilities(path: str, body: bytes) -> Rows:
    """Return the probabilities of a reply, (n, 2); raise Unreadable if there are none."""
    message = read_fields(unframe(body))
    if path == PREDICT:
        return choose_probabilities(read_tensors(message[1]))
    if path == INFER:
        return choose_probabilities(read_inference(message[5], message[6]))
    if path == PREDICTIONS:
        return choose_probabilities([parse(b"".join(message[1]))])
    raise Unreadable("the path predicts nothing")


def unframe(body: bytes) -> bytes:
    """Return the one message of a body, which may be compressed (grpc/doc/PROTOCOL-HTTP2.md)."""
    if len(body) < 5 or int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise Unreadable("the body is not one gRPC message")
    if not body[0]:
        return body[5:]
    decoder = zlib.decompressobj(wbits=47)  # gzip or deflate, by the first bytes
    try:
        message = decoder.decompress(body[5:], MOST_DECOMPRESSED)
    except zlib.error:
        raise Unreadable("the message cannot be decompressed") from None
    if not decoder.eof:
        raise Unreadable("the compressed message is cut off or too large")
    return message


def read_fields(message: bytes) -> Fields:
    """Return a message's fields by number, in order; numbers as eight bytes, little-endian."""
    fields: Fields = defaultdict(list)
    position = 0
    try:
        while position < len(message):
            tag, position = read_varint(message, position)
            kind = tag & 7
            if kind == VARINT:
                number, position = read_varint(message, position)
                value = (number & (1 << 64) - 1).to_bytes(8, "little")
            else:
                if kind == BYTES:
                    length, position = read_varint(message, position)
                else:
                    length = {FIXED64: 8, FIXED32: 4}[kind]
                value = message[position : position + length]
                position += length
                if position > len(message):
                    raise Unreadable("the message is cut off")
            fields[tag >> 3].append(value)
    except KeyError:
        raise Unreadable("the message is no protobuf") from None
    return fields


def read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Return a number of variable length, and the position after it."""
    value = shift = 0
    for byte in message[position : position + LONGEST_VARINT]:
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
    raise Unreadable("the message is no protobuf")


def read_tensors(entries: list[bytes]) -> list[Rows]:
    """Return the matrices among TensorFlow's named tensors (tensor.proto)."""
    found = []
    for tensor in (read_fields(entry[2][-1]) for entry in map(read_fields, entries) if entry[2]):
        letter = FLOATS.get(int.from_bytes((tensor[1] or [b""])[-1], "little"))
        sizes = [
            int.from_bytes((read_fields(size)[1] or [b""])[-1], "little")
            for shape in tensor[2]
            for size in read_fields(shape)[2]
        ]
        if letter is None or len(sizes) != 2:
            continue
        if tensor[4]:
            values = unpack(letter, b"".join(tensor[4]))
        else:  # number by number; if there are fewer, the last one is repeated
            values = unpack(letter, b"".join(tensor[5 if letter == "f" else 6]))
            values += values[-1:] * (min(sizes[0] * sizes[1], MOST_NUMBERS) - len(values))
        found.append(fold(values, *sizes))
    return found


def read_inference(described: list[bytes], raw: list[bytes]) -> list[Rows]:
    """Return the matrices among the Open Inference Protocol's tensors, whose values are in them or in `raw`."""
    found = []
    if raw and len(raw) != len(described):
        raise Unreadable("not as many raw contents as tensors")
    for number, tensor in enumerate(map(read_fields, described)):
        letter = DATATYPES.get((tensor[2] or [b""])[-1].decode("latin-1"))
        sizes = list(chain.from_iterable(map(read_packed, tensor[3])))
        if letter is None or len(sizes) != 2:
            continue
        inside = [read_fields(contents) for contents in tensor[5]]
        content = raw[number] if raw else b"".join(chain.from_iterable(c[6 if letter == "f" else 7] for c in inside))
        found.append(fold(unpack(letter, content), *sizes))
    return found


def read_packed(value: bytes) -> list[int]:
    """Return the numbers of a repeated field: packed, or a single one, which `read_fields` returns as eight bytes."""
    if len(value) == 8:  # the two sizes of a matrix that fits a record take fewer when they are packed
        return [int.from_bytes(value, "little")]
    numbers, position = [], 0
    while position < len(value):
        number, position = read_varint(value, position)
        numbers.append(number)
    return numbers


def unpack(letter: str, content: bytes) -> list[float]:
    """Return the floats in `content`."""
    if len(content) % struct.calcsize(letter):
        raise Unreadable("the tensor's bytes are no whole numbers")
    return [number for (number,) in struct.iter_unpack(f"<{letter}", content)]


def find_only(tensors: list[Rows], what: str) -> Rows:
    if len(tensors) != 1:
        raise Unreadable(f"{len(tensors)} {what} of numbers, expected one")
    return tensors[0]
