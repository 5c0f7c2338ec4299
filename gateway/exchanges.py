"""Read the rows that a REST request asks for, and the probabilities that its reply answers.

    rows = read_rows(path, headers, body)                         # (n, 5)
    probabilities = read_probabilities(path, headers, body)       # (n, 2)

`path` is the request's in both: it says which server's form the bodies have. A query is ignored, and so is what
stands before the path, such as the name of a server behind the gateway. `headers` are the request's for the rows and
the reply's for the probabilities, in any order and case: pairs of name and value, or a mapping. `body` is what was
sent, compressed or not. Both return lists of lists of float, and raise Unreadable, a ValueError, whose message is a
short reason.

| path | rows | probabilities |
|---|---|---|
| `/v1/models/M[/versions/N or /labels/L]:predict` | `instances` or `inputs` | `predictions` or `outputs` |
| `/v2/models/M[/versions/N]/infer` | the one input; JSON, or bytes behind it | the one output of two columns |
| `/predictions/M[/V]`, `/invocations`, `/models/M/invoke` | `data` in JSON, or a field `data` of a form | list |
| `/predict[/V]`, `/predict_ab`, `/predict_batched` | `data`, `features`, `rows` | `predictions`, `probability`, list |

A body of no row, rows of different lengths, and what no number is are Unreadable; so are probabilities outside 0 to 1.
NaN and Infinity are numbers in rows, for TensorFlow Serving predicts them. The status of a reply is not looked at, and
that both have the same number of rows is for the caller to check. Nothing else of this folder is imported.
"""

import codecs
import json
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from email.parser import BytesParser
from email.policy import HTTP
from functools import lru_cache
from itertools import chain
from typing import Any
from urllib.parse import parse_qs, unquote

MAX_BODY_BYTES = 16 << 20  # decompressed
CODINGS = ("gzip", "x-gzip", "deflate")  # RFC 9110, 8.4.1
NUMBERS = {  # struct's letters of the Open Inference Protocol's data types that are numbers
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
PATHS = {  # searched for, in this order
    "tfserving": re.compile(r"/v1/models/[^/:]+(?:/(?:versions|labels)/[^/:]+)?:predict$"),
    "inference": re.compile(r"/v2/models/[^/]+(?:/versions/[^/]+)?/infer$"),
    "torchserve": re.compile(r"/(?:predictions/[^/]+(?:/[^/]+)?|invocations|models/[^/]+/invoke)$"),
    "predict": re.compile(r"/predict(?:_ab|_batched|/[^/]+)?$"),
}

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
Rows = list[list[float]]


class Unreadable(ValueError):
    """A body that holds no rows, or no probabilities; the message is a short reason."""


def read_rows(path: str, headers: Headers, body: bytes) -> Rows:
    """Return the rows that a request asks for, (n, k) with k the model's features; Unreadable where there are none."""
    form, headers = find_form(path), join_headers(headers)
    body = decompress(body, headers.get("content-encoding", ""))
    if form == "inference":
        document, tail = split_binary(headers, body)
        tensors = read_tensors(document, "inputs", tail)
        if len(tensors) != 1:
            raise Unreadable(f"{len(tensors)} inputs of numbers, expected one")
        return check_table(tensors[0])
    if form == "torchserve" and (field := read_form(headers, body)) is not None:
        return check_table(parse(field))
    document = parse(body, form == "tfserving")
    if not isinstance(document, dict):
        raise Unreadable("the body is no JSON object")
    if form == "tfserving":
        return check_table(read_instances(document))
    keys = {"torchserve": ["data"], "predict": ["data", "features", "rows"]}[form]
    value = next((document[key] for key in keys if key in document), None)
    return check_table([value] if is_row(value) else value)


def read_probabilities(path: str, headers: Headers, body: bytes) -> Rows:
    """Return the probabilities that a reply answers, (n, 2); Unreadable where there are none.

    `path` is the request's, `headers` are the reply's.
    """
    form, headers = find_form(path), join_headers(headers)
    body = decompress(body, headers.get("content-encoding", ""))
    if form == "inference":
        document, tail = split_binary(headers, body)
        return choose_probabilities(read_tensors(document, "outputs", tail))
    document = parse(body)
    if isinstance(document, list):  # TorchServe's reply, and that of BentoML's /predict_batched
        return choose_probabilities([document])
    if not isinstance(document, dict):
        raise Unreadable("the reply is neither a JSON object nor a list")
    if form == "tfserving":
        return choose_probabilities(read_predictions(document))
    value = document.get("predictions", document.get("probability"))
    return choose_probabilities([[value] if is_row(value) else value])


@lru_cache(maxsize=1024)
def find_form(path: str) -> str:
    """Return which server's form the bodies of a request to `path` have, a key of PATHS."""
    path = unquote(path.partition("?")[0])
    for form, pattern in PATHS.items():
        if pattern.search(path):
            return form
    raise Unreadable("the path predicts nothing")


def join_headers(headers: Headers) -> dict[str, str]:
    """Return the headers by their names in lower case, several of one name in one list (RFC 9110, 5.3)."""
    joined: dict[str, str] = {}
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        name = name.lower()
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


def decompress(body: bytes, encodings: str, most: int = MAX_BODY_BYTES) -> bytes:
    """Return a body as it was before its Content-Encoding, a list in the order in which the codings were applied.

    Unreadable if it is larger than `most` bytes then.
    """
    for word in reversed(encodings.lower().split(",")):
        if (word := word.strip()) in ("", "identity"):
            continue
        if word not in CODINGS:
            raise Unreadable(f"unknown Content-Encoding {word[:40]!r}")
        has_zlib_header = body[:1] and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0  # RFC 1950, 2.2
        is_raw = word == "deflate" and not has_zlib_header  # some clients send none
        rest, body = body, b""
        while rest:  # gzip may come in several members
            decoder = zlib.decompressobj(wbits=-15 if is_raw else 47)  # 47: gzip or zlib, as the first bytes say
            try:
                body += decoder.decompress(rest, most + 1 - len(body))
            except zlib.error:
                raise Unreadable(f"the body is not {word}") from None
            if len(body) > most:
                raise Unreadable(f"the body is larger than {most} bytes when decompressed")
            if not decoder.eof:
                raise Unreadable(f"the body's {word} is cut off")
            rest = decoder.unused_data
    return body


def parse(body: bytes | str, like_tensorflow: bool = False) -> Any:
    """Return the JSON document in a body, with or without a byte order mark.

    TensorFlow Serving's ends at a NUL; its strings may hold any bytes, and of members with one name the first counts.
    """
    hook = None
    if like_tensorflow and isinstance(body, bytes):
        body = body.removeprefix(codecs.BOM_UTF8).partition(b"\0")[0].decode("utf-8", "surrogateescape")
        hook = take_first
    try:
        return json.loads(body, parse_int=read_integer, object_pairs_hook=hook)
    except RecursionError:
        raise Unreadable("the JSON is nested too deep") from None
    except ValueError:  # also of bytes that are no text
        raise Unreadable("the body is no JSON") from None


def read_integer(digits: str) -> int:
    """Return a number; of thousands of digits, which Python refuses to read, the first: already too large for a row."""
    return int(digits[:1000])


def take_first(members: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(reversed(members))


def read_form(headers: dict[str, str], body: bytes) -> str | bytes | None:
    """Return the field `data` of a form, None where the body is no form; Unreadable where it has none."""
    content_type = headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        fields = parse_qs(body.decode("utf-8", "replace")).get("data", [])
    elif kind == "multipart/form-data":
        head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
        parts = [part for part in BytesParser(policy=HTTP).parsebytes(head + body).walk() if not part.is_multipart()]
        named = [part for part in parts if part.get_param("name", header="content-disposition") == "data"]
        fields = [part.get_payload(decode=True) for part in named]
    else:
        return None
    if len(fields) != 1:
        raise Unreadable("the form has no single field 'data'")
    return fields[0]


def read_instances(document: dict[str, Any]) -> Any:
    """Return the value of the one input of TensorFlow Serving's predict request, by rows or by columns."""
    if "instances" in document:
        rows = document["instances"]
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return [find_only(row, "input") for row in rows]
        return rows
    if "inputs" in document:
        value = document["inputs"]
        return find_only(value, "input") if isinstance(value, dict) else value
    raise Unreadable("neither 'instances' nor 'inputs'")


def read_predictions(document: dict[str, Any]) -> list[Any]:
    """Return the values of all outputs of TensorFlow Serving's predict reply, by rows or by columns."""
    if "predictions" in document:
        rows = document["predictions"]
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return [[row.get(name) for row in rows] for name in rows[0]]
        return [rows]
    if "outputs" in document:
        value = document["outputs"]
        return list(value.values()) if isinstance(value, dict) else [value]
    raise Unreadable("neither 'predictions' nor 'outputs'")


def find_only(named: dict[str, Any], what: str) -> Any:
    """Return the one value of an object."""
    if len(named) != 1:
        raise Unreadable(f"{len(named)} {what}s, expected one")
    return next(iter(named.values()))


def split_binary(headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the JSON of an Open Inference body, and the tensors in bytes behind it."""
    length = headers.get("inference-header-content-length", str(len(body))).strip()
    if not re.fullmatch("[0-9]{1,12}", length) or int(length) > len(body):
        raise Unreadable("Inference-Header-Content-Length is not the length of the JSON")
    document = parse(body[: int(length)])
    if not isinstance(document, dict):
        raise Unreadable("the body is no JSON object")
    return document, body[int(length) :]


def read_tensors(document: dict[str, Any], key: str, tail: bytes) -> list[Any]:
    """Return the values, nested as their shapes say, of the tensors under `key` that are matrices of numbers."""
    tensors, found, position = document.get(key), [], 0
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        raise Unreadable(f"no list of {key!r}")
    for tensor in tensors:
        parameters = tensor.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        letter = NUMBERS.get(str(tensor.get("datatype")))
        values = tensor.get("data")
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(tail) - position:
                raise Unreadable("binary_data_size does not fit the body")
            part, position = tail[position : position + size], position + size
            if letter is None:
                continue
            if size % struct.calcsize(f"<{letter}"):
                raise Unreadable(f"{size} bytes are no whole {tensor['datatype']} values")
            values = [number for (number,) in struct.iter_unpack(f"<{letter}", part)]
        if letter is not None:
            shape = tensor.get("shape")
            if isinstance(shape, list) and len(shape) == 2 and all(type(length) is int for length in shape):
                found.append(fold(values, *shape))
    if position != len(tail):
        raise Unreadable("bytes follow the JSON that no tensor counts")
    return found


def fold(values: Any, rows: int, columns: int) -> Any:
    """Return flat or nested values as `rows` lists of `columns`."""
    if isinstance(values, list) and values and all(isinstance(row, list) for row in values):
        if len(values) != rows or any(len(row) != columns for row in values):
            raise Unreadable("the data does not fill the shape")
        return values
    if not isinstance(values, list) or rows < 0 or columns < 0 or len(values) != rows * columns:
        raise Unreadable("the data does not fill the shape")
    return [values[row * columns : (row + 1) * columns] for row in range(rows)]


def is_row(value: Any) -> bool:
    """Whether a value is one row that is not in a list of rows."""
    return isinstance(value, list) and bool(value) and not isinstance(value[0], list)


def check_table(value: Any) -> Rows:
    """Return rows of numbers as floats; Unreadable where `value` is anything else."""
    if not isinstance(value, list) or not value:
        raise Unreadable("no rows")
    if not all(isinstance(row, list) and row and len(row) == len(value[0]) for row in value):
        raise Unreadable("the rows are no lists of one length")
    if not all(type(number) in (int, float) for number in chain.from_iterable(value)):
        raise Unreadable("a row holds something that is no number")
    try:
        return [[float(number) for number in row] for row in value]
    except OverflowError:
        raise Unreadable("a number is too large") from None


def choose_probabilities(values: list[Any]) -> Rows:
    """Return the one of several outputs that is pairs of numbers from 0 to 1; Unreadable where it is not one."""
    found, reason = [], "no pairs of probabilities"
    for value in values:
        try:
            table = check_table(value)
        except Unreadable:
            continue
        if len(table[0]) != 2:
            continue
        if all(0 <= number <= 1 for number in chain.from_iterable(table)):  # false of NaN
            found.append(table)
        else:
            reason = "a probability is not from 0 to 1"
    if len(found) != 1:
        raise Unreadable(f"{len(found)} outputs are probabilities" if found else reason)
    return found[0]
