"""Read a predict request's JSON into arrays, by TensorFlow Serving's rules (its api_rest.md) and with its error texts.

There are two ways. `RowReader` reads the common request (`instances`, one input of floats) with a compiled
decoder, and gives up on everything else. `read_request` then reads any request, and words the error of a bad one.
"""

import base64
import codecs
import functools
import itertools
import json
import math
import os
import re

import msgspec
import numpy as np
from quiet_tensorflow import tf
from servables import DEFAULT_SIGNATURE, Servable, ServingError, Signature, numpy_type, type_name

MAX_QUOTED_CHARACTERS = 500  # of a bad value, in an error message: it can be megabytes long
MAX_RANK = 64  # NumPy's
FLOATS = {tf.float32.as_datatype_enum: np.float32, tf.float64.as_datatype_enum: np.float64}
INTEGERS = {  # data type → range of the JSON numbers that it accepts; the small types share the C++ int's
    **dict.fromkeys((tf.int8, tf.int16, tf.int32, tf.uint8), (-(2**31), 2**31 - 1)),
    tf.int64: (-(2**63), 2**63 - 1),
    tf.uint32: (0, 2**32 - 1),
    tf.uint64: (0, 2**64 - 1),
}
INTEGERS = {dtype.as_datatype_enum: limits for dtype, limits in INTEGERS.items()}


np.seterr(over="ignore")  # 1e39 becomes infinity, which is checked here; no one would see a warning


def invalid(message: str) -> ServingError:
    return ServingError("INVALID_ARGUMENT", message)


PARSE_ERRORS = {  # Python's messages → those of RapidJSON 1.1.0, which TensorFlow Serving passes on
    "Expecting value": "Invalid value.",
    "Unexpected UTF-8 BOM (decode using utf-8-sig)": "Invalid value.",  # a second one
    "Illegal trailing comma before end of array": "Invalid value.",
    "Expecting property name enclosed in double quotes": "Missing a name for object member.",
    "Illegal trailing comma before end of object": "Missing a name for object member.",
    "Expecting ':' delimiter": "Missing a colon after a name of object member.",
    "Extra data": "The document root must not be followed by other values.",
    "Unterminated string starting at": "Missing a closing quotation mark in string.",
    "Invalid \\escape": "Invalid escape character in string.",
    "Invalid \\uXXXX escape": "Incorrect hex digit after \\u escape in string.",
    "Invalid control character at": "Invalid escape character in string.",
}
WORDS = ("true", "false", "null", "NaN", "Infinity", "-NaN", "-Infinity")
# Text at which Python stops after a number, here marked with |: no digits follow the point or the e.
CUT_NUMBER = re.compile(r"(?:(?<![\d.eE+-])-?\d+\|(?=\.)|(?<![\d.eE+-])-?\d+(?:\.\d+)?\|(?=[eE]))(\.|[eE][+-]?)")
STRING = r'"(?:[^"\\]|\\.)*"'
SHORT_WORDS = re.compile(rf"{STRING}|-NaN|Inf(?!i)", re.DOTALL)  # accepted by RapidJSON and not by Python
# A high surrogate in a string without a low one after it; RapidJSON accepts a single low one.
LONE_SURROGATE = re.compile(
    r"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2})(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})", re.DOTALL
)


class _TooBig(ValueError):
    pass


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _TooBig
    return value


def _parse_int(text: str) -> int | float:
    return int(text) if len(text) <= 20 else _parse_float(text)  # longer than any 64-bit integer


def _take_first(members: list[tuple[str, object]]) -> dict:
    """Return the members by name; of equal names RapidJSON finds the first."""
    return dict(reversed(members))


def parse(body: bytes):
    """Return the document in `body` as RapidJSON reads it with kParseNanAndInfFlag. Raises ServingError.

    NaN, Inf, Infinity and the same with a minus are numbers, and a NUL ends the document.
    """
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    size = len(body)
    for byte in codecs.BOM_UTF8:  # RapidJSON passes over each by itself
        body = body.removeprefix(bytes([byte]))
    skipped = size - len(body)
    body = body.partition(b"\0")[0]
    # Bytes that are not UTF-8 pass through strings unchanged, as in RapidJSON.
    text = body.decode("utf-8", "surrogateescape")
    added = []  # positions at which characters were added to the body
    if "Inf" in text or "-NaN" in text:
        text = SHORT_WORDS.sub(functools.partial(_lengthen, added), text)
    try:
        document = json.loads(text, parse_float=_parse_float, parse_int=_parse_int, object_pairs_hook=_take_first)
    except json.JSONDecodeError as error:
        message, position = _explain(text, error)
    except _TooBig:
        raise invalid("JSON Parse error: Number too big to be stored in double.") from None
    except RecursionError:
        raise invalid("JSON Parse error: The document is nested too deep.") from None
    else:
        lone = LONE_SURROGATE.search(text) if "\\u" in text else None
        if not lone:
            return document
        message, position = "The surrogate pair in string is invalid.", lone.start(1)
    offset = skipped + len(text[:position].encode("utf-8", "surrogateescape"))
    offset -= len("inity") * sum(place < position for place in added)
    raise invalid(f"JSON Parse error: {message} at offset: {offset}")


def _lengthen(added: list[int], match: re.Match) -> str:
    """Return a token as Python reads it, of the same length if possible."""
    if match[0] == "Inf":
        added.append(match.end())
        return "Infinity"
    return " NaN" if match[0] == "-NaN" else match[0]


def _explain(text: str, error: json.JSONDecodeError) -> tuple[str, int]:
    """Return RapidJSON's message and position of the error."""
    position = error.pos
    if not text.strip(" \t\r\n"):
        return "The document is empty.", len(text)
    if error.msg.startswith("Illegal trailing comma"):  # Python 3.13 reports the comma's position
        position = re.compile(r"[\s,]*").match(text, position).end()
    elif error.msg == "Expecting value":
        position += max(len(os.path.commonprefix([word, text[position : position + 9]])) for word in WORDS)
    elif error.msg == "Unterminated string starting at":
        position = len(text)
    elif error.msg == "Invalid \\uXXXX escape":
        position = text.rindex("\\", 0, position + 1)
    elif cut := CUT_NUMBER.search(text[:position][-MAX_QUOTED_CHARACTERS:] + "|" + text[position : position + 2]):
        return f"Miss {'fraction part' if cut[1] == '.' else 'exponent'} in number.", position + len(cut[1])
    message = PARSE_ERRORS.get(error.msg)
    if message is None:  # "Expecting ',' delimiter": of an array or of an object?
        bracket = _open_bracket(text[:position])
        message = f"Missing a comma or {bracket} after an {'array element' if bracket == ']' else 'object member'}."
    return message, position


def _open_bracket(text: str) -> str:
    """Return the bracket that closes the innermost array or object open at the end of `text`."""
    closing = []
    for token in re.finditer(rf"{STRING}|[\[\]{{}}]", text, re.DOTALL):
        match token.group():
            case "[":
                closing.append("]")
            case "{":
                closing.append("}")
            case "]" | "}":
                closing.pop()
    return closing[-1]


def quote(value) -> str:
    """Return `value` as JSON for an error message, cut if it is long."""
    text = ""
    for chunk in json.JSONEncoder(indent=4, ensure_ascii=False).iterencode(value):
        text += chunk
        if len(text) > MAX_QUOTED_CHARACTERS:
            return f"{text[:MAX_QUOTED_CHARACTERS]}…"
    return text


class RowReader:
    """Reads `{"instances": [row, …]}` for a signature with one float input of known rank."""

    def __init__(self, signature: Signature):
        """`usable` is False if the signature needs `read_request`."""
        (self.alias, info), *others = signature.inputs.items() if signature.inputs else [("", None)]
        self.usable = bool(info) and not others and info.dtype in FLOATS and not info.tensor_shape.unknown_rank
        self.usable = self.usable and len(info.tensor_shape.dim) > 0
        if not self.usable:
            return
        self.dtype = FLOATS[info.dtype]
        # Integers up to this magnitude are exact; `read_request` checks larger values.
        self.square_limit = 2.0 ** (2 * (np.finfo(self.dtype).nmant + 1))
        rows: type = float
        for _ in info.tensor_shape.dim:
            rows = list[rows]
        self.decode = msgspec.json.Decoder(
            msgspec.defstruct(
                "Rows",
                [("instances", rows), ("signature_name", str, ""), ("inputs", msgspec.Raw, msgspec.Raw())],
            )
        ).decode

    def read(self, body: bytes) -> dict[str, np.ndarray] | None:
        """Return the input by alias, or None if the request needs `read_request`."""
        # Of two members with one name, perhaps written with an escape, msgspec would take the last.
        if body.count(b"instances") != 1 or body.count(b"signature_name") > 1 or b"\\" in body:
            return None
        try:
            request = self.decode(body)
            if request.signature_name or request.inputs or not request.instances:
                return None
            array = np.array(request.instances, self.dtype)
            flat = array.ravel()
            if not np.vdot(flat, flat) < self.square_limit:  # also NaN and infinity
                return None
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None
        return {self.alias: array}


def read_request(body: bytes, find_servable) -> tuple[Servable, str, dict[str, np.ndarray], bool]:
    """Return (servable, signature name, inputs by alias, whether the reply is by row).

    `find_servable()` is called only after the JSON was parsed, because TensorFlow Serving finds errors in
    that order. Raises ServingError.
    """
    document = parse(body)
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {quote(document)} Is not object")
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid(
            f"JSON Value: {quote(document)} not formatted correctly. 'signature_name' key must be a string value."
        )
    servable = find_servable()
    name = name or DEFAULT_SIGNATURE
    if name not in servable.signatures:
        raise invalid(f'Serving signature name: "{name}" not found in signature def')
    infos = servable.signatures[name].inputs
    if not infos:
        raise invalid(f"Failed to get input map for signature: {name}")
    if "instances" in document and "inputs" in document:
        raise invalid(
            f"JSON Value: {quote(document)} Not formatted correctly expecting only one of 'inputs' or 'instances' "
            "keys to exist "
        )
    if "instances" in document:
        instances = document["instances"]
        if not isinstance(instances, list):
            raise invalid(f"JSON Value: {quote(document)} Excepting 'instances' to be an list/array")
        if not instances:
            raise invalid(f"JSON Value: {quote(document)} No values in 'instances' array")
        return servable, name, _read_instances(instances, infos), True
    if "inputs" in document:
        return servable, name, _read_inputs(document["inputs"], infos), False
    raise invalid("Missing 'inputs' or 'instances' key")


def _read_instances(instances: list, infos: dict) -> dict[str, np.ndarray]:
    """Read the row format: every element holds one value for each input."""
    if not isinstance(instances[0], dict) and len(infos) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    named = _is_named(instances[0])
    columns: dict[str, list] = {alias: [] for alias in infos}
    for i, element in enumerate(instances):
        if _is_named(element) != named:
            found, wanted = ("list", "object") if named else ("object", "value/list")
            raise invalid(f"Expecting {wanted} but got {found} at item {i} of input list")
        if not named:
            columns[next(iter(infos))].append(element)
            continue
        for alias in element.keys() & infos.keys():
            columns[alias].append(element[alias])
        if element.keys() != infos.keys():
            unknown = sorted(element.keys() - infos.keys())
            if unknown:
                raise invalid(
                    f"Failed to process element: {i} key: {unknown[0]} of 'instances' list. Error: "
                    f"INVALID_ARGUMENT: JSON object: does not have named input: {unknown[0]}"
                )
            raise invalid(
                f"Failed to process element: {i} of 'instances' list. JSON object: {quote(element)} keys must be "
                f"equal to: {','.join(infos)}"
            )
    arrays = {}
    for alias, column in columns.items():
        arrays[alias] = _to_array(column, infos[alias].dtype)
        if arrays[alias] is None:
            raise _explain_rows(column, infos[alias].dtype, alias if named else None)
    return arrays


def _is_named(element) -> bool:
    return isinstance(element, dict) and not is_base64(element)


def is_base64(value) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _read_inputs(value, infos: dict) -> dict[str, np.ndarray]:
    """Read the columnar format: one value for each input."""
    if not _is_named(value):
        if len(infos) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        value = {next(iter(infos)): value}
    arrays = {}
    for alias, info in infos.items():
        if alias not in value:
            raise invalid(f"Missing named input: {alias} in 'inputs' object.")
        arrays[alias] = _to_array(value[alias], info.dtype)
        if arrays[alias] is None:
            _check_values(value[alias], _shape(value[alias]), info.dtype)
            raise invalid(f"JSON Value: {quote(value[alias])} is not a tensor")
    return arrays


def _shape(value) -> list[int]:
    """Return the shape of the first elements, with which all others must agree."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def _to_array(value, dtype: int) -> np.ndarray | None:
    """Return the nested list `value` as an array, or None if any part of it is wrong."""
    shape = _shape(value)
    if len(shape) > MAX_RANK:
        return None
    level = [value]
    for size in shape:
        if any(type(item) is not list or len(item) != size for item in level):
            return None
        level = list(itertools.chain.from_iterable(level))
    try:
        converted = [_convert(item, dtype) for item in level]
    except ServingError:
        return None
    # 300 as int8 wraps to 44, as in TensorFlow Serving; NumPy wraps only between arrays.
    wide = np.int64 if dtype in INTEGERS and INTEGERS[dtype][1] < 2**63 else numpy_type(dtype)
    return np.array(converted, wide).reshape(shape).astype(numpy_type(dtype), copy=False)


def _convert(value, dtype: int):
    """Return a JSON value as a value of `dtype`. ServingError if it has another type."""
    kind = type(value)
    if dtype in FLOATS:
        if kind is float or kind is int:
            return float(value)  # cast as in C++: to double, then to the tensor's type
    elif dtype in INTEGERS:
        least, most = INTEGERS[dtype]
        if kind is int and least <= value <= most:
            return value
    elif dtype == tf.bool.as_datatype_enum:
        if kind is bool:
            return value
    elif dtype == tf.string.as_datatype_enum:
        if kind is str:
            return to_bytes(value)
        if kind is dict:
            return decode_base64(value)
    else:
        raise ServingError("UNIMPLEMENTED", f"Conversion of JSON Value: {quote(value)} to type: {type_name(dtype)}")
    raise invalid(f"JSON Value: {quote(value)} Type: {json_type(value)} is not of expected type: {type_name(dtype)}")


def to_bytes(text: str) -> bytes:
    """Return a JSON string's bytes: those that are not UTF-8 as sent, a single low surrogate as RapidJSON writes it."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def json_type(value) -> str:
    """Name a value's type, as TensorFlow Serving does."""
    names = {dict: "Object", list: "Array", str: "String", type(None): "Null"}
    return str(value) if isinstance(value, bool) else names.get(type(value), "Number")


def decode_base64(value: dict) -> bytes:
    """Return the bytes of a base64 object by the rules of Abseil's Base64Unescape.

    Blanks may be anywhere; the padding, of = or dots, is complete or missing.
    """
    if not is_base64(value):
        raise invalid(f"JSON Value: {quote(value)} not formatted correctly for base64 data")
    digits = re.sub(r"[ \t\n\v\f\r]", "", value["b64"])
    match = re.fullmatch(r"([A-Za-z0-9+/]*)([=.]*)", digits)
    missing = -len(match[1]) % 4 if match else 3
    if missing == 3 or match[2] and len(match[2]) != missing:
        raise invalid("Unable to base64 decode")
    return base64.b64decode(match[1] + "=" * missing)


def _check_values(value, shape: list[int], dtype: int, level: int = 0) -> int:
    """Return the number of values in `value`; ServingError at the first that contradicts `shape` or `dtype`."""
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid(
                f"JSON Value: {quote(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        _convert(value, dtype)
        return 1
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    return sum(_check_values(item, shape, dtype, level + 1) for item in value)


def _explain_rows(column: list, dtype: int, alias: str | None) -> ServingError:
    """Word the error of the first row that differs from the rows before it or holds a bad value."""
    first_size, first_shape = 0, []
    for i, element in enumerate(column):
        try:
            shape = _shape(element)
            size = _check_values(element, shape, dtype)
            if i == 0:
                first_size, first_shape = size, shape
            elif size != first_size:
                raise invalid(f"Expecting tensor size: {first_size} but got: {size}")
            elif shape != first_shape:
                expected, got = (f"[{','.join(map(str, dims))}]" for dims in (first_shape, shape))
                raise invalid(f"Expecting shape {expected} but got: {got}")
        except ServingError as error:
            key = f" key: {alias}" if alias else ""
            return invalid(
                f"Failed to process element: {i}{key} of 'instances' list. Error: {error.code}: {error.message}"
            )
    return invalid(f"JSON Value: {quote(column)} is not a tensor")
