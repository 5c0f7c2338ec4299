"""The local server as a stand-in for tensorflow_model_server: any SavedModel, versions, damage, flags, its end."""

import asyncio
import base64
import collections
import contextlib
import importlib
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType, SimpleNamespace

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf import text_format

import helpers
from bad_requests import GOOD_ROW
from client import grpc_connection
from client.ask import send
from endpoints.base import REPOSITORY_DIR, Request
from endpoints.predict_messages import METHOD, import_messages
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import DEADLINE_S, call_main, get, load_script, load_together, wait_until
from kept_models import find_or_make_models
from machine.free_ports import find_free_ports

FOLDER = REPOSITORY_DIR / "tfserving"
LOCAL_SERVER = FOLDER / "local" / "server.py"
MODELS = FOLDER / "models" / "my_model"
TESTS = REPOSITORY_DIR / "tests"
KERAS_2 = TESTS / "keras2"
MAX_MESSAGE_BYTES = 1_000_000  # of the gRPC side of the server under test
REST_TIMEOUT_S = 0.5  # of the server under test
SLOW_S = 0.2  # a run that takes so long is a slow graph's, whatever those before it took


def post(port: int, path: str, body: dict) -> tuple[int, dict]:
    return helpers.post(port, f"/v1/models/{path}", body)


def predict_request(model: str, alias: str, value: float) -> bytes:
    """Return a PredictRequest for one number, in DT_FLOAT."""
    request = import_messages().PredictRequest()
    request.model_spec.name = model
    tensor = request.inputs[alias]
    tensor.tensor_shape.dim.add(size=1)
    tensor.dtype = 1
    tensor.float_val.append(value)
    return request.SerializeToString()


def statuses(port: int, model: str) -> dict[str, dict]:
    status, reply = get(port, f"/v1/models/{model}")
    assert status == 200, reply
    return {entry["version"]: entry for entry in reply["model_version_status"]}


@contextlib.contextmanager
def running(log: Path, *command: str | Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """Start a local server, which prints into `log`, and wait until it is ready; kill it after the block."""
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: " ready at " in log.read_text(), log.read_text, while_alive=process)
        yield process
    finally:
        process.kill()
        process.wait()


def in_background(*arguments: str | Path) -> subprocess.Popen:
    """Start `python local/server.py`, whose output `finish` returns."""
    command = [sys.executable, "local/server.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Return the exit code and the lines of output of a process that is expected to end."""
    output, _ = process.communicate(timeout=DEADLINE_S)
    return process.returncode, output.splitlines()


@pytest.fixture(scope="module")
def toy_models(pytestconfig, tmp_path_factory) -> Path:
    """Return a copy of the folder that toy_saved_models.py fills, and in it the folder `gate` of its gated graph."""
    folder = tmp_path_factory.mktemp("toy_models")
    kept = find_or_make_models(pytestconfig.cache.mkdir("toy_models"))
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    (folder / "gate").mkdir()
    (folder / "gated" / "1" / "assets" / "gated.txt").write_text(f"{folder / 'gate'}\n")
    return folder


class Gate:
    """What the graph `gated` of toy_saved_models.py waits for: its runs end when the gate is opened."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Close the gate, until the end of the block at the latest."""
        for run in self.folder.glob("run-*"):
            run.unlink()
        (self.folder / "open").unlink(missing_ok=True)
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        (self.folder / "open").touch()

    def wait_for_run(self) -> None:
        """Wait until a run has begun since the gate was closed."""
        wait_until(lambda: list(self.folder.glob("run-*")), "no run of the gated graph begins")

    def make_slow(self, grpc_port: int) -> None:
        """Let one run take SLOW_S, so that the server knows the graph as slow."""
        with ThreadPoolExecutor(1) as pool, self.closed():
            call = pool.submit(call_gated, grpc_port)
            self.wait_for_run()
            time.sleep(SLOW_S)
            self.open()
            assert call.result()[0] == 200


def call_gated(grpc_port: int) -> tuple[int | str, bytes]:
    """Ask the gated graph over gRPC, which has no time limit."""
    request = Request(METHOD, predict_request("gated", "x", 1.0), content_type="application/grpc")
    return grpc_connection.send(grpc_port, request, timeout_s=DEADLINE_S)


@pytest.fixture(scope="module")
def gate(toy_models) -> Gate:
    return Gate(toy_models / "gate")


@pytest.fixture(scope="module")
def only_damaged(tmp_path_factory):
    """Start a server in the background with no version that can be loaded."""
    folder = tmp_path_factory.mktemp("only_damaged")
    (folder / "1").mkdir()
    (folder / "1" / "saved_model.pb").write_bytes(b"no graph")
    port = find_free_ports(["grpc"])["grpc"]
    process = in_background(f"--port={port}", "--model_name=m", f"--model_base_path={folder}")
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def server(only_damaged, toy_models, tmp_path_factory):
    """Start a local server with damaged, toy and real models; give (process, ports, log)."""
    folder = tmp_path_factory.mktemp("models")
    for version in ("1", "2", "3", "4", "5"):
        if version != "4":
            shutil.copytree(MODELS / "1", folder / "my_model" / version)
    (folder / "my_model" / "2" / "saved_model.pb").write_bytes(b"no graph")
    data = folder / "my_model" / "3" / "variables" / "variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    (folder / "my_model" / "4").mkdir()
    (folder / "my_model" / "5" / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"no records" * 10)
    (folder / "my_model" / "not-a-version").mkdir()
    config = folder / "models.config"
    config.write_text(
        "model_config_list {\n"
        f'  config {{ name: "my_model" base_path: "{folder}/my_model" model_platform: "tensorflow"\n'
        '    model_version_policy { all {} } version_labels { key: "gone" value: 2 } }\n'
        f'  config {{ name: "toys" base_path: "{toy_models}/toys" }}\n'
        f'  config {{ name: "half_plus_two" base_path: "{toy_models}/half_plus_two" }}\n'
        f'  config {{ name: "verbs" base_path: "{toy_models}/verbs" }}\n'
        f'  config {{ name: "defaults" base_path: "{toy_models}/defaults" }}\n'
        f'  config {{ name: "verbs_of_2" base_path: "{toy_models}/verbs_of_2" }}\n'
        f'  config {{ name: "gated" base_path: "{toy_models}/gated" }}\n'
        f'  config {{ name: "words" base_path: "{toy_models}/words" }}\n'
        f'  config {{ name: "keras2" base_path: "{KERAS_2}" }}\n'
        f'  config {{ name: "keras3" base_path: "{toy_models}/keras3" }}\n'
        f'  config {{ name: "latest" base_path: "{MODELS}" }}\n'
        f'  config {{ name: "specific" base_path: "{MODELS}"\n'
        "    model_version_policy { specific { versions: 1 versions: 7 } } }\n"
        "}\n"
    )
    ports = find_free_ports(["rest", "grpc"])
    log = folder / "log"
    flags = [
        *("--port", ports["grpc"], f"--rest_api_port={ports['rest']}", f"--model_config_file={config}"),
        "--allow_version_labels_for_unavailable_models",
        *("--max_num_load_retries=0", f"--monitoring_config_file={FOLDER / 'monitoring.config'}"),
        *(f"--rest_api_timeout_in_ms={REST_TIMEOUT_S * 1000:.0f}", "--rest_api_num_threads=2"),
        f"--grpc_socket_path={folder / 'socket'}",
        f"--grpc_channel_arguments=grpc.max_receive_message_length={MAX_MESSAGE_BYTES}",
    ]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    with running(log, LOCAL_SERVER, *flags, env={"PATH": path}) as process:  # the file itself is a program
        yield process, ports, log


@pytest.fixture(scope="module")
def port(server) -> int:
    return server[1]["rest"]


@pytest.fixture(scope="module")
def apis() -> SimpleNamespace:
    """Import modules of tensorflow_serving.apis without TensorFlow, as client.py does."""
    names = (
        "classification_pb2 inference_pb2 regression_pb2 prediction_service_pb2_grpc "
        "model_management_pb2 model_service_pb2_grpc"
    )
    with load_script(FOLDER / "client.py").messages_without_tensorflow():
        return SimpleNamespace(
            **{name: importlib.import_module(f"tensorflow_serving.apis.{name}") for name in names.split()}
        )


@pytest.fixture
def local_server(monkeypatch) -> Iterator[ModuleType]:
    """Import local/server.py here, where the files of its folder can be imported and TensorFlow cannot."""
    names = {path.stem for path in LOCAL_SERVER.parent.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.syspath_prepend(LOCAL_SERVER.parent)
    monkeypatch.chdir(FOLDER)
    yield load_script(LOCAL_SERVER)
    for name in names & sys.modules.keys():
        del sys.modules[name]
    sys.modules.update(others)


# Any SavedModel.


def test_several_inputs_and_outputs_are_named_in_rows_and_columns(port):
    rows = {"instances": [{"x": 1, "y": [1, 2]}, {"x": 0.1, "y": [0.5, -1]}]}
    expected = [{"a": 2.0, "b": [2.0, 4.0]}, {"a": 1.1, "b": [1.0, -2.0]}]
    assert post(port, "toys:predict", rows) == (200, {"predictions": expected})
    columns = {"inputs": {"x": [1], "y": [[1, 2]]}, "signature_name": "serving_default"}
    assert post(port, "toys:predict", columns) == (200, {"outputs": {"a": [2.0], "b": [[2.0, 4.0]]}})


def test_values_that_are_no_numbers_go_in_and_out_as_tokens(port):
    body = b'{"inputs": {"x": [NaN, Infinity, -Infinity, 0.1], "y": [[0.1, NaN]]}}'
    status, reply = send(port, Request("/v1/models/toys:predict", body))
    assert status == 200
    values = reply.decode().split()
    assert values[values.index('"a":') + 1 :][:6] == ["[", "NaN,", "Infinity,", "-Infinity,", "1.1", "],"]
    assert values[values.index('"b":') + 1 :][:7] == ["[", "[", "0.2,", "NaN", "]", "]", "}"]


def test_strings_go_in_plain_or_as_base64_and_bytes_come_out_as_base64(port):
    body = {"signature_name": "texts", "instances": ["abc", {"b64": base64.b64encode(b"\xc3\xa4x").decode()}]}
    status, reply = post(port, "toys:predict", body)
    assert status == 200
    assert [row["upper"] for row in reply["predictions"]] == ["ABC", "äX"]
    assert [base64.b64decode(row["raw_bytes"]["b64"]) for row in reply["predictions"]] == [b"abc", b"\xc3\xa4x"]


def test_integers_and_booleans_keep_their_type(port):
    body = {"signature_name": "integers", "instances": [[2**53 + 2, 4], [2**53 + 1, -4]]}
    expected = [{"even": True, "sum": 2**53 + 6}, {"even": False, "sum": 2**53 - 3}]
    assert post(port, "toys:predict", body) == (200, {"predictions": expected})
    status, reply = post(port, "toys:predict", {"signature_name": "integers", "instances": [[1.0]]})
    assert (status, "Type: Number is not of expected type: int64" in reply["error"]) == (400, True)


def test_an_output_without_rows_needs_the_columnar_format(port):
    body = {"signature_name": "whole", "inputs": [1, 2, 6]}
    assert post(port, "toys:predict", body) == (200, {"outputs": 3.0})
    status, reply = post(port, "toys:predict", {"signature_name": "whole", "instances": [1, 2, 6]})
    assert (status, reply["error"]) == (400, "Tensor name: mean has no shape information ")


def test_a_string_without_a_shape_is_an_output_like_others(port):
    body = {"signature_name": "named", "inputs": [1, 2]}
    assert post(port, "toys:predict", body) == (200, {"outputs": {"model": "v1", "y": [2.0, 4.0]}})
    status, reply = post(port, "toys:predict", {"signature_name": "named", "instances": [1, 2]})
    assert (status, reply["error"]) == (400, "Tensor name: model has no shape information ")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"instances": [1, 2]}, "instances is a plain list, but expecting list of objects"),
        ({"inputs": [1, 2]}, "inputs is a plain value/list, but expecting an object"),
        ({"inputs": {"x": [1]}}, "Missing named input: y in 'inputs' object."),
        ({"instances": [{"x": 1}]}, "keys must be equal to: x,y"),
        ({"instances": [{"x": 1, "y": [1, 2], "z": 3}]}, "JSON object: does not have named input: z"),
        ({"instances": [{"x": 1, "y": [1, 2]}, 5]}, "Expecting object but got list at item 1 of input list"),
        ({"instances": [{"x": 1, "y": [1, 2]}, {"x": 1, "y": [[1], [2]]}]}, "Expecting shape [2] but got: [2,1]"),
        ({"instances": [{"x": 1, "y": [1, [2]]}]}, "Encountered list at unexpected level: 1 expected < 1"),
        ({"inputs": {"x": [1], "y": [[1], 2]}}, "found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ({"signature_name": "texts", "instances": [{"b64": "?"}]}, "Unable to base64 decode"),
        ({"signature_name": "texts", "instances": ["a", {"b": "?"}]}, "Expecting value/list but got object at item 1"),
        ({"signature_name": 1}, "'signature_name' key must be a string value."),
    ],
)
def test_errors_of_named_inputs_are_worded_as_tensorflow_serving_does(port, body, error):
    status, reply = post(port, "toys:predict", body)
    assert (status, error in reply["error"]) == (400, True), reply


def test_a_model_of_tensorflow_1_is_served(port):
    assert post(port, "half_plus_two:predict", {"instances": [1.0, 2.0, 5.0]}) == (
        200,
        {"predictions": [2.5, 3.0, 4.5]},
    )
    status, body = send(port, Request("/v1/models/half_plus_two:predict", b'{"instances": [1.0, 2.0, 5.0]}'))
    assert body == b'{\n    "predictions": [2.5, 3.0, 4.5\n    ]\n}'


def test_a_vocabulary_that_the_model_brings_along_is_read(port):
    words = ["malignant", "benign", "unheard-of"]
    assert post(port, "words:predict", {"instances": words}) == (200, {"predictions": [1, 0, -1]})


def test_a_slow_graph_ends_at_the_time_limit_and_holds_up_nobody(server, gate):
    _, ports, _ = server
    gate.make_slow(ports["grpc"])
    with ThreadPoolExecutor(1) as pool, gate.closed():
        slow = pool.submit(call_gated, ports["grpc"])
        gate.wait_for_run()
        assert post(ports["rest"], "half_plus_two:predict", {"instances": [1.0]})[0] == 200
        status, reply = post(ports["rest"], "gated:predict", {"instances": [1.0]})
        assert (status, reply) == (504, {"error": "Timed out waiting for notification"})
        assert not slow.done()
        gate.open()
        assert slow.result()[0] == 200


# Versions.


def test_version_folders_are_read_as_integers(port):
    assert list(statuses(port, "toys")) == ["7"]
    body = {"inputs": {"x": [], "y": [[1, 2]]}}
    assert post(port, "toys/versions/7:predict", body) == (200, {"outputs": {"a": [], "b": [[2.0, 4.0]]}})


def test_policies_choose_versions(port):
    assert list(statuses(port, "latest")) == ["2"]
    assert list(statuses(port, "specific")) == ["1"]
    status, reply = post(port, "specific/versions/2:predict", {"instances": [GOOD_ROW]})
    assert (status, reply["error"]) == (404, "Servable not found for request: Specific(specific, 2)")


def test_a_damaged_version_is_kept_out_and_the_others_are_served(server):
    _, ports, log = server
    states = statuses(ports["rest"], "my_model")
    assert {version: entry["state"] for version, entry in states.items()} == {
        "5": "END",
        "4": "END",
        "3": "END",
        "2": "END",
        "1": "AVAILABLE",
    }
    assert states["4"]["status"]["error_code"] == "NOT_FOUND"
    messages = [states[version]["status"]["error_message"] for version in "2345"]
    assert all(messages)
    assert not [text for text in messages if "/models/" in text or "/tmp" in text], "a client learns no path"
    lines = [line for line in log.read_text().splitlines() if "not loaded" in line]
    assert [line.split()[4] for line in lines] == ["5", "4", "3", "2"], "tried again despite --max_num_load_retries=0"
    assert post(ports["rest"], "my_model:predict", {"instances": [GOOD_ROW]})[0] == 200
    status, reply = post(ports["rest"], "my_model/labels/gone:predict", {"instances": [GOOD_ROW]})
    assert (status, reply["error"]) == (404, "Servable not found for request: Specific(my_model, 2)")


def test_with_no_version_that_loads_the_server_ends(only_damaged):
    code, lines = finish(only_damaged)
    assert code == 1
    assert lines[0].startswith("local server: m version 1 not loaded: Cannot parse file")
    assert lines[1:] == ["local server: no version could be loaded; run python export_model.py"]


# Classify, regress, multi-inference.


@pytest.mark.parametrize("model", ["verbs", "verbs_of_2"])
def test_classify_gives_labels_and_scores_and_regress_gives_values(port, model):
    body = {"context": {"bias": 0.25}, "examples": [{"x": 0.5}, {"x": [0.25], "bias": 0.5}]}
    labelled = [[["yes", 0.75], ["no", 0.25]], [["yes", 0.75], ["no", 0.25]]]
    assert post(port, f"{model}:classify", body) == (200, {"results": labelled})
    assert post(port, f"{model}:regress", {**body, "signature_name": "value"}) == (200, {"results": [0.75, 0.75]})


def test_whatever_goes_wrong_inside_is_an_error_that_names_no_path(toy_models, apis, tmp_path):
    ports, log = find_free_ports(["rest", "grpc"]), tmp_path / "log"
    flags = ["--model_name=half", f"--model_base_path={toy_models / 'half_plus_two'}"]
    flags += [f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}"]
    flags += [f"--monitoring_config_file={FOLDER / 'monitoring.config'}"]
    request = apis.classification_pb2.ClassificationRequest()
    request.model_spec.name = "half"
    with running(log, sys.executable, TESTS / "broken_server.py", *flags):
        assert post(ports["rest"], "half:predict", {"inputs": [1]}) == (
            500,
            {"error": "Internal error: AttributeError"},
        )
        with grpc.insecure_channel(f"127.0.0.1:{ports['grpc']}") as channel, pytest.raises(grpc.RpcError) as caught:
            apis.prediction_service_pb2_grpc.PredictionServiceStub(channel).Classify(request, timeout=DEADLINE_S)
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert caught.value.details() == "Internal error: AttributeError"
        assert post(ports["rest"], "half:predict", {"instances": [1]}) == (200, {"predictions": [2.5]})
        _, page = get(ports["rest"], "/monitoring/prometheus/metrics")
        assert ':tensorflow:serving:request_count{model_name="half",status="INTERNAL"} 2' in page
    assert "POST /v1/models/half:predict: AttributeError" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_method_names_are_checked_if_asked_for_and_warm_up_replays_the_older_verbs(toy_models, tmp_path):
    ports = find_free_ports(["rest", "grpc"])
    config = tmp_path / "models.config"
    models = ((name, toy_models / name) for name in ("verbs", "verbs_of_2"))
    entries = " ".join(f'config {{ name: "{name}" base_path: "{path}" }}' for name, path in models)
    config.write_text(f"model_config_list {{ {entries} }}")
    flags = [f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}", f"--model_config_file={config}"]
    flags += ["--enable_signature_method_name_check"]
    body = {"examples": [{"x": 0.5}]}
    with running(tmp_path / "log", sys.executable, LOCAL_SERVER, *flags):
        assert post(ports["rest"], "verbs:classify", body)[0] == 200  # its warm-up would have kept it out
        status, reply = post(ports["rest"], "verbs_of_2:classify", body)
        assert status == 400
        assert "method_name to be tensorflow/serving/classify. Was: tensorflow/serving/predict" in reply["error"]


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("verbs:classify", {"examples": []}, "'examples' value is an empty array"),
        ("verbs:classify", {"instances": [[1]]}, "key 'examples' is expected"),
        ("verbs:classify", {"examples": [[1]]}, "Example must be JSON object"),
        ("verbs:classify", {"examples": [{"x": None}]}, "Feature: x has element with unexpected JSON type: Null"),
        (
            "verbs:classify",
            {"examples": [{"x": [0.5, "a"]}]},
            "Unexpected element type in feature: x expecting type: float",
        ),
        ("verbs:classify", {"examples": [{"x": 1}]}, "Data types don't match"),
        ("verbs:classify", {"examples": [{"x": True}]}, "Data types don't match"),  # an integer, like 1
        ("verbs:classify", {"examples": [{"x": 2**63}]}, "Feature: x has uint64 element. Only int64 is supported."),
        ("verbs:classify", {"examples": [{}], "signature_name": "z"}, "No signature was found with the name: z"),
        ("verbs:regress", {"examples": [{"x": 0.5}]}, "No regression outputs found in SignatureDef."),
        ("toys:classify", {"examples": [{"x": 0.5}]}, "No classification inputs found in SignatureDef."),
    ],
)
def test_a_wrong_classify_or_regress_request_is_told(port, path, body, error):
    status, reply = post(port, path, body)
    assert status == 400, reply
    assert error in reply["error"]


@pytest.mark.parametrize("name", [b"\xff", b"\\udc00"])
def test_a_feature_whose_name_is_no_text_is_refused(port, name):
    status, reply = send(port, Request("/v1/models/verbs:classify", b'{"examples": [{"%b": 1}]}' % name))
    assert (status, json.loads(reply)["error"]) == (400, "Feature: ? has a name that is not UTF-8")


def test_a_long_error_over_grpc_keeps_its_code_and_its_beginning(server):
    """A client refuses long headers, and would then report RESOURCE_EXHAUSTED."""
    body = predict_request("é" * 10_000, "x", 1.0)
    status, message = grpc_connection.send(server[1]["grpc"], Request(METHOD, body, content_type="application/grpc"))
    assert status == "grpc-status 5", message  # NOT_FOUND
    assert message.decode().startswith("Servable not found for request: Latest(éé")
    assert message.decode().endswith("é...TRUNCATED")


@pytest.mark.parametrize(
    "method", ["PredictionService/Predict", "PredictionService/Classify", "ModelService/GetModelStatus"]
)
def test_a_grpc_request_that_is_no_message_is_refused_without_pythons_words(server, method):
    request = Request(f"/tensorflow.serving.{method}", b"\xff\xff", content_type="application/grpc")
    status, message = grpc_connection.send(server[1]["grpc"], request)
    assert status == "grpc-status 13", message  # INTERNAL, as gRPC's statuscodes.md has it
    assert message.decode() == f"The request is no valid message for {method.partition('/')[2]}"


@pytest.mark.parametrize(
    "dtype, field, value",
    [(4, "int_val", 300), (6, "int_val", -129), (19, "half_val", 70_000), (20, "int_val", 1), (21, "int_val", 1)],
)
def test_values_that_a_small_type_does_not_hold_are_no_internal_error(server, dtype, field, value):
    messages = import_messages()
    request = messages.PredictRequest.FromString(predict_request("half_plus_two", "x", 1.0))
    tensor = request.inputs["x"]
    tensor.dtype = dtype
    tensor.ClearField("float_val")
    getattr(tensor, field).append(value)
    body = Request(METHOD, request.SerializeToString(), content_type="application/grpc")
    status, message = grpc_connection.send(server[1]["grpc"], body)
    assert status == "grpc-status 3", message  # INVALID_ARGUMENT
    told = b"tensor parsing error: x" if dtype in (20, 21) else b"Expects arg[0] to be float but"
    assert message.startswith(told), message


def test_grpc_has_the_older_verbs_too(server, apis):
    def fill(request):
        for x in (0.5, 0.75):
            feature = request.input.example_list.examples.add().features.feature["x"]
            feature.float_list.value.append(x)
        return request

    classify = fill(apis.classification_pb2.ClassificationRequest())
    classify.model_spec.name = "verbs"
    regress = fill(apis.regression_pb2.RegressionRequest())
    regress.model_spec.name, regress.model_spec.signature_name = "verbs", "value"
    both = fill(apis.inference_pb2.MultiInferenceRequest())
    both.tasks.add(method_name="tensorflow/serving/classify").model_spec.name = "verbs"
    task = both.tasks.add(method_name="tensorflow/serving/regress")
    task.model_spec.name, task.model_spec.signature_name = "verbs", "value"
    with grpc.insecure_channel(f"127.0.0.1:{server[1]['grpc']}") as channel:
        stub = apis.prediction_service_pb2_grpc.PredictionServiceStub(channel)
        reply = stub.Classify(classify, timeout=DEADLINE_S)
        rows = [[(c.label, c.score) for c in row.classes] for row in reply.result.classifications]
        assert rows == [[("yes", 0.5), ("no", 0.5)], [("yes", 0.75), ("no", 0.25)]]
        assert reply.model_spec.version.value == 1
        reply = stub.Regress(regress, timeout=DEADLINE_S)
        assert [row.value for row in reply.result.regressions] == [0.5, 0.75]
        results = stub.MultiInference(both, timeout=DEADLINE_S).results
        assert [r.WhichOneof("result") for r in results] == ["classification_result", "regression_result"]
        assert [row.value for row in results[1].regression_result.regressions] == [0.5, 0.75]
        task.model_spec.signature_name = ""
        with pytest.raises(grpc.RpcError) as caught:
            stub.MultiInference(both, timeout=DEADLINE_S)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "Duplicate evaluation of signature: serving_default"


def test_an_input_that_is_left_out_has_its_default_over_grpc(server):
    messages = import_messages()
    for offset, expected in ((None, 7.0), (10.0, 15.0)):
        request = messages.PredictRequest.FromString(predict_request("defaults", "x", 5.0))
        if offset is not None:
            request.inputs["offset"].dtype = 1
            request.inputs["offset"].float_val.append(offset)
            request.inputs["offset"].tensor_shape.SetInParent()
        body = request.SerializeToString()
        status, reply = grpc_connection.send(server[1]["grpc"], Request(METHOD, body, content_type="application/grpc"))
        assert status == 200, reply
        assert list(messages.PredictResponse.FromString(reply).outputs["y"].float_val) == [expected]
    status, metadata = get(server[1]["rest"], "/v1/models/defaults/metadata")
    assert status == 200
    assert not metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]["defaults"]


def test_grpcs_own_options_are_passed_on(server):
    request = Request(METHOD, bytes(MAX_MESSAGE_BYTES + 1), content_type="application/grpc")
    status, message = grpc_connection.send(server[1]["grpc"], request)
    assert (status, b"larger than max" in message) == ("grpc-status 8", True), message  # RESOURCE_EXHAUSTED


def test_what_keras_exports_by_itself_is_served(port, toy_models):
    status, reply = post(port, "keras3:predict", {"instances": [[1.0, 2.0, 3.0]]})
    assert status == 200, reply
    expected = json.loads((toy_models / "keras3.json").read_text())
    assert np.abs(np.array(reply["predictions"]) - expected).max() <= TOLERANCE


def samples(page: str) -> dict[str, float]:
    """The samples of a Prometheus page by name and labels."""
    lines = [line for line in page.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_count_requests_by_status_and_latencies_by_interface(server, port):
    def read() -> dict[str, float]:
        status, page = send(port, Request("/monitoring/prometheus/metrics", b"", method="GET"))
        assert status == 200
        return samples(page.decode())

    before = read()
    for body in ({"instances": [1.0]}, {"instances": [2.0]}, {"instances": ["a"]}):
        post(port, "half_plus_two:predict", body)
    post(port, "nobody:predict", {"instances": [1.0]})  # no such model: not to be counted, names have no end
    with grpc.insecure_channel(f"unix:{server[2].parent / 'socket'}") as channel:
        reply = channel.unary_unary(METHOD)(predict_request("half_plus_two", "x", 1.0), timeout=DEADLINE_S)
    response = import_messages().PredictResponse.FromString(reply)
    assert (list(response.outputs["y"].float_val), response.model_spec.version.value) == ([2.5], 123)
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    name = ":tensorflow:serving:request_count"
    assert grown.pop(f'{name}{{model_name="half_plus_two",status="OK"}}') == 3
    assert grown.pop(f'{name}{{model_name="half_plus_two",status="INVALID_ARGUMENT"}}') == 1
    name = ":tensorflow:serving:request_latency"
    for labels, count in (('API="predict",entrypoint="REST"', 2), ('API="Predict",entrypoint="GRPC"', 1)):
        labels = f'model_name="half_plus_two",{labels}'
        assert grown.pop(f"{name}_count{{{labels}}}") == grown[f'{name}_bucket{{{labels},le="+Inf"}}'] == count
        assert 0 < grown.pop(f"{name}_sum{{{labels}}}") < count * DEADLINE_S * 1e6
        buckets = [value for key, value in after.items() if key.startswith(f"{name}_bucket{{{labels}")]
        assert buckets == sorted(buckets) and len(buckets) == 34
        assert f'{name}_bucket{{{labels},le="58.32"}}' in after  # 10 * 1.8**3, as TensorFlow Serving prints it
    assert all("half_plus_two" in key and "_bucket" in key for key in grown), grown


def test_what_keras_2_saved_is_served(port):
    expected = json.loads((KERAS_2 / "expected.json").read_text())
    status, reply = post(port, "keras2:predict", {"instances": expected["rows"]})
    assert status == 200, reply
    assert np.abs(np.array(reply["predictions"]) - expected["probabilities"]).max() <= TOLERANCE


# Versions that come and go.


class Changing:
    """A local server whose config file the tests edit: it looks at the file and for versions ten times a second.

    Each test has a model with a name and a base path of its own, which serves version 1 at first.
    """

    def __init__(self, folder: Path, ports: dict[str, int]):
        self.folder = folder
        self.ports = ports
        self.config = folder / "models.config"
        self.log_path = folder / "log"
        self.numbers = itertools.count()
        self.add_model()
        self.set_config(self.model_config())

    def add_model(self) -> None:
        """Begin a model with version 1, which no config names yet."""
        self.name = f"model_{next(self.numbers)}"
        self.base = self.folder / self.name
        self.log_start = len(self.log())
        shutil.copytree(MODELS / "1", self.base / "1")

    def model_config(self, details: str = "", name: str = "") -> str:
        return f'model_config_list {{ config {{ name: "{name or self.name}" base_path: "{self.base}" {details} }} }}'

    def set_config(self, text: str) -> None:
        """Replace the config file in one move: the server never sees half of it."""
        written = self.config.with_suffix(".new")
        written.write_text(text)
        written.replace(self.config)

    def add_version(self, version: str) -> None:
        """Add a version in one move, for the same reason."""
        arriving = self.base / "arriving"  # not a number: no version
        shutil.copytree(MODELS / version, arriving)
        arriving.rename(self.base / version)

    def log(self) -> str:
        """Return what the server has printed since the model was added."""
        text = self.log_path.read_text() if self.log_path.exists() else ""
        return text[getattr(self, "log_start", 0) :]

    def wait_for_line(self, text: str) -> None:
        wait_until(lambda: text in self.log(), lambda: f"no line with {text!r} in\n{self.log()}")

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        """Ask `path` of the model, such as `:predict`."""
        return post(self.ports["rest"], f"{self.name}{path}", body)

    def states(self) -> dict[str, str]:
        return {version: entry["state"] for version, entry in statuses(self.ports["rest"], self.name).items()}


@pytest.fixture(scope="module")
def changing_server(tmp_path_factory) -> Iterator[Changing]:
    changing = Changing(tmp_path_factory.mktemp("changing"), find_free_ports(["rest", "grpc"]))
    flags = [f"--port={changing.ports['grpc']}", f"--rest_api_port={changing.ports['rest']}"]
    flags += [f"--model_config_file={changing.config}"]
    flags += ["--model_config_file_poll_wait_seconds=0.1", "--file_system_poll_wait_seconds=0.1"]
    with running(changing.log_path, sys.executable, LOCAL_SERVER, *flags):
        yield changing


@pytest.fixture
def changing(changing_server) -> Changing:
    """Return the server with a new model, of which it serves version 1 and no other model."""
    changing_server.add_model()
    changing_server.set_config(changing_server.model_config())
    changing_server.wait_for_line(f"{changing_server.name} version 1 loaded")
    return changing_server


def test_a_label_for_a_version_that_comes_later_is_given_when_it_comes(changing):
    changing.set_config(
        changing.model_config("model_version_policy { all {} } version_labels { key: 'stable' value: 2 }")
    )
    changing.wait_for_line("not applied: Request to assign label to version 2")
    changing.add_version("2")
    rows, _ = load_test_rows()
    wait_until(lambda: changing.post("/labels/stable:predict", {"instances": rows[:1]})[0] == 200, changing.log)
    assert changing.log().count("not applied") == 1


def test_a_config_that_changed_while_the_server_loaded_is_looked_at_once(local_server, tmp_path, monkeypatch, capsys):
    config = tmp_path / "models.config"
    config.write_text("this is no config")
    monkeypatch.setitem(
        sys.modules, "servables", SimpleNamespace(ServingError=RuntimeError)
    )  # the real needs TensorFlow
    looks = iter(range(3))

    class Enough(Exception):
        pass

    async def sleep(interval_s: float) -> None:
        if next(looks, None) is None:
            raise Enough

    monkeypatch.setattr(local_server.asyncio, "sleep", sleep)
    library = SimpleNamespace(reload=None)  # it does not come to that
    with pytest.raises(Enough):
        asyncio.run(local_server.watch_config(library, config, b"as it was read", 1.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"local server: {config} has changed"
    assert sum(str(config) in line for line in lines) == 2, lines  # and what is wrong with it


def test_a_new_version_replaces_the_old_one_without_a_failed_or_mixed_answer(changing):
    rows, _ = load_test_rows()
    body = {"instances": [rows[0]] * 3}
    expected = {version: load_expected(version)[0] for version in ("1", "2")}
    answered, stop = [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            status, reply = changing.post(":predict", body)
            answer = np.array(reply.get("predictions", np.nan))
            fits = [version for version in expected if np.abs(answer - expected[version]).max() <= TOLERANCE]
            answered.append((status, *fits))

    def wait_for_answers(count: int) -> None:
        wait_until(lambda: len(answered) >= count or any(asking.done() for asking in clients), "too few answers")

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        try:
            wait_for_answers(100)
            changing.add_version("2")
            changing.wait_for_line(f"{changing.name} version 1 retired")
            wait_for_answers(max(1000, len(answered) + 100))
        finally:
            stop.set()
    for asking in clients:
        asking.result()
    assert set(answered) == {(200, "1"), (200, "2")}
    assert changing.states() == {"2": "AVAILABLE", "1": "END"}
    shutil.rmtree(changing.base / "2")  # the newest goes: the next one answers again
    changing.wait_for_line(f"{changing.name} version 2 retired")
    assert changing.post(":predict", body)[0] == 200


def test_a_folder_that_cannot_be_listed_for_a_while_keeps_what_is_served(changing):
    away = changing.base.with_name(f"{changing.name}_away")
    changing.base.rename(away)
    changing.wait_for_line(f"{changing.base}: No such file or directory; what was served of it is kept")
    assert changing.states() == {"1": "AVAILABLE"}
    assert changing.post(":predict", {"instances": [GOOD_ROW]})[0] == 200
    away.rename(changing.base)
    changing.add_version("2")
    changing.wait_for_line(f"{changing.name} version 2 loaded")
    assert changing.log().count("is kept") == 1
    for version in ("1", "2"):
        shutil.rmtree(changing.base / version)
    changing.wait_for_line(f"{changing.name} version 2 retired")  # this folder can be read, and is empty


def test_a_folder_that_goes_while_it_is_listed_is_not_empty(tmp_path, monkeypatch):
    model_config = load_together(FOLDER / "local", "model_config")[0]
    base = tmp_path / "model"
    (base / "1").mkdir(parents=True)

    def goes_after(listing: Callable) -> Callable:
        def list_and_go(path: str) -> object:
            entries = listing(path)
            base.rename(tmp_path / "away")
            return entries

        return list_and_go

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, goes_after(getattr(os, name)))
    assert list(model_config.list_versions(str(base))) == [1]


def test_folders_whose_numbers_exceed_64_bits_and_links_in_a_circle_are_no_versions(changing):
    """gRPC and the status carry a version in 64 bits: such a folder would make every answer an error."""
    (changing.base / "99999999999999999999").mkdir()
    (changing.base / "loop").symlink_to("loop")
    changing.add_version("2")
    changing.wait_for_line(f"{changing.name} version 2 loaded")
    wait_until(lambda: changing.states() == {"2": "AVAILABLE", "1": "END"}, changing.log)


def test_whatever_goes_wrong_while_versions_are_looked_for_is_one_line_and_the_next_look_follows(
    local_server, monkeypatch, capsys
):
    class Enough(Exception):
        pass

    looks = iter([RuntimeError("odd"), RuntimeError("odd"), ["a change"]])

    async def sleep(interval_s: float) -> None:
        if waits.pop():
            raise Enough

    def poll() -> list[str]:
        result = next(looks)
        if isinstance(result, Exception):
            raise result
        return result

    waits = [True, False, False, False]
    monkeypatch.setattr(local_server.asyncio, "sleep", sleep)
    with pytest.raises(Enough):
        asyncio.run(local_server.watch_folders(SimpleNamespace(poll=poll), 1.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["local server: the versions cannot be looked at: RuntimeError('odd')", "local server: a change"]


def test_a_damaged_new_version_never_replaces_a_good_one_and_may_be_repaired(changing, tmp_path):
    folder = changing.base / "2"
    folder.mkdir()  # and filled later: LOADING until then, as in TensorFlow Serving
    changing.wait_for_line(f"{changing.name} version 2 not loaded: ")
    assert changing.states() == {"2": "LOADING", "1": "AVAILABLE"}
    assert statuses(changing.ports["rest"], changing.name)["2"]["status"] == {"error_code": "OK", "error_message": ""}
    body = {"instances": [GOOD_ROW]}
    assert changing.post("/versions/2:predict", body)[0] == 404
    (tmp_path / "saved_model.pb").write_bytes(b"no graph")
    (tmp_path / "saved_model.pb").rename(folder / "saved_model.pb")
    changing.wait_for_line(f"{changing.name} version 2 not loaded: Cannot parse")
    assert changing.post("/versions/1:predict", body)[0] == 200
    assert changing.post(":predict", body)[0] == 200
    good = shutil.copytree(MODELS / "2", tmp_path / "good")
    for path in sorted(good.iterdir(), key=lambda path: path.name == "saved_model.pb"):  # this file last
        path.rename(folder / path.name)
    changing.wait_for_line(f"{changing.name} version 2 loaded")
    changing.wait_for_line(f"{changing.name} version 1 retired")
    assert changing.states() == {"2": "AVAILABLE", "1": "END"}


def test_a_version_that_failed_is_tried_again_when_it_changes_and_else_as_often_as_asked(toy_models):
    tried = json.loads((toy_models / "tried.json").read_text())
    loading, given_up = ["LOADING", "OK"], ["END", "DATA_LOSS"]
    assert tried["at once"] == [[1, *loading], [1, *loading], [1, *given_up], [0, *given_up], [1, *loading]]
    assert tried["later"] == [[1, *loading], [0, *loading], [1, *loading]]


def test_the_config_can_be_reloaded_over_grpc_and_from_its_file(changing, apis):
    changing.add_version("2")
    all_versions = "model_version_policy { all {} }"

    def reload(config: str) -> tuple[int, str]:
        """Return the code and the message that the server answers with."""
        request = apis.model_management_pb2.ReloadConfigRequest()
        text_format.Parse(config, request.config)
        with grpc.insecure_channel(f"127.0.0.1:{changing.ports['grpc']}") as channel:
            stub = apis.model_service_pb2_grpc.ModelServiceStub(channel)
            status = stub.HandleReloadConfigRequest(request, timeout=DEADLINE_S).status
        return status.error_code, status.error_message

    def labelled(version: int) -> str:
        return changing.model_config(f"{all_versions} version_labels {{ key: 'canary' value: {version} }}")

    code, _ = reload(f'model_config_list {{ config {{ name: "{changing.name}" base_path: "/a\\0b" }} }}')
    assert code == grpc.StatusCode.NOT_FOUND.value[0]
    code, message = reload(labelled(9))
    assert code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    refused = f"Request to assign label to version 9 of model {changing.name}, which is not currently"
    assert message.startswith(refused)
    assert reload(labelled(2)) == (0, "")
    rows, _ = load_test_rows()
    one_row, canary = {"instances": rows[:1]}, "/labels/canary:predict"

    def check(path: str, version: str) -> None:
        status, reply = changing.post(path, one_row)
        assert status == 200, reply
        assert np.abs(np.array(reply["predictions"]) - load_expected(version)[:1]).max() <= TOLERANCE

    check("/versions/1:predict", "1")
    check(canary, "2")
    assert reload(changing.model_config(all_versions, name="other")) == (0, "")
    assert post(changing.ports["rest"], "other:predict", one_row)[0] == 200
    assert changing.post(":predict", one_row)[0] == 404

    changing.set_config(labelled(1))
    wait_until(lambda: changing.post(canary, one_row)[0] == 200, changing.log)
    changing.set_config("no config")
    changing.wait_for_line("Error parsing text-format tensorflow.serving.ModelServerConfig")
    check(canary, "1")
    changing.set_config(labelled(9))
    changing.wait_for_line(f"not applied: {refused}")
    check(canary, "1")


# Batching.


BATCH_ROWS, QUEUED_BATCHES, PART_ROWS = 32, 2, 8
PARTS = QUEUED_BATCHES * BATCH_ROWS // PART_ROWS  # requests that fill the queue


@pytest.fixture(scope="module")
def batching_ports(toy_models, tmp_path_factory) -> Iterator[dict[str, int]]:
    """Start a local server that shares runs: 32 rows at most, 20 ms, one slow batch at once, 2 in the queue."""
    folder = tmp_path_factory.mktemp("batching")
    # Without the recorded warm-up requests: they are larger than a batch here.
    shutil.copytree(MODELS / "2", folder / "my_model" / "2", ignore=shutil.ignore_patterns("assets.extra"))
    bases = [folder / "my_model", toy_models / "gated", toy_models / "half_plus_two"]
    models = " ".join(f'config {{ name: "{base.name}" base_path: "{base}" }}' for base in bases)
    (folder / "models.config").write_text(f"model_config_list {{ {models} }}")
    (folder / "batching.config").write_text(
        f"max_batch_size {{ value: {BATCH_ROWS} }} batch_timeout_micros {{ value: 20000 }} # comment\n"
        f"max_enqueued_batches {{ value: {QUEUED_BATCHES} }} num_batch_threads {{ value: 1 }}\n"
        "allowed_batch_sizes: 16 allowed_batch_sizes: 32"
    )
    ports = find_free_ports(["rest", "grpc"])
    flags = [f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}", "--rest_api_timeout_in_ms=0"]
    flags += [f"--model_config_file={folder / 'models.config'}", "--enable_batching=true"]
    flags += [f"--batching_parameters_file={folder / 'batching.config'}"]
    with running(folder / "log", sys.executable, LOCAL_SERVER, *flags):
        yield ports


@pytest.fixture(scope="module")
def batching_port(batching_ports) -> int:
    return batching_ports["rest"]


def test_requests_that_share_a_run_get_their_own_answers(batching_port):
    rows, _ = load_test_rows()
    expected = load_expected("2")
    with ThreadPoolExecutor(6) as pool:  # fewer than the queue takes
        replies = list(pool.map(lambda row: post(batching_port, "my_model:predict", {"instances": [row]}), rows))
    assert [status for status, _ in replies] == [200] * len(rows)
    answers = np.array([reply["predictions"][0] for _, reply in replies])
    assert np.abs(answers - expected).max() <= TOLERANCE


def test_a_wrong_request_in_a_batch_fails_alone(batching_port):
    bodies = [{"instances": [GOOD_ROW]}, {"instances": [GOOD_ROW[:4]]}, {"instances": [GOOD_ROW]}] * 2
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda body: post(batching_port, "my_model:predict", body), bodies))
    assert [status for status, _ in replies] == [200, 400, 200] * 2


def test_a_request_larger_than_a_batch_is_refused(batching_port):
    status, reply = post(batching_port, "my_model:predict", {"instances": [GOOD_ROW] * 33})
    assert (status, reply["error"]) == (400, "Task size 33 is larger than maximum input batch size 32")
    assert post(batching_port, "my_model:predict", {"instances": [GOOD_ROW] * 32})[0] == 200


def test_a_full_queue_refuses_at_once(batching_port):
    body = {"instances": [GOOD_ROW] * 16}
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda _: post(batching_port, "my_model:predict", body), range(200)))
    codes = {status for status, _ in replies}
    assert codes <= {200, 503} and 200 in codes
    assert all("queue" in reply["error"] for status, reply in replies if status == 503)
    assert post(batching_port, "my_model:predict", body)[0] == 200


@contextlib.contextmanager
def full_queue(ports: dict[str, int], gate: Gate, values: list[float]) -> Iterator[list[Future]]:
    """Give the future replies to a request for each of `values`, one more than the gated graph's queue holds.

    Odd values are asked for by columns; the replies are all by rows.

    In the block the graph is running, for another request, all but one of these wait, and one has been refused.
    After the block all are answered.
    """
    assert len(values) == PARTS + 1

    def ask(value: float) -> tuple[int, dict]:
        key = "inputs" if value % 2 else "instances"
        status, reply = post(ports["rest"], "gated:predict", {key: [value] * PART_ROWS})
        if columns := reply.get("outputs"):
            reply = {
                "predictions": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            }
        return status, reply

    gate.make_slow(ports["grpc"])
    with ThreadPoolExecutor(len(values) + 1) as pool, gate.closed():
        first = pool.submit(ask, 0.0)
        gate.wait_for_run()
        replies = [pool.submit(ask, value) for value in values]
        ended, _ = wait(replies, DEADLINE_S, FIRST_COMPLETED)
        assert [future.result()[0] for future in ended] == [503]
        yield replies
        assert not first.done()
        gate.open()
        assert first.result()[0] == 200


def test_requests_for_a_slow_graph_share_its_runs_hold_up_nobody_and_beyond_the_queue_are_refused_at_once(
    batching_ports, gate
):
    values = [float(value) for value in range(PARTS + 1)]
    with full_queue(batching_ports, gate, values) as replies:
        quick = post(batching_ports["rest"], "half_plus_two:predict", {"instances": [1.0]})
        assert quick == (200, {"predictions": [2.5]})
    runs = collections.Counter()
    for value, future in zip(values, replies, strict=True):
        status, reply = future.result()
        if status == 503:
            assert "queue" in reply["error"]
            continue
        assert (status, [row["y"] for row in reply["predictions"]]) == (200, [2 * value] * PART_ROWS)
        runs.update(row["run"] for row in reply["predictions"])
    assert list(runs.values()) == [BATCH_ROWS] * QUEUED_BATCHES, "full batches share a run"


def test_a_wrong_request_for_a_slow_graph_fails_alone(batching_ports, gate):
    wrong = 2e6
    with full_queue(batching_ports, gate, [wrong, wrong, *map(float, range(PARTS - 1))]) as replies:
        pass
    statuses = [future.result()[0] for future in replies]
    assert 400 in statuses[:2] and set(statuses[:2]) <= {400, 503}, "one of the two at least was in the queue"
    assert set(statuses[2:]) <= {200, 503}
    assert statuses.count(503) == 1


# Start and end.


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--nonsense=1"], "unknown argument: --nonsense=1"),
        (
            ["--ssl_config_file=x"],
            "--ssl_config_file is a flag of tensorflow_model_server that the local server does not have",
        ),
        (["--grpc_channel_arguments=a", "--model_base_path=m"], "'a' is not key=value"),
        (["--monitoring_config_file=x", "--model_base_path=m"], "--monitoring_config_file needs --rest_api_port"),
        (["--port={free}", "--grpc_socket_path=client.py", "--model_base_path=m"], "is a file; choose another path"),
        (
            ["--batching_parameters_file=batching.config", "--model_base_path=m"],
            "--batching_parameters_file is set without setting --enable_batching to true",
        ),
        (
            [
                "--port={free}",
                "--model_base_path=models/my_model",
                "--enable_batching",
                "--batching_parameters_file=client.py",
            ],
            "Error parsing text-format tensorflow.serving.BatchingParameters",
        ),
        (["--port=many", "--model_base_path=m"], "argument --port: invalid int value: 'many'"),
        ([], "give --model_base_path or --model_config_file"),
        (["--port=1", "--rest_api_port=1", "--model_base_path=m"], "--port and --rest_api_port cannot be the same"),
        (["--rest_api_port=70000", "--model_base_path=m"], "port must be 0-65535"),
        (["--port={free}", "--model_base_path=/nowhere"], "no version folder in /nowhere; run python export_model.py"),
        (["--port={free}", "--model_config_file=/nowhere"], "/nowhere: No such file or directory"),
        (
            ["--port={free}", "--model_config_file=client.py"],
            "Error parsing text-format tensorflow.serving",
        ),
        (["--port={free}", "--model_config_file=models.config"], "Request to assign label to version"),
        (["--port={taken}", "--model_base_path=m"], "Address already in use; choose another port"),
    ],
)
def test_a_start_that_cannot_work_ends_with_one_line_before_tensorflow_is_imported(
    server, local_server, arguments, error
):
    values = {
        "free": find_free_ports(["grpc"])["grpc"],
        "taken": server[1]["rest"],
        "socket": server[2].parent / "socket",
    }
    done = call_main(local_server, *(argument.format(**values) for argument in arguments))
    assert done.returncode != 0
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1), done
    assert error in done.stderr


def test_a_monitoring_config_that_does_not_parse_ends_the_start(local_server, tmp_path):
    (tmp_path / "monitoring.config").write_text('prometheus_config { enable: true port: "x" }')
    ports = find_free_ports(["rest", "grpc"])
    options = [f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}", f"--model_base_path={MODELS}"]
    done = call_main(local_server, *options, f"--monitoring_config_file={tmp_path / 'monitoring.config'}")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done
    assert "Error parsing text-format tensorflow.serving.MonitoringConfig" in done.stderr


def test_the_version_is_tensorflows(local_server):
    done = call_main(local_server, "--version")
    version = importlib.metadata.version("tensorflow")
    assert (done.returncode, done.stdout) == (0, f"local server\nTensorFlow Library: {version}\n")


def test_a_stop_while_it_starts_is_no_error():
    port = find_free_ports(["grpc"])["grpc"]
    process = in_background(f"--port={port}", f"--model_base_path={MODELS}")
    mapped = psutil.Process(process.pid).memory_maps
    wait_until(lambda: any("tensorflow" in item.path for item in mapped()), "TensorFlow is not imported", process)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (0, [])


def test_the_server_prints_nothing_of_tensorflow_and_ends_on_sigterm(server, gate):
    process, ports, log = server

    def is_refused() -> bool:
        try:
            send(ports["rest"], Request("/v1/models/my_model", b"", method="GET"))
        except ConnectionRefusedError:
            return True
        except OSError:  # it is closing just now
            return False
        return False

    gate.make_slow(ports["grpc"])
    with ThreadPoolExecutor(1) as pool, gate.closed():
        unfinished = pool.submit(call_gated, ports["grpc"])
        gate.wait_for_run()
        process.send_signal(signal.SIGTERM)
        wait_until(is_refused, log.read_text)
        gate.open()
        assert unfinished.result()[0] == 200, "a request under way was dropped"
    assert process.wait(timeout=DEADLINE_S) == 0
    assert all(line.startswith("local server: ") for line in log.read_text().splitlines()), log.read_text()
