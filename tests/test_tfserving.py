"""TensorFlow Serving's folder with the classifier: training, the three ways to serve, REST, gRPC, the client."""

import contextlib
import gzip
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import yaml

from bad_requests import GOOD_ROW, bad_requests
from client.ask import ask, send
from endpoints.base import REPOSITORY_DIR, Request, load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import DEADLINE_S, call_main, get, load_script, post, run_python, stop_impatiently, wait_until
from machine.free_ports import find_free_ports

FOLDER = REPOSITORY_DIR / "tfserving"
PREDICT = "/v1/models/my_model:predict"

# Numbers to TensorFlow Serving, by its own documentation; the last becomes infinity.
ACCEPTED = {"NaN", "Infinity", "minus Infinity", "larger than float32"}
WORDS = {  # what each refusal must name
    "four features": "[1,4] is not compatible with expected shape [?,5]",
    "six features": "[1,6] is not compatible with expected shape [?,5]",
    "ragged rows": "element: 1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting tensor size: 5 but got: 4",
    "empty batch": "No values in 'instances' array",
    "empty row": "[1,0] is not compatible with expected shape [?,5]",
    "a string among numbers": 'JSON Value: "abc" Type: String is not of expected type: float',
    "a numeric string": 'JSON Value: "13.82" Type: String is not of expected type: float',
    "null among numbers": "Type: Null is not of expected type: float",
    "null instead of rows": "Excepting 'instances' to be an list/array",
    "a string instead of rows": "Excepting 'instances' to be an list/array",
    "a number instead of rows": "Excepting 'instances' to be an list/array",
    "nested too deep": "[1,5,1] is not compatible with expected shape [?,5]",
    "the wrong key": "Missing 'inputs' or 'instances' key",
    "an array instead of an object": "Is not object",
    "malformed JSON": "JSON Parse error: Missing a comma or ] after an array element. at offset: 52",
    "an empty body": "JSON Parse error: The document is empty",
    "not UTF-8": "Excepting 'instances' to be an list/array",
    "the wrong content type": "JSON Parse error: Invalid value. at offset: 0",
    "10 MB of junk": "JSON Parse error: Invalid value. at offset: 0",
    "10 MB of brackets": "nested too deep",
    "an unknown version": "Servable not found for request: Specific(my_model, 99)",
}


@pytest.fixture(scope="module")
def rest_port(tfserving_server) -> int:
    return tfserving_server.endpoint.ports["rest"]


@pytest.fixture(scope="module")
def grpc_port(tfserving_server) -> int:
    return tfserving_server.endpoint.ports["grpc"]


@pytest.fixture(scope="module")
def client():
    return load_script(FOLDER / "client.py")


# The contract.


@pytest.mark.parametrize("version", ["1", "2"])
def test_rest_gives_the_reference_probabilities(tfserving_server, version):
    rows, _ = load_test_rows()
    assert np.abs(ask(tfserving_server.endpoint, rows, version) - load_expected(version)).max() <= TOLERANCE


@pytest.mark.parametrize("version", ["1", "2"])
def test_grpc_gives_the_reference_probabilities(client, grpc_port, version):
    rows, _ = load_test_rows()
    answer = client.predict_grpc(rows, port=grpc_port, version=version)
    assert np.abs(answer - load_expected(version)).max() <= TOLERANCE


def test_the_newest_version_answers_where_none_is_named(client, rest_port, grpc_port):
    rows, _ = load_test_rows()
    for answer in (client.predict(rows, port=rest_port), client.predict_grpc(rows, port=grpc_port)):
        assert np.abs(answer - load_expected("2")).max() <= TOLERANCE


@pytest.mark.parametrize(("label", "version"), [("stable", "1"), ("canary", "2")])
def test_labels_name_versions(client, rest_port, grpc_port, label, version):
    rows, _ = load_test_rows()
    for answer in (
        client.predict(rows, port=rest_port, label=label),
        client.predict_grpc(rows, port=grpc_port, label=label),
    ):
        assert np.abs(answer - load_expected(version)).max() <= TOLERANCE


def test_a_body_may_hold_one_row_or_thousands(tfserving_server):
    rows, _ = load_test_rows()
    expected = load_expected("1")
    assert np.abs(ask(tfserving_server.endpoint, rows[:1], "1") - expected[:1]).max() <= TOLERANCE
    many = ask(tfserving_server.endpoint, rows * 40, "1")  # 4,560 rows, beyond what is answered inline
    assert np.abs(many - np.tile(expected, (40, 1))).max() <= TOLERANCE


def test_integers_and_floats_are_the_same_numbers(rest_port):
    as_integers = post(rest_port, PREDICT, b'{"instances": [[14, 20, 0, 0, 0]]}')
    as_floats = post(rest_port, PREDICT, b'{"instances": [[14.0, 20.0, 0.0, 0.0, 0.0]]}')
    assert as_integers == as_floats
    assert as_integers[0] == 200


def test_the_request_of_the_document_works_as_written(rest_port):
    status, reply = post(rest_port, PREDICT, b'{"instances": [[1.0, 2.0, 3.0, 4.0, 5.0]]}')
    assert status == 200
    assert np.sum(reply["predictions"]) == pytest.approx(1.0)


# Bad requests.


def test_every_bad_request_is_refused_by_name_and_the_server_goes_on(tfserving_server):
    endpoint = tfserving_server.endpoint
    rows, _ = load_test_rows()
    for name, request in bad_requests(endpoint).items():
        status, body = send(endpoint.ports["rest"], request)
        if name in ACCEPTED:
            assert status == 200, name
        else:
            assert 400 <= status < 500, name
            assert WORDS[name] in json.loads(body)["error"], name
        answer = ask(endpoint, rows[:1], "1")
        assert np.abs(answer - load_expected("1")[:1]).max() <= TOLERANCE, f"after {name}"


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/v1/models/nope:predict", None, 404, "Servable not found for request: Latest(nope)"),
        ("/v1/models/my_model/labels/x:predict", None, 400, "Unrecognized servable version label: x"),
        (f"{PREDICT}/", None, 400, f"Malformed request: POST {PREDICT}/"),
        (f"{PREDICT}?a=1", None, 400, f"Malformed request: POST {PREDICT}?a=1"),
        ("/v1/models/my_model:guess", None, 400, "Malformed request: POST /v1/models/my_model:guess"),
        (PREDICT, b'{"instances": [[NaN, 1,}', 400, "JSON Parse error: Invalid value. at offset: 23"),
        (PREDICT, b'{"a": 1 "b": 2}', 400, "JSON Parse error: Missing a comma or } after an object member."),
        (PREDICT, b'{"a": 1e999}', 400, "JSON Parse error: Number too big to be stored in double."),
        ("/v1/models/nope:predict", b"{", 400, "JSON Parse error: Missing a name for object member. at offset: 1"),
        (
            PREDICT,
            b'{"signature_name": "z", "instances": [1]}',
            400,
            'Serving signature name: "z" not found in signature def',
        ),
        (PREDICT, b'{"instances": [[true, 0, 0, 0, 0]]}', 400, "JSON Value: true Type: True is not of expected type"),
        (PREDICT, b'{"instances": [1], "inputs": [1]}', 400, "expecting only one of 'inputs' or 'instances'"),
    ],
)
def test_errors_have_tensorflow_servings_status_and_text(rest_port, path, body, status, error):
    answered, reply = post(rest_port, path, body or {"instances": [GOOD_ROW]})
    assert (answered, error in reply["error"]) == (status, True), reply


@pytest.mark.parametrize("value", ["16777217", "1700000000000", "-9223372036854775808", "18446744073709551615", "1e39"])
def test_numbers_that_float32_cannot_hold_are_cast(rest_port, value):
    with np.errstate(over="ignore"):
        nearest = np.float32(float(value))
    as_written, as_held = (
        send(rest_port, Request(PREDICT, b'{"instances": [[%s, 20, 0.1, 0.1, 0.2]]}' % text.encode()))
        for text in (value, repr(float(nearest)).replace("inf", "Infinity"))
    )
    assert as_written == as_held
    assert as_written[0] == 200


def test_a_byte_order_mark_before_the_json_is_skipped(rest_port):
    body = json.dumps({"instances": [GOOD_ROW]}).encode()
    assert send(rest_port, Request(PREDICT, b"\xef\xbb\xbf" + body)) == send(rest_port, Request(PREDICT, body))
    status, reply = post(rest_port, PREDICT, b"\xef\xbb\xbf")
    assert (status, "The document is empty" in reply["error"]) == (400, True)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
def test_other_methods_are_malformed_requests(rest_port, method):
    status, body = send(rest_port, Request(PREDICT, b"", method=method))
    assert (status, json.loads(body)) == (400, {"error": f"Malformed request: {method} {PREDICT}"})


def test_a_path_outside_v1_is_a_404_page(rest_port):
    status, body = send(rest_port, Request("/predict", b"{}"))
    assert status == 404
    assert body.startswith(b"<html>")


# Formats.


def test_the_reply_is_laid_out_to_the_byte(rest_port):
    status, body = send(rest_port, Request(PREDICT, json.dumps({"instances": [GOOD_ROW]}).encode()))
    assert status == 200
    lines = body.decode().split("\n")
    assert (lines[0], lines[2:]) == ("{", ["    ]", "}"])
    assert lines[1].startswith('    "predictions": [[0.9')


def test_columns_and_named_rows_give_the_same_answer_as_rows(rest_port):
    plain = post(rest_port, PREDICT, {"instances": [GOOD_ROW, GOOD_ROW]})[1]["predictions"]
    assert post(rest_port, PREDICT, {"inputs": [GOOD_ROW, GOOD_ROW]})[1] == {"outputs": plain}
    assert post(rest_port, PREDICT, {"inputs": {"features": [GOOD_ROW, GOOD_ROW]}})[1] == {"outputs": plain}
    named = {"instances": [{"features": GOOD_ROW}] * 2, "signature_name": "serving_default", "ignored": [1]}
    assert post(rest_port, PREDICT, named)[1] == {"predictions": plain}


def test_one_connection_carries_gzip_and_plain_requests_of_any_content_type(rest_port):
    body = json.dumps({"instances": [GOOD_ROW]}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", rest_port, timeout=DEADLINE_S)
    replies = []
    for sent, headers in (
        (body, {}),
        (gzip.compress(body), {"Content-Encoding": "gzip"}),
        (body, {"Content-Type": "text/plain"}),
        (b"no gzip", {"Content-Encoding": "gzip"}),
    ):
        connection.request("POST", PREDICT, sent, headers)
        reply = connection.getresponse()
        assert reply.getheader("Content-Encoding") is None
        replies.append((reply.status, reply.read()))
    connection.close()
    assert replies[0] == replies[1] == replies[2]
    assert replies[0][0] == 200
    assert (replies[3][0], b"The document is empty" in replies[3][1]) == (400, True)


def test_status_tells_every_version_newest_first(rest_port):
    available = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    both = {"model_version_status": [{"version": "2", **available}, {"version": "1", **available}]}
    assert get(rest_port, "/v1/models/my_model") == (200, both)
    first = {"model_version_status": both["model_version_status"][1:]}
    assert get(rest_port, "/v1/models/my_model/versions/1") == (200, first)
    assert get(rest_port, "/v1/models/my_model/labels/stable") == (200, first)
    assert get(rest_port, "/v1/models/nope") == (404, {"error": "Could not find any versions of model nope"})
    status, reply = get(rest_port, "/v1/models/my_model/versions/9")
    assert (status, reply) == (404, {"error": "Could not find version 9 of model my_model"})


def test_metadata_tells_the_signature(rest_port):
    status, reply = get(rest_port, "/v1/models/my_model/versions/1/metadata")
    assert status == 200
    assert reply["model_spec"] == {"name": "my_model", "signature_name": "", "version": "1"}
    signature = reply["metadata"]["signature_def"]["signature_def"]["serving_default"]
    features = signature["inputs"]["features"]
    assert features["dtype"] == "DT_FLOAT"
    assert [dim["size"] for dim in features["tensor_shape"]["dim"]] == ["-1", "5"]
    assert signature["method_name"] == "tensorflow/serving/predict"


# gRPC.


@pytest.fixture(scope="module")
def grpc_calls(client, grpc_port):
    """(message modules by name, PredictionService stub, ModelService stub) of the running server."""
    predict_pb2, prediction_grpc = client.import_stubs()
    with client.messages_without_tensorflow():
        from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_service_pb2_grpc

    modules = {"predict": predict_pb2, "metadata": get_model_metadata_pb2, "status": get_model_status_pb2}
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        yield modules, prediction_grpc.PredictionServiceStub(channel), model_service_pb2_grpc.ModelServiceStub(channel)


def predict_request(modules, rows, dtype: int = 1, name: str = "my_model", alias: str = "features"):
    """A PredictRequest of `rows`, in DT_FLOAT (1) or DT_DOUBLE (2)."""
    request = modules["predict"].PredictRequest()
    request.model_spec.name = name
    array = np.array(rows, {1: "<f4", 2: "<f8"}[dtype])
    tensor = request.inputs[alias]
    tensor.dtype = dtype
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = array.tobytes()
    return request


def test_a_grpc_reply_carries_version_signature_and_typed_values(grpc_calls):
    modules, prediction, _ = grpc_calls
    reply = prediction.Predict(predict_request(modules, [GOOD_ROW]))
    assert (reply.model_spec.name, reply.model_spec.version.value) == ("my_model", 2)
    assert reply.model_spec.signature_name == "serving_default"
    output = reply.outputs["probabilities"]
    assert len(output.float_val) == 2
    assert not output.tensor_content


def test_grpc_errors_have_tensorflow_servings_code_and_text(grpc_calls):
    modules, prediction, models = grpc_calls

    def check(call, request, code, text):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=DEADLINE_S)
        assert (caught.value.code().name, text in caught.value.details()) == (code, True), caught.value.details()

    good = [GOOD_ROW]
    unknown_version, unknown_label, unknown_signature, no_inputs, twice = (
        predict_request(modules, good) for _ in range(5)
    )
    unknown_version.model_spec.version.value = 99
    unknown_label.model_spec.version_label = "x"
    unknown_signature.model_spec.signature_name = "z"
    no_inputs.inputs.clear()
    twice.output_filter.extend(["probabilities", "probabilities"])
    scalar = predict_request(modules, 1.0)
    forged = predict_request(modules, good)
    forged.inputs["features"].tensor_shape.dim[0].size = 2**40
    for request, code, text in (
        (modules["predict"].PredictRequest(), "INVALID_ARGUMENT", "Missing ModelSpec"),
        (predict_request(modules, good, name="nope"), "NOT_FOUND", "Latest(nope)"),
        (unknown_version, "NOT_FOUND", "Servable not found for request: Specific(my_model, 99)"),
        (unknown_label, "INVALID_ARGUMENT", "Unrecognized servable version label: x"),
        (unknown_signature, "FAILED_PRECONDITION", 'Serving signature key "z" not found.'),
        (no_inputs, "INVALID_ARGUMENT", "input size does not match signature: 0!=1"),
        (predict_request(modules, good, alias="x"), "INVALID_ARGUMENT", "input tensor alias not found in signature: x"),
        (predict_request(modules, good, dtype=2), "INVALID_ARGUMENT", "arg[0] to be float but double is provided"),
        (predict_request(modules, [GOOD_ROW[:4]]), "INVALID_ARGUMENT", "[1,4] is not compatible"),
        (scalar, "INVALID_ARGUMENT", "[] is not compatible with expected shape"),
        (twice, "INVALID_ARGUMENT", "duplicate output tensor alias: probabilities"),
        (forged, "INVALID_ARGUMENT", "tensor parsing error: features"),
    ):
        check(prediction.Predict, request, code, text)
    status = modules["status"].GetModelStatusRequest()
    status.model_spec.name = "nope"
    check(models.GetModelStatus, status, "NOT_FOUND", "Could not find any versions of model nope")
    assert prediction.Predict(predict_request(modules, good)).outputs


def field(number: int, payload: bytes) -> bytes:
    """A protobuf field of wire type 2 with fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(payload)]) + payload


def test_a_request_like_one_before_it_is_answered_by_its_own_numbers(grpc_calls, grpc_port):
    """The local server does not parse a request whose like it has parsed before; these all try to mislead it."""
    modules, *_ = grpc_calls
    rows, _ = load_test_rows()
    expected = {version: load_expected(version) for version in ("1", "2")}
    floats = [np.array(row, "<f4").tobytes() for row in rows]
    spec = {version: field(1, field(1, b"my_model") + field(2, b"\x08" + bytes([int(version)]))) for version in "12"}
    shape = field(2, b"\x12\x02\x08\x01" + b"\x12\x02\x08\x05")

    def entry(tensor: bytes) -> bytes:
        return field(2, field(1, b"features") + field(2, b"\x08\x01" + shape + tensor))

    number = {row: i for i, row in enumerate(floats)}
    kinds = {  # each takes the last bytes of the message, and says which row the rest of it means
        "numbers last": lambda row: (entry(field(4, row)), row),
        "numbers one by one": lambda row: (entry(field(5, row)), row),
        "an unknown field last": lambda row: (entry(field(4, floats[0])) + field(15, row), floats[0]),
        "an unknown field of the tensor last": lambda row: (
            entry(field(4, floats[0]) + b"\x82\x06\x14" + row),
            floats[0],
        ),
        "twice": lambda row: (entry(field(4, floats[0])) + entry(field(4, row)), row),
        "an output named after it": lambda row: (entry(field(4, row)) + field(3, b"probabilities"), row),
    }
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        for kind, make in kinds.items():
            for i in (0, 0, 1, 2, 3):
                for version in ("1", "2"):
                    inputs, meant = make(floats[i])
                    message = spec[version] + inputs
                    parsed = modules["predict"].PredictRequest.FromString(message).inputs["features"]
                    assert meant in (parsed.tensor_content, np.array(parsed.float_val, "<f4").tobytes())
                    reply = modules["predict"].PredictResponse.FromString(call(message, timeout=DEADLINE_S))
                    assert reply.model_spec.version.value == int(version)
                    answer = np.array(reply.outputs["probabilities"].float_val)
                    wanted = expected[version][number[meant]]
                    assert np.abs(answer - wanted).max() <= TOLERANCE, (kind, i, version)


def test_grpc_tells_status_and_metadata(grpc_calls):
    modules, prediction, models = grpc_calls
    status = modules["status"].GetModelStatusRequest()
    status.model_spec.name = "my_model"
    assert [entry.version for entry in models.GetModelStatus(status).model_version_status] == [2, 1]
    metadata = modules["metadata"].GetModelMetadataRequest(metadata_field=["signature_def"])
    metadata.model_spec.name = "my_model"
    reply = prediction.GetModelMetadata(metadata)
    signatures = modules["metadata"].SignatureDefMap()
    reply.metadata["signature_def"].Unpack(signatures)
    assert reply.model_spec.version.value == 2
    assert list(signatures.signature_def["serving_default"].inputs) == ["features"]


# The client.


def test_the_client_prints_the_same_probabilities_over_both_transports(client, rest_port, grpc_port):
    ports = ["--rest-port", rest_port, "--grpc-port", grpc_port]
    done = call_main(client, *ports, "--version", "1", "--rows", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "REST row 1: malignant 0.760781, benign 0.239219 (truth: malignant)"
    assert lines[2:4] == [line.replace("REST", "gRPC") for line in lines[:2]]
    done = call_main(client, *ports, "--label", "nope")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "Unrecognized servable version label: nope" in done.stderr


def test_the_client_says_in_one_line_that_no_server_runs(client):
    port = find_free_ports(["none"])["none"]
    for function in (client.predict, client.predict_grpc):
        with pytest.raises(client.ClientError, match="nothing answers at 127.0.0.1:.*python serve.py"):
            function([GOOD_ROW], port=port)


ODD_REPLIES = {  # what another program, or a server that dies, may answer; and a word of the one line for it
    b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>": "without probabilities",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]": "without probabilities",
    b'HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n{"predictions":[[1,2],[1]]}': "without probabilities",
    b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"predictions":[]}': "without probabilities",
    b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n{}": "ChunkedEncodingError",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}": "ContentDecodingError",
    b"HTTP/1.1 302 Found\r\nLocation: foo://a\r\nContent-Length: 0\r\n\r\n": "InvalidSchema",
}


@pytest.mark.parametrize("reply", ODD_REPLIES, ids=lambda reply: ODD_REPLIES[reply])
def test_the_client_says_in_one_line_that_another_program_answers(client, reply):
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(reply)

        answering = pool.submit(answer)
        with pytest.raises(client.ClientError, match=f"{ODD_REPLIES[reply]}.*is it another program"):
            client.predict([GOOD_ROW], port=listener.getsockname()[1])
        answering.result(DEADLINE_S)


def test_the_client_does_not_import_tensorflow():
    code = "import sys, client; client.import_stubs(); print([m for m in sys.modules if m.startswith('tensorflow.')])"
    assert run_python("-c", code, cwd=FOLDER).stdout == "[]\n"


# The launcher.


STAND_IN = """\
#!{python}
import os, pathlib, shutil, signal, sys, time
record = pathlib.Path({record!r})
name = pathlib.Path(sys.argv[0]).name
with record.open("a") as file:
    print(name, *sys.argv[1:], sep="|", file=file)
if name == "docker" and sys.argv[1] != "run":
    failing = os.environ.get("FAKE_DOCKER_FAILS", "").split(",")
    sys.exit(sys.argv[1] in failing)
for flag in sys.argv:
    if flag.startswith("--model_config_file=") and name != "docker":
        shutil.copy(flag.partition("=")[2], record.with_name("config"))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("stand-in ready", os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def copied_folder(tmp_path) -> Path:
    """The launcher with an empty model, a local/server.py and a PATH of stand-ins: nothing of TensorFlow runs."""
    folder = tmp_path / "tfserving"
    (folder / "models" / "my_model" / "1").mkdir(parents=True)
    (folder / "models" / "my_model" / "1" / "saved_model.pb").touch()
    for name in ("serve.py", "models.config", "monitoring.config"):
        shutil.copy(FOLDER / name, folder)
    (folder / "local").mkdir()
    write_stand_in(folder / "local" / "server.py", tmp_path)
    (tmp_path / "bin").mkdir()
    return folder


def write_stand_in(path: Path, tmp_path: Path) -> None:
    path.write_text(STAND_IN.format(python=sys.executable, record=str(tmp_path / "record")))
    path.chmod(0o755)


class Launcher:
    """`python serve.py` in `folder`, with only `folder`/../bin and no real docker on PATH; ready once a server is."""

    def __init__(self, folder: Path, *arguments: str, docker_fails: str = ""):
        self.ports = find_free_ports(["rest", "grpc"])
        self.record = folder.parent / "record"
        environment = {**os.environ, "PATH": str(folder.parent / "bin"), "FAKE_DOCKER_FAILS": docker_fails}
        environment["TMPDIR"] = str(folder.parent)  # what a killed launcher leaves goes with the test
        ports = [f"--{role}-port={port}" for role, port in self.ports.items()]
        self.process = subprocess.Popen(
            [sys.executable, "serve.py", *ports, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith("stand-in ready"):
                self.server = psutil.Process(int(line.split()[-1]))
                break

    def calls(self) -> list[list[str]]:
        return [line.split("|") for line in self.record.read_text().splitlines()]

    def stop(self, number: int, expected_errors: str = "") -> None:
        """Send the signal; assert exit code 0, the server gone, a last line and `expected_errors` on stderr."""
        self.process.send_signal(number)
        self.assert_ended(expected_errors)

    def assert_ended(self, expected_errors: str = "") -> None:
        output, errors = self.process.communicate(timeout=DEADLINE_S)
        assert (self.process.returncode, errors) == (0, expected_errors)
        assert output.splitlines()[-1] == "stopped"
        assert not self.server.is_running()


@pytest.fixture
def launch(copied_folder):
    """A function that starts the launcher of `copied_folder`; what a failed test leaves running ends with it."""
    started = []

    def start(*arguments: str, docker_fails: str = "") -> Launcher:
        started.append(Launcher(copied_folder, *arguments, docker_fails=docker_fails))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.terminate()
        launcher.process.communicate(timeout=DEADLINE_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_tensorflow_model_server_on_the_path_comes_first(launch, copied_folder, tmp_path, number):
    program = tmp_path / "bin" / "tensorflow_model_server"
    write_stand_in(program, tmp_path)
    write_stand_in(tmp_path / "bin" / "docker", tmp_path)
    launcher = launch()
    assert launcher.lines[0] == f"serving with native: {program}"
    ((name, *flags),) = launcher.calls()
    assert name == "tensorflow_model_server"
    assert flags[:2] == [f"--port={launcher.ports['grpc']}", f"--rest_api_port={launcher.ports['rest']}"]
    assert "--allow_version_labels_for_unavailable_models=true" in flags
    config = (tmp_path / "config").read_text()
    assert f'base_path: "{copied_folder}/models/my_model"' in config
    launcher.stop(number)
    assert not Path(flags[2].partition("=")[2]).exists(), "the rendered config is left behind"


def test_the_docker_image_comes_second_and_is_stopped_by_name(launch, copied_folder, tmp_path):
    write_stand_in(tmp_path / "bin" / "docker", tmp_path)
    launcher = launch()
    image = yaml.safe_load((FOLDER / "docker-compose.yml").read_text())["services"]["tfserving"]["image"]
    assert launcher.lines[0] == f"serving with docker: {image}"
    *questions, run = [call[1:] for call in launcher.calls()]
    assert questions == [["info"], ["image", "inspect", image]]
    assert f"127.0.0.1:{launcher.ports['rest']}:8501" in run
    assert f"127.0.0.1:{launcher.ports['grpc']}:8500" in run
    assert f"{copied_folder}/models:/models:ro" in run
    assert run[run.index(image) + 1 :] == [
        "--model_config_file=/config/models.config",
        "--model_config_file_poll_wait_seconds=1",
        "--allow_version_labels_for_unavailable_models=true",
        "--monitoring_config_file=/config/monitoring.config",
    ]
    mounted = Path(next(volume for volume in run if volume.endswith(":/config:ro")).removesuffix(":/config:ro"))
    for name in ("models.config", "monitoring.config"):
        assert (mounted / name).read_text() == (FOLDER / name).read_text(), "a container's paths are those of the file"
    edited = (FOLDER / "models.config").read_text().replace('"canary" value: 2', '"canary" value: 1')
    (copied_folder / "edited.config").write_text(edited)
    (copied_folder / "edited.config").replace(copied_folder / "models.config")
    wait_until(lambda: (mounted / "models.config").read_text() == edited, "the edited config is not handed on")
    launcher.stop(signal.SIGTERM)
    assert launcher.calls()[-1][1:] == ["stop", "--time", "5", run[run.index("--name") + 1]]


@pytest.mark.parametrize(
    ("fails", "said"), [("info", ""), ("image,pull", "fetching tensorflow/serving:2.21.0, once\n")]
)
def test_the_local_server_comes_last(launch, tmp_path, fails, said):
    write_stand_in(tmp_path / "bin" / "docker", tmp_path)
    launcher = launch(docker_fails=fails)
    assert launcher.lines[0] == "serving with local: local/server.py"
    assert launcher.calls()[-1][0] == "server.py"
    launcher.stop(signal.SIGTERM, said)


def test_a_server_can_be_chosen(launch, tmp_path):
    write_stand_in(tmp_path / "bin" / "tensorflow_model_server", tmp_path)
    launcher = launch("--server", "local")
    assert launcher.lines[0] == "serving with local: local/server.py"
    stop_impatiently(launcher.process, signal.SIGINT)
    launcher.assert_ended()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has gone")
def test_killing_the_launcher_outright_ends_the_server_too(launch):
    launcher = launch("--server", "local")
    launcher.process.kill()
    launcher.process.communicate(timeout=DEADLINE_S)
    _, left = psutil.wait_procs([launcher.server], timeout=DEADLINE_S)
    assert not left


def test_the_endpoint_reads_the_kind_from_the_launchers_first_line(tfserving_server):
    assert tfserving_server.log().startswith(f"serving with {tfserving_server.kind}: ")
    endpoint = load_endpoints()["tfserving"]()
    for kind in ("native", "docker", "local"):
        assert endpoint.kind_from_log(f"serving with {kind}: x\nready\n") == kind


def test_the_launcher_says_in_one_line_what_is_missing(copied_folder, tfserving_server, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    serve = load_script(copied_folder / "serve.py")

    def says(text: str, *arguments: str) -> None:
        done = call_main(serve, *arguments)
        assert (done.returncode, len(done.stderr.splitlines()), text in done.stderr) == (1, 1, True), done.stderr

    ports = [f"--{role}-port={port}" for role, port in find_free_ports(["rest", "grpc"]).items()]
    says("no tensorflow_model_server on PATH", *ports, "--server", "native")
    says("no docker on PATH", *ports, "--server", "docker")
    for role, port in tfserving_server.endpoint.ports.items():
        says(f"127.0.0.1:{port} (--{role}-port) is in use", *ports, f"--{role}-port={port}")
    shutil.rmtree(copied_folder / "models" / "my_model")
    says("run python export_model.py", *ports)


def test_a_server_that_ends_by_itself_is_an_error(launch):
    launcher = launch("--server", "local")
    launcher.server.terminate()
    _, errors = launcher.process.communicate(timeout=DEADLINE_S)
    assert launcher.process.returncode == 1
    assert "local/server.py ended with exit code 7" in errors


# Training and export.


@pytest.mark.slow
def test_training_again_writes_the_same_bytes_and_shows_a_bar_on_a_terminal(tmp_path):
    keyboard, screen = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "export_model.py", "--models-dir", str(tmp_path)],
        cwd=FOLDER,
        env={**os.environ, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=screen,
        text=True,
    )
    os.close(screen)
    shown = b""
    with contextlib.suppress(OSError):  # its end
        while drawn := os.read(keyboard, 65536):
            shown += drawn
    os.close(keyboard)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, shown
    results = ["version 1: test accuracy 0.9386, log loss 0.3325", "version 2: test accuracy 0.9386, log loss 0.1559"]
    assert output.splitlines() == [*results, f"wrote versions 1 and 2 to {tmp_path / 'my_model'}"]
    steps = [b"importing TensorFlow", b"training version 1", b"training version 2"]
    assert [step in shown for step in steps] == [True] * 3, shown
    first, folder = FOLDER / "models" / "my_model", tmp_path / "my_model"
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "fingerprint.pb":  # holds a random id
            assert path.read_bytes() == (first / path.relative_to(folder)).read_bytes(), path.name
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"], "an unfinished export is left behind"


def test_an_export_without_data_prints_one_line_before_tensorflow_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # cannot be imported
    export_model = load_script(FOLDER / "export_model.py")
    done = call_main(export_model, "--data-dir", tmp_path, "--models-dir", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "run python make_data.py in data" in done.stderr


def test_ctrl_c_during_an_export_prints_one_line(tmp_path):
    (tmp_path / "tensorflow.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(300)\n")
    done = run_python("export_model.py", "--models-dir", tmp_path, cwd=FOLDER, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    # What stands in for the bar where there is no terminal, then what has happened.
    assert [line.partition(" ")[0] for line in done.stderr.splitlines()] == ["training", "export_model:"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "stop"),
    [
        ("importing TensorFlow", signal.SIGINT),
        ("training version 1", signal.SIGINT),
        ("exporting version 1", signal.SIGINT),
        ("exporting version 1", signal.SIGTERM),
    ],
)
def test_a_stop_signal_at_any_step_of_an_export_is_one_line_and_leaves_nothing(tmp_path, step, stop):
    keyboard, screen = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "export_model.py", "--models-dir", tmp_path / "models"],
        cwd=FOLDER,
        env={**os.environ, "TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=screen,
    )
    os.close(screen)
    shown, is_asked = b"", False
    with contextlib.suppress(OSError):  # its end
        while drawn := os.read(keyboard, 65536):
            shown += drawn
            if step.encode() in shown and not is_asked:
                process.send_signal(stop)
                is_asked = True
    os.close(keyboard)
    assert process.wait(DEADLINE_S) == 1
    assert b"Traceback" not in shown
    assert shown.rpartition(b"\r\x1b[K")[2].decode().splitlines() == [
        "export_model: interrupted; an unfinished version is as it was before"
    ]
    assert not list((tmp_path / "models").rglob("writing-*"))


def test_the_compose_file_and_the_config_agree():
    service = yaml.safe_load((FOLDER / "docker-compose.yml").read_text())["services"]["tfserving"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    configs = {f"./{name}": f"/config/{name}" for name in ("models.config", "monitoring.config")}
    assert mounts == {"./models": "/models", **configs}
    assert "--model_config_file=/config/models.config" in service["command"]
    assert "--monitoring_config_file=/config/monitoring.config" in service["command"]
    assert 'base_path: "/models/my_model"' in (FOLDER / "models.config").read_text()
