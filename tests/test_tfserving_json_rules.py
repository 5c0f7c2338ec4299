"""What TensorFlow Serving reads of a predict request's JSON, and what it says to all else: its rules, and our server.

The rules are those of upstream's json_tensor.cc, of RapidJSON 1.1.0 (reader.h, error/en.h) with kParseNanAndInfFlag,
and of Abseil's Base64Unescape.
"""

import gzip
import http.client
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bad_requests import GOOD_ROW
from client.ask import send
from endpoints.base import Request
from helpers import DEADLINE_S
from json_forms import Raw, spell

PREDICT = "/v1/models/my_model:predict"
PROFILE = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ROW = json.dumps(GOOD_ROW)

# Tokens that are numbers to RapidJSON, and what they are.
NUMBERS = {
    "0": 0.0, "-0": 0.0, "-0.0": -0.0, "1E+2": 1e2, "1e-400": 0.0, "5e-324": 5e-324, "16777217": 16777217.0,
    "18446744073709551615": 2.0**64, "18446744073709551616": 2.0**64, "-9223372036854775809": -(2.0**63),
    "123456789012345678901234567890": 123456789012345678901234567890.0, "1e39": 1e39, "-1e308": -1e308,
    "NaN": np.nan, "-NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf, "Infinity": np.inf, "-Infinity": -np.inf,
}  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
CELLS = st.sampled_from(sorted(NUMBERS)).map(lambda token: (Raw(token), NUMBERS[token])) | st.floats(
    -100, 100, allow_nan=False
).map(lambda value: (value, value))


@pytest.fixture(scope="module")
def port(tfserving_server) -> int:
    return tfserving_server.endpoint.ports["rest"]


def ask(port: int, body: bytes, **headers: str) -> tuple[int, Any]:
    status, reply = send(
        port, Request(PREDICT, body, headers={name.replace("_", "-"): v for name, v in headers.items()})
    )
    return status, json.loads(reply)


def canonical(port: int, table: list[list[float]]) -> list:
    """Return the answer to rows of float32, written in the plainest way."""
    with np.errstate(over="ignore"):
        rows = [[float(np.float32(value)) for value in row] for row in table]
    status, reply = ask(port, json.dumps({"instances": rows}).encode())
    assert status == 200, reply
    return reply["predictions"]


def test_every_legal_form_of_the_same_rows_has_the_same_answer(port):
    shapes = {
        "instances": lambda rows: ("instances", rows),
        "named instances": lambda rows: ("instances", [{"features": row} for row in rows]),
        "inputs": lambda rows: ("inputs", rows),
        "named inputs": lambda rows: ("inputs", {"other": [1], "features": rows}),
    }

    @PROFILE
    @given(
        st.lists(st.lists(CELLS, min_size=5, max_size=5), min_size=1, max_size=3),
        st.sampled_from(sorted(shapes)),
        st.dictionaries(st.sampled_from(["x", "instance", "Inputs", "é"]), JUNK, max_size=2),
        st.sampled_from([{}, {"signature_name": ""}, {"signature_name": "serving_default"}]),
        st.sampled_from([b"", b"\xef\xbb\xbf"]),
        st.sampled_from([b"", b"\0", b"\0{junk"]),
        st.booleans(),
        st.integers(0, 2**32),
    )
    def check(table, shape, ignored, signature, mark, end, is_compressed, seed):
        written, values = ([[cell[at] for cell in row] for row in table] for at in (0, 1))
        key, rows = shapes[shape](written)
        members = [(key, rows), *ignored.items(), *signature.items()]
        body = mark + spell(dict(members if seed % 2 else members[::-1]), seed).encode() + end
        sent = gzip.compress(body) if is_compressed else body
        status, reply = ask(port, sent, **({"Content_Encoding": "gzip"} if is_compressed else {}))
        assert status == 200, (body, reply)
        np.testing.assert_array_equal(
            reply["predictions" if key == "instances" else "outputs"], canonical(port, values)
        )

    check()


def test_of_members_with_one_name_the_first_counts(port):
    first, second = json.dumps([GOOD_ROW]), "[[1, 2, 3, 4, 5]]"
    expected = ask(port, b'{"instances": %b}' % first.encode())
    for text in (
        f'{{"instances": {first}, "instances": {second}}}',
        f'{{"instances": {first}, "instances": 5}}',
        f'{{"instances": {first}, "in\\u0073tances": {second}}}',
        f'{{"in\\u0073tances": {first}, "instances": {second}}}',
        f'{{"signature_name": "", "instances": {first}, "signature_name": "x"}}',
    ):
        assert ask(port, text.encode()) == expected, text
    status, reply = ask(port, f'{{"signature_name": "x", "signature_name": "", "instances": {first}}}'.encode())
    assert (status, reply["error"]) == (400, 'Serving signature name: "x" not found in signature def')


# A value in the place of the second row's third feature, and what is said of it.
WRONG_VALUES = {
    '"0.1"': 'JSON Value: "0.1" Type: String is not of expected type: float',
    "true": "JSON Value: true Type: True is not of expected type: float",
    "null": "JSON Value: null Type: Null is not of expected type: float",
    "{}": "Type: Object is not of expected type: float",
    '{"b64": "AA=="}': "Type: Object is not of expected type: float",
    "[0.1]": "Encountered list at unexpected level: 1 expected < 1",
    "[]": "Encountered list at unexpected level: 1 expected < 1",
}


@pytest.mark.parametrize("value", WRONG_VALUES)
@pytest.mark.parametrize("seed", range(4))
def test_a_value_that_is_no_number_is_told_with_its_row(port, value, seed):
    rows = spell([GOOD_ROW, [*GOOD_ROW[:2], Raw(value), *GOOD_ROW[3:]]], seed)
    told = WRONG_VALUES[value]
    status, reply = ask(port, f'{{"instances": {rows}}}'.encode())
    assert status == 400, reply
    assert reply["error"].startswith("Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: ")
    assert told in reply["error"]
    status, reply = ask(port, f'{{"inputs": {rows}}}'.encode())
    assert (status, told.replace("level: 1 expected < 1", "level: 2 expected < 2") in reply["error"]) == (400, True), (
        reply
    )


FORMS = {
    "[]": "Is not object",
    "5": "Is not object",
    "{}": "Missing 'inputs' or 'instances' key",
    '{"Instances": [1]}': "Missing 'inputs' or 'instances' key",
    '{"instances": {}}': "Excepting 'instances' to be an list/array",
    '{"instances": []}': "No values in 'instances' array",
    f'{{"instances": [{ROW}], "inputs": [{ROW}]}}': "expecting only one of 'inputs' or 'instances' keys to exist",
    f'{{"signature_name": 5, "instances": [{ROW}]}}': "'signature_name' key must be a string value",
    f'{{"signature_name": "x", "instances": [{ROW}]}}': 'Serving signature name: "x" not found in signature def',
    f'{{"instances": [{{"features": {ROW}}}, {ROW}]}}': "Expecting object but got list at item 1 of input list",
    f'{{"instances": [{ROW}, {{"features": {ROW}}}]}}': "Expecting value/list but got object at item 1 of input list",
    '{"instances": [{"x": 1}]}': "does not have named input: x",
    '{"instances": [{}]}': "Failed to process element: 0 of 'instances' list. JSON object: {}",
    '{"inputs": {"x": 1}}': "Missing named input: features in 'inputs' object.",
    '{"instances": [[1, 2], [1]]}': "Expecting tensor size: 2 but got: 1",
    '{"instances": [[1, 2], [[1, 2]]]}': "Expecting shape [2] but got: [1,2]",
    '{"inputs": [[1, 2], [1]]}': "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
    '{"inputs": [[1, 2], 1]}': "JSON Value: 1 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
    '{"instances": [[1, 2, 3, 4]]}': "",
    '{"instances": [[]]}': "",
    '{"instances": [1, 2, 3, 4, 5]}': "",
}


@pytest.mark.parametrize("text", FORMS)
def test_another_form_is_refused_in_tensorflow_servings_words(port, text):
    status, reply = ask(port, text.encode())
    assert status == 400 and FORMS[text] in reply["error"], reply


MALFORMED = {  # message and offset
    b"": ("The document is empty", None),
    b"  \n": ("The document is empty.", 3),
    b"\0": ("The document is empty.", 0),
    b'{"a": 1': ("Missing a comma or } after an object member.", 7),
    b'{"a": [1 2]}': ("Missing a comma or ] after an array element.", 9),
    b'{"a": [1, "]"': ("Missing a comma or ] after an array element.", 13),
    b'{"a" 1}': ("Missing a colon after a name of object member.", 5),
    b"{a: 1}": ("Missing a name for object member.", 1),
    b'{"a": 1, }': ("Missing a name for object member.", 9),
    b'{"a": [1, ]}': ("Invalid value.", 10),
    b'{"a": tru}': ("Invalid value.", 9),
    b'{"a": -}': ("Invalid value.", 7),
    b'{"a": +1}': ("Invalid value.", 6),
    b'{"a": .5}': ("Invalid value.", 6),
    b'{"a": Nan}': ("Invalid value.", 8),
    b'{"a": Infi}': ("Invalid value.", 10),
    b'{"a": [Inf, -NaN, ?]}': ("Invalid value.", 18),
    b'{"a": 01}': ("Missing a comma or } after an object member.", 7),
    b'{"a": 1.}': ("Miss fraction part in number.", 8),
    b'{"a": 1.5e}': ("Miss exponent in number.", 10),
    b'{"a": 1E+}': ("Miss exponent in number.", 9),
    b'{"a": 1.5.2}': ("Missing a comma or } after an object member.", 9),
    b'{"a": 1e999}': ("Number too big to be stored in double.", None),
    b'{"a": "x': ("Missing a closing quotation mark in string.", 8),
    b'{"a": "x\0"}': ("Missing a closing quotation mark in string.", 8),
    b'{"a": "\t"}': ("Invalid escape character in string.", 7),
    b'{"a": "\\x"}': ("Invalid escape character in string.", 7),
    b'{"a": "\\u12g4"}': ("Incorrect hex digit after \\u escape in string.", 7),
    b'{"a": "\\ud800"}': ("The surrogate pair in string is invalid.", 7),
    b'{"a": "\\ud83d\\u0041"}': ("The surrogate pair in string is invalid.", 7),
    b"{} {}": ("The document root must not be followed by other values.", 3),
    b"{}\xc3\xa9": ("The document root must not be followed by other values.", 2),
    b"\xff\xfe{\0}\0": ("Invalid value.", 0),  # UTF-16
    b"\xef\xbb\xbf x": ("Invalid value.", 4),
    b"\xef\xbb\xbf\xef\xbb\xbf{}": ("Invalid value.", 3),
    b"\xbb\xef{}": ("Invalid value.", 1),  # each byte of a mark is passed over by itself
}


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: body.decode("latin-1"))
def test_what_is_no_json_is_told_in_rapidjsons_words_and_where(port, body):
    message, offset = MALFORMED[body]
    expected = f"JSON Parse error: {message}" + ("" if offset is None else f" at offset: {offset}")
    assert ask(port, body) == (400, {"error": expected})


def test_of_two_content_encodings_the_first_counts(port):
    body = gzip.compress(b'{"instances": [%b]}' % ROW.encode())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    connection.putrequest("POST", PREDICT)
    for name, value in (("Content-Encoding", "gzip"), ("Content-Encoding", "gzip"), ("Content-Length", len(body))):
        connection.putheader(name, str(value))
    connection.endheaders(body)
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("version", ["9" * 5000, "9223372036854775808"])
def test_a_version_beyond_64_bits_is_refused(port, version):
    for path, method in (
        (f"/v1/models/my_model/versions/{version}:predict", "POST"),
        (f"/v1/models/my_model/versions/{version}", "GET"),
    ):
        status, reply = send(port, Request(path, b"{}" if method == "POST" else b"", method=method))
        assert (status, json.loads(reply)["error"]) == (400, f"Failed to convert version: {version} to numeric.")
    status, _ = send(port, Request(f"/v1/models/my_model/versions/{'0' * 5000}1", b"", method="GET"))
    assert status == 200


def test_strings_that_rapidjson_lets_pass_are_passed_over(port):
    for text in (b'"\\udc00"', b'"\\ud83d\\ude00"', b'"\xff"', b'"\\\\ud800"', b'"\x7f\\/"'):
        assert ask(port, b'{"x": %b, "instances": [%b]}' % (text, ROW.encode()))[0] == 200, text
