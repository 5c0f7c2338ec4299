"""A model's inputs and outputs: tensors as ONNX declares them, and their values in JSON, bytes and protobuf."""

import math
import re
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from http_messages import Refusal

encode = msgspec.json.Encoder().encode

# Half a step beyond the largest: from there on a number is rounded to infinity. Programs print the largest number as
# 3.4028235e38, which is a little more.
FLOAT32_END = 2.0**128 - 2.0**103
FLOAT16_END = 65520.0
Float32 = Annotated[float, msgspec.Meta(gt=-FLOAT32_END, lt=FLOAT32_END)]  # checked during decoding, at no cost
Float16 = Annotated[float, msgspec.Meta(gt=-FLOAT16_END, lt=FLOAT16_END)]
MOST_DIMENSIONS = 64  # NumPy's limit
LARGEST_SIZE = 2**63 - 1  # of one dimension, in NumPy, ONNX and gRPC
LARGEST_EMPTY = 2**24  # elements of an empty tensor without its zeros: some models create that many from it
NO_JSON_NUMBER = "JSON has no NaN and no Infinity: ask for binary_data"


class Datatype(NamedTuple):
    """One row of the protocol's table of tensor data types (inference_rest.md)."""

    name: str  # in the protocol
    numpy: np.dtype  # little endian, as binary tensors are
    element: Any  # msgspec's type of one value in JSON
    contents: str  # the field of InferTensorContents that holds it in gRPC; "" where only bytes can


def _integer(bits: int, signed: bool) -> Any:
    least = -(2 ** (bits - 1)) if signed else 0
    most = 2 ** (bits - 1) - 1 if signed or bits == 64 else 2**bits - 1
    bounds = {"ge": least} | ({} if bits == 64 else {"le": most})  # NumPy detects values that do not fit 64 bits
    return Annotated[int, msgspec.Meta(**bounds)]


DATATYPES = {  # by the type in ONNX
    "tensor(bool)": Datatype("BOOL", np.dtype(np.bool_), bool, "bool_contents"),
    "tensor(uint8)": Datatype("UINT8", np.dtype("u1"), _integer(8, False), "uint_contents"),
    "tensor(uint16)": Datatype("UINT16", np.dtype("<u2"), _integer(16, False), "uint_contents"),
    "tensor(uint32)": Datatype("UINT32", np.dtype("<u4"), _integer(32, False), "uint_contents"),
    "tensor(uint64)": Datatype("UINT64", np.dtype("<u8"), _integer(64, False), "uint64_contents"),
    "tensor(int8)": Datatype("INT8", np.dtype("i1"), _integer(8, True), "int_contents"),
    "tensor(int16)": Datatype("INT16", np.dtype("<i2"), _integer(16, True), "int_contents"),
    "tensor(int32)": Datatype("INT32", np.dtype("<i4"), _integer(32, True), "int_contents"),
    "tensor(int64)": Datatype("INT64", np.dtype("<i8"), _integer(64, True), "int64_contents"),
    "tensor(float16)": Datatype("FP16", np.dtype("<f2"), Float16, ""),
    "tensor(float)": Datatype("FP32", np.dtype("<f4"), Float32, "fp32_contents"),
    "tensor(double)": Datatype("FP64", np.dtype("<f8"), float, "fp64_contents"),
    "tensor(string)": Datatype("BYTES", np.dtype(object), str, "bytes_contents"),
}
ZIP_MAP = re.compile(r"seq\(map\((?:int64|string),tensor\(float\)\)\)")


class UnsupportedError(ValueError):
    """A tensor that the protocol cannot express."""


def decode_json(decoder, body: bytes | msgspec.Raw, root: str = "$"):
    """Return the result of `decoder`, a msgspec decoder's method, for JSON; Refusal with the place of the fault.

    `root` is the place of `body` in the whole document.
    """
    try:
        return decoder(body)
    except msgspec.ValidationError as error:
        message = str(error).replace("`$", f"`{root}")
        raise Refusal(400, re.sub(r"`float` [<>] (\S+)", _finite, message)) from None
    except msgspec.DecodeError as error:
        body = bytes(body)
        reason = str(error).removeprefix("JSON is malformed: ") if body else "the body is empty"
        hint = "; JSON has no NaN and no Infinity" if b"NaN" in body or b"Infinity" in body else ""
        raise Refusal(400, f"malformed JSON: {reason}{hint}") from None
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except RecursionError:
        raise Refusal(400, "the JSON is nested too deep") from None


def _finite(bound: re.Match) -> str:
    return f"a number that is finite in {'float16' if bound[1].lstrip('-') == str(FLOAT16_END) else 'float32'}"


@dataclass(frozen=True)
class Tensor:
    """One input or output as the model declares it."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]  # -1: may vary; () for a scalar, and if the model names no rank
    is_zip_map: bool = False  # a classifier's list of {label: score}: served as a matrix, labels in sorted order
    has_rank: bool = field(default=True, compare=False)

    @classmethod
    def declared(cls, node) -> "Tensor":
        """Return the tensor of ONNX Runtime's NodeArg `node`; UnsupportedError if the protocol cannot express it."""
        if ZIP_MAP.fullmatch(node.type):
            return cls(node.name, DATATYPES["tensor(float)"], (-1, -1), is_zip_map=True)
        if node.type not in DATATYPES:
            raise UnsupportedError(f"{node.name!r} is {node.type}, which the Open Inference Protocol cannot carry")
        shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
        return cls(node.name, DATATYPES[node.type], shape, has_rank=bool(shape))

    def describe(self) -> dict:
        """Return the tensor's metadata in the protocol's form."""
        return {"name": self.name, "datatype": self.datatype.name, "shape": list(self.shape)}

    def check(self, place: str, datatype: str, shape: list[int]) -> int:
        """Return the number of elements in `shape`; Refusal if the model takes another type or shape."""
        if datatype != self.datatype.name:
            raise Refusal(400, f"{place}.datatype: expected {self.datatype.name!r}, got {datatype!r}")
        fits = len(shape) == len(self.shape) and all(
            0 <= given <= LARGEST_SIZE and own in (given, -1) for given, own in zip(shape, self.shape, strict=True)
        )
        if not fits and (self.has_rank or not all(0 <= size <= LARGEST_SIZE for size in shape)):
            expected = str(["n" if size == -1 else size for size in self.shape]).replace("'", "")
            expected = expected if self.has_rank else "sizes from 0 on"
            raise Refusal(400, f"{place}.shape: expected {expected}, got {shape}")
        if len(shape) > MOST_DIMENSIONS:
            raise Refusal(400, f"{place}.shape: {len(shape)} dimensions; {MOST_DIMENSIONS} is the most")
        count = math.prod(shape)
        if count == 0 and math.prod(filter(None, shape)) > LARGEST_EMPTY:
            raise Refusal(400, f"{place}.shape: {shape} is too large for an empty tensor")
        return count

    @cached_property
    def decode_flat(self):
        return msgspec.json.Decoder(list[self.datatype.element]).decode

    @cached_property
    def decode_nested(self) -> dict:
        """Decoders by rank, made on first use."""
        return {}

    def nested_decoder(self, shape: list[int]):
        """Return the decoder of nested arrays of this rank; it checks a fixed last size and reports the place."""
        if len(shape) not in self.decode_nested:
            last = self.shape[-1] if self.shape else -1
            kind = tuple[(self.datatype.element,) * last] if 0 < last <= 64 else list[self.datatype.element]
            for _ in shape[1:]:
                kind = list[kind]
            self.decode_nested[len(shape)] = msgspec.json.Decoder(kind).decode
        return self.decode_nested[len(shape)]

    def from_json(self, data: msgspec.Raw, shape: list[int], count: int, place: str) -> np.ndarray:
        """Return the array in `data`, JSON, flat or nested; Refusal if it does not fill `shape`."""
        nested = len(shape) > 1 and re.match(rb"\s*\[\s*\[", bytes(data)) is not None
        values = decode_json(self.nested_decoder(shape) if nested else self.decode_flat, data, f"$.{place}.data")
        return self.from_values(values, shape, count, f"{place}.data")

    def from_values(self, values: Any, shape: list[int], count: int, place: str) -> np.ndarray:
        """Return the array of values, flat or nested; Refusal if they do not fill `shape`."""
        try:
            array = np.array(values, self.datatype.numpy)
        except OverflowError:
            raise Refusal(400, f"{place}: a number does not fit {self.datatype.name}") from None
        except ValueError:
            raise Refusal(400, f"{place}: arrays of one level differ in length") from None
        if array.dtype == object and array.size and type(array.flat[0]) is list:  # NumPy keeps ragged arrays as lists
            raise Refusal(400, f"{place}: arrays of one level differ in length")
        if array.size != count or (array.ndim > 1 and array.shape != tuple(shape)[: array.ndim]):
            raise Refusal(400, f"{place}: {array.size} values do not fill the shape {list(shape)}")
        return array.reshape(shape)

    def from_bytes(self, data: bytes | memoryview, shape: list[int], count: int, place: str) -> np.ndarray:
        """Return the array in `data`, in the binary tensor extension's layout; Refusal if it does not fit `shape`."""
        if self.datatype.name == "BYTES":
            return self.from_values(split_bytes(data, place), shape, count, place)
        expected = count * self.datatype.numpy.itemsize
        if len(data) != expected:
            raise Refusal(400, f"{place}: {len(data)} bytes, but the shape {list(shape)} takes {expected}")
        array = np.frombuffer(data, self.datatype.numpy)
        if self.datatype.name == "BOOL":
            array = np.frombuffer(data, np.uint8) != 0  # any other byte would be undefined
        return array.reshape(shape)

    def to_json(self, array: np.ndarray) -> bytes:
        """Return the values flat, as JSON; Refusal if JSON cannot express one."""
        if self.datatype.name == "BYTES":
            return encode(to_text(array))
        data = encode(array.ravel().tolist())
        if self.datatype.numpy.kind == "f" and b"null" in data:
            raise Refusal(400, f"output {self.name!r} is not finite everywhere; {NO_JSON_NUMBER}")
        return data

    def to_bytes(self, array: np.ndarray) -> bytes:
        """Return the values in the layout of the binary tensor extension."""
        if self.datatype.name != "BYTES":
            return np.ascontiguousarray(array, self.datatype.numpy).tobytes()
        words = [word.encode() for word in to_text(array)]
        return b"".join(part for word in words for part in (struct.pack("<I", len(word)), word))


def to_text(array: np.ndarray) -> list[str]:
    """Return the strings of an array, flat."""
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in array.ravel()]


def split_bytes(data: bytes | memoryview, place: str) -> list[str]:
    """Return the strings in a BYTES tensor: each follows its length (4 bytes, little endian)."""
    words, position = [], 0
    while position < len(data):
        end = position + 4
        if end <= len(data):
            end += struct.unpack_from("<I", data, position)[0]
        if end > len(data) or position + 4 > len(data):
            raise Refusal(400, f"{place}: the string that begins at byte {position} is cut off")
        words.append(to_string(bytes(data[position + 4 : end]), place))
        position = end
    return words


def to_string(word: bytes, place: str) -> str:
    """Return a BYTES element as the UTF-8 string that ONNX Runtime takes."""
    try:
        return word.decode()
    except UnicodeDecodeError:
        raise Refusal(400, f"{place}: a string is not UTF-8, as ONNX's are") from None
