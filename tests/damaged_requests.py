"""Requests of the Open Inference Protocol that were right and are damaged at random, from a seed."""

import copy
import json
import random
import struct
from typing import Any

import numpy as np

from toy_onnx_models import DATATYPES, Arrays

JUNK = [
    None, True, -1, 0, 2**31, 2**63, 2**70, -(2**70), 1.5, 1e300, "x", "", "é" * 50, [], {}, [[]], [[[]]], [None],
    {"a": {}}, [1, [2]], [[1], [2, 3]], ["a", 1], [1e39], [2**64], [-1], [0.5, True], "FP32", [[["a"]], "b"], {"": []},
]  # fmt: skip
LITERALS = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 400, b"-" + b"9" * 30, b"01", b"1.", b"'1'", b"\xff"]
TYPES = {name: np.dtype(kind) for kind, name in DATATYPES.items()}


def pack(array: np.ndarray) -> bytes:
    """Return an array as the binary tensor extension lays it out."""
    if array.dtype.kind != "O":
        return array.tobytes()
    words = [word.encode() for word in array.ravel()]
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


def unpack(data: bytes, datatype: str, shape: list[int]) -> np.ndarray:
    """Return the array that `pack` laid out."""
    if datatype != "BYTES":
        return np.frombuffer(data, TYPES[datatype]).reshape(shape)
    words, position = [], 0
    while position < len(data):
        (length,) = struct.unpack_from("<I", data, position)
        words.append(data[position + 4 : position + 4 + length].decode())
        position += 4 + length
    return np.array(words, object).reshape(shape)


def describe(name: str, array: np.ndarray) -> dict:
    return {"name": name, "shape": list(array.shape), "datatype": DATATYPES[str(array.dtype)]}


def write_request(arrays: Arrays, binary: set[str], **more: Any) -> tuple[dict, bytes]:
    """Return the JSON of a request and the bytes behind it; inputs in `binary` are sent as bytes."""
    inputs, tail = [], b""
    for name, array in arrays.items():
        described = describe(name, array)
        if name in binary:
            data = pack(array)
            described["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            described["data"] = array.ravel().tolist()
        inputs.append(described)
    return {"inputs": inputs, **more}, tail


def read_request(asked: dict, tail: bytes) -> Arrays:
    """Return the arrays of a request that a server took; an exception where it is none."""
    arrays = {}
    for each in asked.get("inputs", []):
        size = (each.get("parameters") or {}).get("binary_data_size")
        if size is None:
            values = np.array(each["data"], TYPES[each["datatype"]])
            arrays[each["name"]] = values.reshape(each["shape"])
        else:
            arrays[each["name"]] = unpack(tail[:size], each["datatype"], each["shape"])
            tail = tail[size:]
    return arrays


def damage_shape(chance: random.Random, shape: list) -> list:
    place = chance.randrange(len(shape) + 1)
    value = chance.choice([-1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63, 2**70])
    return chance.choice(
        [
            shape[:place] + [value] + shape[place + 1 :],
            shape[:place] + [value] + shape[place:],
            shape[:place],
            shape[::-1],
            [1] * chance.choice([33, 65, 2000]),
            [0, *shape[1:]],
        ]
    )


def damage_data(chance: random.Random, data: Any) -> Any:
    if not isinstance(data, list):
        return chance.choice(JUNK)
    place = chance.randrange(len(data) + 1)
    return chance.choice(
        [
            data[:place],
            data + data[:1] * chance.choice([1, 1000]),
            [data],
            [data[:place], data[place:]],
            [[value] for value in data],
            data[:place] + [chance.choice(JUNK)] + data[place + 1 :],
            chance.choice(JUNK),
        ]
    )


def damage_fields(chance: random.Random, fields: dict) -> None:
    """Damage an object of JSON: drop, rename, replace or add a field."""
    key = chance.choice(list(fields) or ["x"])
    kind = chance.randrange(5)
    if kind == 0:
        fields.pop(key, None)
    elif kind == 1:
        fields[chance.choice([key.upper(), key + "s", "é", ""])] = fields.pop(key, None)
    elif kind == 2:
        fields[key] = chance.choice(JUNK)
    elif kind == 3:
        fields[chance.choice(["extra", "parameters", "outputs", "id", "data"])] = chance.choice(JUNK)
    else:
        fields["parameters"] = {
            chance.choice(["binary_data_size", "binary_data", "binary_data_output", "classification", "unknown"]):
                chance.choice([*JUNK, 1, 4, 20, 10**12, "4"])
        }  # fmt: skip


def damage_rest(chance: random.Random, asked: dict, tail: bytes) -> tuple[bytes, int | str | None, bytes]:
    """Return damaged JSON, the value of the header Inference-Header-Content-Length, and the bytes behind the JSON."""
    asked = copy.deepcopy(asked)
    inputs, length = asked["inputs"], 0
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        kind = chance.randrange(9)
        if kind == 0 or not inputs or not all(isinstance(each, dict) for each in inputs):
            damage_fields(chance, asked)
            inputs = asked["inputs"] if isinstance(asked.get("inputs"), list) else []
            continue
        chosen = chance.choice(inputs)
        if kind == 1:
            damage_fields(chance, chosen)
        elif kind == 2 and isinstance(chosen.get("shape"), list):
            chosen["shape"] = damage_shape(chance, chosen["shape"])
        elif kind == 3:
            chosen["data"] = damage_data(chance, chosen.get("data"))
        elif kind == 4:
            chosen["datatype"] = chance.choice([*TYPES, "BF16", "fp32", ""])
        elif kind == 5:
            inputs[:] = chance.choice([inputs[:-1], inputs + inputs[:1], [*inputs, {**chosen, "name": "z"}], [[]]])
        elif kind == 6:
            chosen["parameters"] = {"binary_data_size": chance.choice([-1, 0, 1, len(tail) + 1, 2**70, "4", 1.5])}
        elif kind == 7:
            asked["outputs"] = chance.choice(
                [
                    [{"name": "y"}, {"name": "y"}],
                    [{"name": "none"}],
                    [{}],
                    [1],
                    {},
                    "y",
                    [{"name": "y", "parameters": 1}],
                ]
            )
        else:
            tail = chance.choice([tail[:-1], tail + b"\0", b"", tail[::-1], tail + tail, bytes(len(tail))])
    body = json.dumps(asked).encode()
    if chance.random() < 0.2:
        place = chance.randrange(len(body))
        numbers = [at for at in range(len(body)) if body[at : at + 1].isdigit()] or [place]
        at = chance.choice(numbers)
        body = chance.choice(
            [
                body[:place],
                body[:place] + bytes([body[place] ^ 1 << chance.randrange(8)]) + body[place + 1 :],
                body[:at] + chance.choice(LITERALS) + body[at + 1 :],
                body[:place] + b"\xff\xfe" + body[place:],
                body + chance.choice([b"}", b"\0", b"{}", b" "]),
                b"[" * chance.choice([1, 5000]) + body,
                b"",
            ]
        )
    if tail or chance.random() < 0.1:
        length = len(body)
        if chance.random() < 0.2:
            length = chance.choice([0, len(body) - 1, len(body) + 1, 10**9, -1, "x", "", "1" * 30, "0x10"])
    else:
        length = None
    return body, length, tail


def write_message(name: str, arrays: Arrays, raw: bool) -> Any:
    """Return the request over gRPC; `raw`: with its tensors as bytes."""
    from tritonclient.grpc import service_pb2 as messages

    asked = messages.ModelInferRequest(model_name=name)
    for key, array in arrays.items():
        added = asked.inputs.add(name=key, shape=array.shape, datatype=DATATYPES[str(array.dtype)])
        if raw:
            asked.raw_input_contents.append(pack(array))
        else:
            values = [word.encode() for word in array.ravel()] if array.dtype.kind == "O" else array.ravel().tolist()
            getattr(added.contents, contents_field(array.dtype)).extend(values)
    return asked


def contents_field(kind: np.dtype) -> str:
    """Return the field of InferTensorContents for a type (inference_grpc.md's table)."""
    if kind.kind == "O":
        return "bytes_contents"
    if kind.kind in "iu":
        return f"{'u' if kind.kind == 'u' else ''}int{'64' if kind.itemsize == 8 else ''}_contents"
    return {"bool": "bool_contents", "float32": "fp32_contents", "float64": "fp64_contents"}[kind.name]


def read_message(asked: Any) -> Arrays:
    """Return the arrays of a message that a server took; an exception where it is none."""
    arrays = {}
    for place, each in enumerate(asked.inputs):
        if asked.raw_input_contents:
            arrays[each.name] = unpack(asked.raw_input_contents[place], each.datatype, list(each.shape))
        else:
            kind = TYPES[each.datatype]
            values = list(getattr(each.contents, contents_field(kind)))
            values = [word.decode() for word in values] if kind.kind == "O" else values
            arrays[each.name] = np.array(values, kind).reshape(list(each.shape))
    return arrays


def damage_message(chance: random.Random, asked: Any) -> None:
    """Damage a message in place."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        kind = chance.randrange(8)
        if kind == 0 or not asked.inputs:
            asked.outputs.add(name=chance.choice(["y", "y", "none", ""]))
            continue
        chosen = chance.choice(asked.inputs)
        if kind == 1:
            shape = [size for size in damage_shape(chance, list(chosen.shape)) if abs(size) < 2**63]
            del chosen.shape[:]
            chosen.shape.extend(shape)
        elif kind == 2:
            chosen.datatype = chance.choice([*TYPES, "BF16", "fp32", ""])
        elif kind == 3:
            chosen.name = chance.choice(["", "z", "é", "x" * 20_000, chosen.name])
        elif kind == 4:
            added = asked.inputs.add()
            added.CopyFrom(chosen)
            added.name = chance.choice([chosen.name, "z"])
        elif kind == 5:
            fields = [field.name for field in chosen.contents.DESCRIPTOR.fields]
            field = chance.choice(fields)
            value = {"bool": True, "byte": b"\xff", "int_": -(2**31), "int6": -(2**63)}.get(field[:4], 2**32 - 1)
            getattr(chosen.contents, field).extend([value] * chance.choice([0, 1, 5]))
        elif kind == 6:
            data = asked.raw_input_contents[0] if asked.raw_input_contents else b"1234"
            asked.raw_input_contents.append(chance.choice([data, data[:-1], data + b"\0", b"\xff" * 9, b""]))
        elif asked.raw_input_contents:
            data = asked.raw_input_contents[0]
            asked.raw_input_contents[0] = chance.choice([data[:-1], data + b"\0", b"", b"\xff" * len(data)])
        else:
            chosen.parameters["classification"].int64_param = 1
