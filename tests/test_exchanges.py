"""What shadow.py reads of requests and replies: rows and probabilities, in every form of all four servers."""

import gzip
import json
import struct
import sys
import zlib

import pytest

from helpers import REPOSITORY_DIR

sys.path.insert(0, str(REPOSITORY_DIR / "gateway"))

from exchanges import Unreadable, read_probabilities, read_rows  # noqa: E402

ROWS = [[13.5, 24.5, 0.125, 0.25, 0.5], [14.5, 20.25, 0.0625, 0.5, 0.25]]  # exact in float32
PAIRS = [[0.75, 0.25], [0.5, 0.5]]
TF, INFER, TORCH = "/v1/models/my_model:predict", "/v2/models/my_model/infer", "/predictions/my_model"
NAMED = [{"features": row} for row in ROWS]
FLAT = [value for row in ROWS for value in row]
BOUNDARY = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


def tensor(name: str = "input", datatype: str = "FP32", shape=(2, 5), **more) -> dict:
    return {"name": name, "datatype": datatype, "shape": list(shape), **more}


def binary(key: str, tensors: list[dict], *parts: bytes) -> tuple[dict[str, str], bytes]:
    """Return the headers and body of a request with `parts` behind the JSON."""
    for described, part in zip(tensors, parts, strict=True):
        described["parameters"] = {"binary_data_size": len(part)}
    document = json.dumps({key: tensors}).encode()
    return {"Inference-Header-Content-Length": str(len(document))}, document + b"".join(parts)


REQUESTS = {
    "onnx": ("/predict", {"data": ROWS}),
    "onnx, a version": ("/predict/2?x=1", {"data": ROWS}),
    "bentoml": ("/predict", {"features": ROWS, "version": "v1.0.0"}),
    "bentoml, by chance": ("/predict_ab", {"features": ROWS}),
    "bentoml, batched": ("/predict_batched", {"rows": ROWS}),
    "torchserve": (TORCH, {"data": ROWS}),
    "torchserve, a version": (f"{TORCH}/2.0", {"data": ROWS}),
    "torchserve, behind the gateway": (f"/torchserve{TORCH}", {"data": ROWS}),
    "tfserving by rows": (TF, {"instances": ROWS}),
    "tfserving by rows, named": (TF, {"instances": NAMED, "signature_name": "serving_default"}),
    "tfserving by columns": (TF, {"inputs": ROWS}),
    "tfserving by columns, named": (TF, {"inputs": {"features": ROWS}}),
    "tfserving, a version": ("/v1/models/my_model/versions/1:predict", {"instances": ROWS}),
    "tfserving, a label": ("/v1/models/my_model/labels/stable%3Apredict", {"instances": ROWS}),
    "infer, flat": (INFER, {"inputs": [tensor(data=FLAT)]}),
    "infer, nested": ("/v2/models/my_model/versions/2/infer", {"inputs": [tensor(data=ROWS, datatype="FP64")]}),
}
REPLIES = {
    "onnx": ("/predict", {"predictions": PAIRS}),
    "bentoml": ("/predict", {"version": "v1.0.0", "prediction": [0, 0], "probability": PAIRS}),
    "bentoml, batched": ("/predict_batched", PAIRS),
    "torchserve": (TORCH, PAIRS),
    "tfserving by rows": (TF, {"predictions": PAIRS}),
    "tfserving by rows, two outputs": (TF, {"predictions": [{"p": pair, "label": 0} for pair in PAIRS]}),
    "tfserving by columns": (TF, {"outputs": PAIRS}),
    "tfserving by columns, two outputs": (TF, {"outputs": {"p": PAIRS, "label": [0, 0]}}),
    "infer": (INFER, {"outputs": [tensor(shape=(2, 2), data=[0.75, 0.25, 0.5, 0.5])]}),
    "infer, two outputs": (
        INFER,
        {"outputs": [tensor("label", "INT64", [2], data=[0, 0]), tensor("p", shape=(2, 2), data=PAIRS)]},
    ),
}
ENCODINGS = {
    "gzip": gzip.compress,
    "GZIP": gzip.compress,
    "x-gzip": lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:]),  # two members
    "deflate": zlib.compress,
    " deflate ": lambda body: zlib.compress(body, wbits=-15),  # without zlib's header, as some clients send it
    "identity": bytes,
    "gzip, deflate": lambda body: zlib.compress(gzip.compress(body)),
}


@pytest.mark.parametrize("form", REQUESTS)
def test_the_rows_of_every_form_are_read(form):
    path, document = REQUESTS[form]
    assert read_rows(path, {}, json.dumps(document).encode()) == ROWS
    assert read_rows(path, [], b"\xef\xbb\xbf" + json.dumps(document).encode()) == ROWS  # a byte order mark


@pytest.mark.parametrize("form", REPLIES)
def test_the_probabilities_of_every_form_are_read(form):
    path, document = REPLIES[form]
    assert read_probabilities(path, {}, json.dumps(document).encode()) == PAIRS


@pytest.mark.parametrize("datatype, letter", [("FP32", "f"), ("FP64", "d"), ("FP16", "e")])
def test_rows_and_probabilities_in_bytes_are_read(datatype, letter):
    headers, body = binary("inputs", [tensor(datatype=datatype)], struct.pack(f"<10{letter}", *FLAT))
    assert read_rows(INFER, headers, body) == ROWS
    label, p = tensor("label", "INT64", [2]), tensor("p", datatype, [2, 2])
    headers, body = binary("outputs", [label, p], struct.pack("<2q", 0, 1), struct.pack(f"<4{letter}", *sum(PAIRS, [])))
    assert read_probabilities(INFER, headers, body) == PAIRS


def test_a_string_output_before_the_probabilities_is_passed_over():
    words = struct.pack("<I6sI6s", 6, b"benign", 6, b"benign")
    headers, body = binary(
        "outputs",
        [tensor("label", "BYTES", [2]), tensor("p", shape=[2, 2])],
        words,
        struct.pack("<4f", *sum(PAIRS, [])),
    )
    assert read_probabilities(INFER, headers, body) == PAIRS


def test_one_row_that_is_not_in_a_list_is_one_row():
    assert read_rows("/predict", {}, json.dumps({"features": ROWS[0]}).encode()) == ROWS[:1]
    reply = {"version": "v2.0.0", "prediction": 0, "probability": PAIRS[0]}
    assert read_probabilities("/predict", {}, json.dumps(reply).encode()) == PAIRS[:1]


def test_a_field_of_a_form_is_read_as_torchserve_does():
    data = json.dumps(ROWS).encode()
    form = BOUNDARY % (b"other", b"1") + BOUNDARY % (b"data", data) + b"--x--\r\n"
    assert read_rows(TORCH, {"content-type": "multipart/form-data; boundary=x"}, form) == ROWS
    assert read_rows(TORCH, {"Content-Type": "application/x-www-form-urlencoded"}, b"data=" + data) == ROWS


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_compressed_body_is_read(encoding):
    body = ENCODINGS[encoding](json.dumps({"data": ROWS}).encode())
    assert read_rows("/predict", {"CONTENT-ENCODING": encoding}, body) == ROWS
    if ", " in encoding:  # the same in two lines
        assert read_rows("/predict", [("content-encoding", part) for part in encoding.split(", ")], body) == ROWS
    reply = ENCODINGS[encoding](json.dumps({"predictions": PAIRS}).encode())
    assert read_probabilities("/predict", {"content-encoding": encoding}, reply) == PAIRS


def test_a_body_is_read_as_tensorflow_serving_reads_it():
    path = "/v1/models/my_model:predict"
    for body in (
        b'{"instances": [[1, 2]], "instances": [[3, 4]]}', b'\xef\xbb\xbf{"instances": [[1, 2]]}',
        b'{"instances": [[1, 2]]}\0 and more', b'{"x": "\xff", "instances": [[1, 2]]}',
        b'{"x": %b, "instances": [[1, 2]]}' % (b"1" * 5000),
    ):  # fmt: skip
        assert read_rows(path, {}, body) == [[1, 2]], body
    assert read_rows("/predict", {}, b'{"data": [[1, 2]], "data": [[3, 4]]}') == [[3, 4]]


def test_numbers_that_tensorflow_serving_casts_are_rows():
    (row,) = read_rows(TF, {}, b'{"instances": [[NaN, Infinity, -Infinity, 1e39, 16777217]]}')
    assert row[0] != row[0] and row[1:] == [float("inf"), float("-inf"), 1e39, 16777217.0]


GZIP, CUT = {"content-encoding": "gzip"}, gzip.compress(b'{"data": [[1]]}')[:-4]
NO_ROWS = {
    "no JSON": ("/predict", {}, b"<html>", "no JSON"),
    "no text": ("/predict", {}, b"\xff\xfe\x00", "no JSON"),
    "empty": ("/predict", {}, b"", "no JSON"),
    "deep": ("/predict", {}, b"[" * 100_000, "nested too deep"),
    "no object": ("/predict", {}, b"[[1]]", "no JSON object"),
    "another key": ("/predict", {}, b'{"rows_": [[1]]}', "no rows"),
    "no row": ("/predict", {}, b'{"data": []}', "no rows"),
    "a text": ("/predict", {}, b'{"data": "1,2"}', "no rows"),
    "ragged": ("/predict", {}, b'{"data": [[1, 2], [1]]}', "one length"),
    "true": ("/predict", {}, b'{"data": [[true, 2]]}', "no number"),
    "huge": ("/predict", {}, b'{"data": [[1%s]]}' % (b"0" * 400), "too large"),
    "digits": ("/predict", {}, b'{"data": [[1%s]]}' % (b"0" * 5000), "too large"),
    "dicts": ("/predict", {}, b'{"data": {"a": [[1]]}}', "no rows"),
    "two inputs": (TF, {}, b'{"instances": [{"a": [1], "b": [2]}]}', "2 inputs"),
    "base64": (TF, {}, b'{"instances": [{"b64": "aGk="}]}', "one length"),
    "mixed": (TF, {}, b'{"instances": [{"a": [1]}, [2]]}', "one length"),
    "neither": (TF, {}, b'{"examples": [{"a": 1}]}', "neither"),
    "classify": ("/v1/models/my_model:classify", {}, b'{"examples": [{"a": 1}]}', "predicts nothing"),
    "health": ("/health", {}, b"", "predicts nothing"),
    "a form without data": (TORCH, {"content-type": "application/x-www-form-urlencoded"}, b"x=1", "form"),
    "no gzip": ("/predict", GZIP, b'{"data": [[1]]}', "is not gzip"),
    "cut": ("/predict", GZIP, CUT, "cut off"),
    "br": ("/predict", {"content-encoding": "br"}, b"", "unknown Content-Encoding 'br'"),
    "bomb": ("/predict", GZIP, gzip.compress(bytes(20 << 20)), "larger than"),
    "no list": (INFER, {}, b'{"inputs": {}}', "no list"),
    "two tensors": (INFER, {}, json.dumps({"inputs": [tensor(data=FLAT)] * 2}).encode(), "2 inputs"),
    "too few": (INFER, {}, json.dumps({"inputs": [tensor(data=FLAT[1:])]}).encode(), "fill the shape"),
    "ragged data": (INFER, {}, json.dumps({"inputs": [tensor(data=[[1] * 5, [1]])]}).encode(), "fill the shape"),
    "negative": (INFER, {}, json.dumps({"inputs": [tensor(shape=[-2, -5], data=FLAT)]}).encode(), "fill the shape"),
    "words": (INFER, {}, json.dumps({"inputs": [tensor(datatype="BYTES", data=["a"] * 10)]}).encode(), "0 inputs"),
    "bad length": (INFER, {"inference-header-content-length": "-1"}, b"{}", "length of the JSON"),
    "long length": (INFER, {"inference-header-content-length": "3"}, b"{}", "length of the JSON"),
    "a tail": (INFER, *binary("inputs", [tensor()], bytes(41)), "no whole FP32"),
}


@pytest.mark.parametrize("kind", NO_ROWS)
def test_what_holds_no_rows_is_refused_with_a_reason(kind):
    path, headers, body, reason = NO_ROWS[kind]
    with pytest.raises(Unreadable, match=reason):
        read_rows(path, headers, body)


NO_PROBABILITIES = {
    "NaN": ("/predict", b'{"predictions": [[NaN, 1]]}', "not from 0 to 1"),
    "1.5": (TORCH, b"[[1.5, -0.5]]", "not from 0 to 1"),
    "three": (TORCH, b"[[0.5, 0.25, 0.25]]", "no pairs"),
    "labels": ("/predict", b'{"predictions": ["benign"]}', "no pairs"),
    "an error": (TORCH, b'{"code": 400, "message": "no"}', "no pairs"),
    "two": (TF, b'{"outputs": {"a": [[0, 1]], "b": [[0, 1]]}}', "2 outputs"),
    "uneven": (TF, b'{"predictions": [{"a": [0, 1]}, {"b": [0, 1]}]}', "no pairs"),
    "a number": ("/predict", b"5", "neither a JSON object nor a list"),
}


@pytest.mark.parametrize("kind", NO_PROBABILITIES)
def test_what_holds_no_probabilities_is_refused_with_a_reason(kind):
    path, body, reason = NO_PROBABILITIES[kind]
    with pytest.raises(Unreadable, match=reason):
        read_probabilities(path, {}, body)
