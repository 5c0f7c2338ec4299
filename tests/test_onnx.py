"""onnx/: conversion, inference in process, optimisation, and the HTTP server."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import psutil
import pytest

from bad_requests import GOOD_ROW, bad_requests
from client.ask import ask, send
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import (
    DEADLINE_S,
    REPOSITORY_DIR,
    Done,
    call_main,
    get,
    load_together,
    make_environment,
    post,
    run_python,
    stop_impatiently,
    wait_until,
)
from machine.free_ports import find_free_ports

ONNX_DIR = REPOSITORY_DIR / "onnx"
COLUMNS = 80
WORDS = {  # what the answer to each bad request must say
    "four features": "length 5",
    "six features": "length 5",
    "ragged rows": "row 1",
    "empty batch": "empty",
    "empty row": "length 5",
    "a string among numbers": "row 0, mean radius",
    "a numeric string": "got `str`",
    "null among numbers": "got `null`",
    "null instead of rows": "got `null`",
    "a string instead of rows": "got `str`",
    "a number instead of rows": "Expected `array`",
    "NaN": "no NaN",
    "Infinity": "no Infinity",
    "minus Infinity": "no Infinity",
    "larger than float32": "float32",
    "nested too deep": "got `array`",
    "the wrong key": "`wrong`",
    "an array instead of an object": "Expected `object`",
    "malformed JSON": "truncated",
    "an empty body": "empty",
    "not UTF-8": "data",
    "the wrong content type": "application/xml",
    "10 MB of junk": "1000000 bytes",
    "10 MB of brackets": "1000000 bytes",
    "an unknown version": "'99'",
}


def tensor(rows: list, **changes) -> dict:
    """An inference request of the Open Inference Protocol, with changes to its one input."""
    return {"inputs": [{"name": "input", "shape": [len(rows), 5], "datatype": "FP32", "data": rows, **changes}]}


@pytest.fixture(scope="module")
def new_account(tmp_path_factory) -> dict[str, str | None]:
    """The variables of a new account, whose home folder is empty, and for which nobody has switched telemetry off."""
    return {"HOME": str(tmp_path_factory.mktemp("home")), "XDG_CACHE_HOME": None, "ORT_DISABLE_TELEMETRY": None}


@pytest.fixture(scope="module")
def reconverted(tmp_path_factory, new_account) -> tuple[subprocess.CompletedProcess, Path]:
    """convert_to_onnx.py run once more, from the repository's root, into another folder."""
    folder = tmp_path_factory.mktemp("converted")
    return run_python("onnx/convert_to_onnx.py", "--output-dir", folder, env=new_account), folder


@pytest.fixture(scope="module")
def optimize() -> ModuleType:
    """The module optimize."""
    return load_together(ONNX_DIR, "optimize")[0]


@pytest.fixture(scope="module")
def optimized(tmp_path_factory, optimize) -> tuple[Done, Path]:
    """optimize.py, with timings too short to mean anything."""
    folder = tmp_path_factory.mktemp("optimized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimize, "REPEATS", 1)
        patch.setattr(optimize, "TIMING_S", 0.001)
        return call_main(optimize, "--output-dir", folder, columns=COLUMNS), folder


@pytest.fixture(scope="module")
def scripts() -> SimpleNamespace:
    """The modules of the server and of inference in process."""
    names = ("server", "http_messages", "http_server", "repository", "serving", "settings", "onnx_inference")
    return SimpleNamespace(**dict(zip(names, load_together(ONNX_DIR, *names), strict=True)))


@pytest.fixture(scope="module")
def inference(scripts) -> ModuleType:
    """The module onnx_inference."""
    return scripts.onnx_inference


@pytest.fixture
def models_copy(tmp_path) -> Path:
    """A copy of onnx/models, for a test to change."""
    return Path(shutil.copytree(ONNX_DIR / "models", tmp_path / "models"))


@pytest.fixture
def start_script(new_account):
    """A function that starts a script of onnx/ with these arguments; a process that still runs at the end is killed."""
    started = []

    def start(*arguments: str | Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ONNX_DIR,
            env=make_environment(new_account),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def start_server(start_script):
    """A function that starts server.py with these arguments."""
    return lambda *arguments: start_script("server.py", *arguments)


def wait_until_serving(process: subprocess.Popen) -> int:
    """Read the server's output up to its last line of the start; return the port that it names."""
    for line in process.stdout:
        if found := re.search(r"serving on http://127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise AssertionError(f"ended with {process.wait()}: {process.stderr.read()}")


# The server: right answers


@pytest.mark.parametrize("version", ["1", "2"])
def test_every_test_row_gets_the_expected_probabilities(onnx_server, version):
    rows, _ = load_test_rows()
    assert np.abs(ask(onnx_server.endpoint, rows, version) - load_expected(version)).max() <= TOLERANCE


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_model_from_scikit_learn_answers_the_same(onnx_server, version):
    rows, _ = load_test_rows()
    status, reply = post(onnx_server, f"/v2/models/my_model_sklearn/versions/{version}/infer", tensor(rows))
    assert status == 200
    probabilities = np.reshape(reply["outputs"][0]["data"], reply["outputs"][0]["shape"])
    assert np.abs(probabilities - load_expected(version)).max() <= TOLERANCE


def test_without_a_version_the_newest_answers(onnx_server):
    rows, _ = load_test_rows()
    _, newest = post(onnx_server, "/predict", {"data": rows})
    assert np.abs(np.array(newest["predictions"]) - load_expected("2")).max() <= TOLERANCE
    assert post(onnx_server, "/v2/models/my_model/infer", tensor(rows))[1]["model_version"] == "2"


def test_one_row_alone_is_answered_as_among_many(onnx_server):
    rows, _ = load_test_rows()
    alone = np.concatenate([ask(onnx_server.endpoint, [row], "2") for row in rows[:10]])
    assert np.abs(alone - ask(onnx_server.endpoint, rows, "2")[:10]).max() <= 1e-6


def test_integers_are_numbers(onnx_server):
    status, reply = post(onnx_server, "/predict/1", b'{"data": [[14, 24, 0, 1, 0]]}')
    assert (status, reply) == post(onnx_server, "/predict/1", b'{"data": [[14.0, 24.0, 0.0, 1.0, 0.0]]}')
    assert status == 200


def test_the_largest_body_is_answered_row_by_row(onnx_server):
    rows, _ = load_test_rows()
    many = (rows * 200)[:20_000]
    probabilities = ask(onnx_server.endpoint, many, "2")
    assert np.abs(probabilities - np.resize(load_expected("2"), probabilities.shape)).max() <= TOLERANCE


# The server: the Open Inference Protocol


def test_health_and_metadata_name_what_is_served(onnx_server):
    assert get(onnx_server, "/v2/health/live") == (200, {"live": True})
    assert get(onnx_server, "/v2/health/ready") == (200, {"ready": True})
    assert get(onnx_server, "/v2/models/my_model/versions/1/ready") == (200, {"name": "my_model", "ready": True})
    assert get(onnx_server, "/v2")[1]["name"] == "onnxruntime"
    assert get(onnx_server, "/v2/models/my_model") == (
        200,
        {
            "name": "my_model",
            "versions": ["1", "2"],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 5]}],
            "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
        },
    )


def test_infer_takes_indented_json(onnx_server):
    body = json.dumps(tensor([GOOD_ROW]), indent=2).encode()
    status, reply = post(onnx_server, "/v2/models/my_model/versions/1/infer", body)
    assert (status, len(reply["outputs"][0]["data"])) == (200, 2), reply


def test_infer_takes_flat_and_nested_data_and_returns_the_id(onnx_server):
    rows, _ = load_test_rows()
    flat = [value for row in rows[:3] for value in row]
    path = "/v2/models/my_model/versions/1/infer"
    nested_reply = post(onnx_server, path, {"id": "42", **tensor(rows[:3]), "outputs": [{"name": "output"}]})
    assert nested_reply == post(onnx_server, path, {"id": "42", **tensor(rows[:3], data=flat)})
    status, reply = nested_reply
    assert (status, reply["id"], reply["model_name"], reply["model_version"]) == (200, "42", "my_model", "1")
    assert (reply["outputs"][0]["shape"], reply["outputs"][0]["datatype"]) == ([3, 2], "FP32")
    assert np.abs(np.reshape(reply["outputs"][0]["data"], (3, 2)) - load_expected("1")[:3]).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (tensor([GOOD_ROW], name="other"), "'input'"),
        ({"inputs": []}, "expected exactly 'input', got none"),
        (tensor([GOOD_ROW], datatype="INT8"), "INT8"),
        (tensor([GOOD_ROW], shape=[5]), "shape"),
        (tensor([GOOD_ROW], shape=[1, 4]), "shape"),
        (tensor([GOOD_ROW], shape=[2, 5]), "do not fill"),
        (tensor([], shape=[1, 5]), "do not fill"),
        (tensor([GOOD_ROW], data=GOOD_ROW[:4]), "do not fill"),
        (tensor([GOOD_ROW], data=[["1.0", *GOOD_ROW[1:]]]), "$.inputs[0].data[0][0]` (row 0, mean radius)"),
        (tensor([GOOD_ROW], data=[1e39, *GOOD_ROW[1:]]), "float32"),
        (tensor([GOOD_ROW], data=[[True, *GOOD_ROW[1:]]]), "got `bool`"),
        (tensor([GOOD_ROW], data="abc"), "got `str`"),
        ({**tensor([GOOD_ROW]), "outputs": [{"name": "other"}]}, "'other'"),
        (b'{"inputs": [{"name": "input"}]}', "shape"),
        (b'{"inputs": [], "other": ' + b"[" * 500_000, "nested too deep"),
    ],
)
def test_infer_refuses_a_bad_tensor_and_says_why(onnx_server, body, word):
    status, reply = post(onnx_server, "/v2/models/my_model/infer", body)
    assert status == 400
    assert word in reply["error"]


# The server: bad requests


@pytest.mark.parametrize("case", WORDS)
def test_a_bad_request_is_refused_with_its_reason_and_the_server_serves_on(onnx_server, case):
    request = bad_requests(onnx_server.endpoint)[case]
    status, reply = send(onnx_server.endpoint.ports["rest"], request)
    assert 400 <= status < 500
    assert WORDS[case] in json.loads(reply)["error"]
    assert np.abs(ask(onnx_server.endpoint, [GOOD_ROW], "1").sum() - 1) < 1e-6


def test_every_shared_bad_request_is_covered(onnx_server):
    assert set(WORDS) == set(bad_requests(onnx_server.endpoint))


def test_a_boolean_is_not_a_number(onnx_server):
    status, reply = post(onnx_server, "/predict", {"data": [GOOD_ROW, [*GOOD_ROW[:4], True]]})
    assert status == 400
    assert "(row 1, mean symmetry)" in reply["error"]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/v2/models/other/infer", "'other'"),
        ("/v2/models/my_model/versions/99/infer", "'99'"),
        ("/v2/models/my_model/versions/01/infer", "'01'"),
        ("/predictions", "'/predictions'"),
    ],
)
def test_an_unknown_path_model_or_version_is_404(onnx_server, path, word):
    status, reply = post(onnx_server, path, tensor([GOOD_ROW]))
    assert status == 404
    assert word in reply["error"]


def test_the_wrong_method_is_405_and_names_the_right_one(onnx_server):
    connection = http.client.HTTPConnection("127.0.0.1", onnx_server.endpoint.ports["rest"], timeout=DEADLINE_S)
    for method, path, allowed in (("GET", "/predict", "POST"), ("POST", "/v2/health/live", "GET, HEAD")):
        connection.request(method, path)
        reply = connection.getresponse()
        assert (reply.status, reply.getheader("Allow")) == (405, allowed)
        assert method in json.loads(reply.read())["error"]
    connection.close()


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
    ],
)
def test_json_is_the_only_content_type(onnx_server, content_type, status):
    connection = http.client.HTTPConnection("127.0.0.1", onnx_server.endpoint.ports["rest"], timeout=DEADLINE_S)
    headers = {} if content_type is None else {"Content-Type": content_type}
    connection.request("POST", "/predict", json.dumps({"data": [GOOD_ROW]}), headers)
    assert connection.getresponse().status == status
    connection.close()


def test_a_kept_connection_stays_in_step_after_refused_bodies(onnx_server):
    connection = http.client.HTTPConnection("127.0.0.1", onnx_server.endpoint.ports["rest"], timeout=DEADLINE_S)
    good = json.dumps({"data": [GOOD_ROW]})
    local_ports = set()
    for path, body, status in (
        ("/predict", good, 200),
        ("/predict", b"x" * 3_000_000, 413),
        ("/predict", good, 200),
        ("/predict", iter([b"x" * 100_000] * 30), 413),  # chunked: its size is not announced
        ("/predict", good, 200),
        ("/predict/99", b"x" * 3_000_000, 404),
        ("/predict", b"{", 400),
        ("/predict", good, 200),
    ):
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        local_ports.add(connection.sock.getsockname()[1])
        reply = connection.getresponse()
        assert reply.status == status
        assert ("predictions" if status == 200 else "error") in json.loads(reply.read())
    connection.close()
    assert len(local_ports) == 1


def test_an_oversized_body_is_not_kept_in_memory(onnx_server):
    before_bytes = psutil.Process(onnx_server.pid).memory_info().rss
    connection = http.client.HTTPConnection("127.0.0.1", onnx_server.endpoint.ports["rest"], timeout=DEADLINE_S)
    connection.request("POST", "/predict", iter([b"x" * 1_000_000] * 60))
    assert connection.getresponse().status == 413
    connection.close()
    assert psutil.Process(onnx_server.pid).memory_info().rss - before_bytes < 20_000_000


def test_small_replies_do_not_wait_for_nagle(scripts):
    """Every connection has TCP_NODELAY, whether uvloop accepted it or, for a busy server, Server.accept."""
    import uvloop

    few = scripts.http_server.BUSY_CONNECTIONS + 1
    count = few + 2 * scripts.http_server.ACCEPTS_A_TURN
    application = SimpleNamespace(routes=None, find=None, observe=None)

    async def read_options() -> list[int]:
        server, ended = scripts.http_server.Server(application, scripts.http_messages.Limits()), asyncio.Event()
        taken: list[int] = []  # how many were in, each time that Server.accept was asked

        def accept(listener: socket.socket) -> None:
            taken.append(len(server.connections))
            scripts.http_server.Server.accept(server, listener)

        server.accept = accept
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        serving = asyncio.create_task(server.serve(listener, ended))
        with contextlib.ExitStack() as clients:
            for more, all_of_them in ((few, few), (count - few, count)):
                for _ in range(more):
                    clients.enter_context(socket.create_connection(address, timeout=DEADLINE_S))
                await asyncio.to_thread(wait_until, lambda n=all_of_them: len(server.connections) == n, "all are in")
                looked_s = server.now_s  # at its next look it sees how many there are
                await asyncio.to_thread(wait_until, lambda s=looked_s: server.now_s > s, "it looks again")
            assert taken and min(taken) >= few
            sockets = [each.transport.get_extra_info("socket") for each in server.connections]
            options = [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets]
        ended.set()
        await serving
        return options

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        options = runner.run(asyncio.wait_for(read_options(), DEADLINE_S))
    assert len(options) == count and all(options)


# The server: start and stop


@pytest.mark.parametrize(
    ("folder", "advice"), [("models", "run python convert_to_onnx.py"), ("own", "<name>/<version>")]
)
@pytest.mark.parametrize("is_there", [True, False])
def test_without_a_model_the_server_says_how_to_get_one(scripts, tmp_path, monkeypatch, folder, advice, is_there):
    monkeypatch.setattr(scripts.server, "FOLDER", tmp_path)
    if is_there:
        (tmp_path / folder).mkdir()
    config = ONNX_DIR / "default.toml"
    ended = call_main(scripts.server, "--port", "0", "--config", config, "--model-repository", tmp_path / folder)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert advice in ended.stderr


def test_a_corrupt_version_is_reported_and_the_others_are_served(models_copy, start_server):
    path = models_copy / "my_model" / "2" / "model.onnx"
    path.write_bytes(path.read_bytes()[:5000])
    process = start_server("--port", "0", "--model-repository", models_copy)
    port = wait_until_serving(process)
    rows, _ = load_test_rows()
    status, reply = post(port, "/predict", {"data": rows})
    assert status == 200
    assert np.abs(np.array(reply["predictions"]) - load_expected("1")).max() <= TOLERANCE
    process.terminate()
    errors = process.communicate(timeout=DEADLINE_S)[1]
    assert (process.returncode, errors.count("\n")) == (0, 1)
    assert "my_model version 2 is left out" in errors


def test_the_newest_version_is_the_highest_number(models_copy, scripts):
    shutil.copytree(models_copy / "my_model" / "1", models_copy / "my_model" / "10")
    (models_copy / "my_model" / "draft").mkdir()
    settings = scripts.settings.read_settings(ONNX_DIR / "tuned.toml")
    repository = scripts.repository.Repository(models_copy, settings)
    repository.scan()
    assert list(repository.models["my_model"]) == ["1", "2", "10"]
    routes = scripts.serving.Serving(repository, "my_model", settings).routes
    assert routes["/predict"] is routes["/predict/10"]
    assert routes["/v2/models/my_model/infer"] is routes["/v2/models/my_model/versions/10/infer"]


def test_the_index_lists_as_ready_what_answers_and_nothing_else(models_copy, scripts):
    settings = scripts.settings.read_settings(ONNX_DIR / "tuned.toml")
    repository = scripts.repository.Repository(models_copy, settings)
    repository.scan()
    serving = scripts.serving.Serving(repository, "my_model", settings)

    def states() -> dict[str, str]:
        return {entry["version"]: entry["state"] for entry in serving.index(False) if entry["name"] == "my_model"}

    shutil.copytree(models_copy / "my_model" / "1", models_copy / "my_model" / "10")
    (models_copy / "my_model" / "11").mkdir()
    (models_copy / "my_model" / "11" / "model.onnx").write_bytes(b"junk")
    for _ in range(2):  # what is new is read once it has kept still
        repository.scan()  # in a thread of its own: until the loop has taken it over, nothing of it counts
    assert states() == {"1": "READY", "2": "READY"}
    serving.update()
    assert states() == {"1": "READY", "2": "READY", "10": "READY", "11": "UNAVAILABLE"}
    assert "/v2/models/my_model/versions/10" in serving.routes


def test_the_server_can_put_another_model_behind_predict(start_server):
    port = wait_until_serving(start_server("--port", "0", "--model", "my_model_sklearn"))
    rows, _ = load_test_rows()
    _, reply = post(port, "/predict/2", {"data": rows})
    assert np.abs(np.array(reply["predictions"]) - load_expected("2")).max() <= TOLERANCE


def test_with_every_version_corrupt_the_server_does_not_start(models_copy, scripts):
    for path in models_copy.glob("*/*/model.onnx"):
        path.write_bytes(b"junk")
    ended = call_main(scripts.server, "--port", "0", "--model-repository", models_copy)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("server: no model to serve")


def test_a_taken_port_is_one_line_and_the_first_server_serves_on(onnx_server, start_server):
    process = start_server("--port", str(onnx_server.endpoint.ports["rest"]))
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output, errors.count("\n")) == (1, "", 1)
    assert "is in use" in errors
    assert ask(onnx_server.endpoint, [GOOD_ROW], "1").shape == (1, 2)


@pytest.mark.parametrize(
    ("number", "status", "last"),
    [(signal.SIGTERM, 0, "stopped\n"), (signal.SIGINT, 0, "stopped\n"), (signal.SIGHUP, -1, "")],
)
def test_a_signal_ends_the_server_at_once_and_wholly(start_server, number, status, last):
    process = start_server("--port", "0")
    port = wait_until_serving(process)
    idle = socket.create_connection(("127.0.0.1", port))  # a kept connection does not hold it up
    assert post(port, "/predict", {"data": [GOOD_ROW]})[0] == 200
    assert psutil.Process(process.pid).children(recursive=True) == []
    process.send_signal(number)
    # Before the 75 s after which the server closes an idle connection.
    output, errors = process.communicate(timeout=60)
    idle.close()
    assert (process.returncode, output, errors) == (status, last, "")


def test_ctrl_c_ends_all_workers_with_one_line(start_server):
    process = start_server("--port", "0", "--workers", "2")
    wait_until_serving(process)
    assert stop_impatiently(process, signal.SIGINT) == 0
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert errors == ""
    assert output.splitlines()[-1] == "stopped"
    assert output.count("stopped") == 1


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--intra-op-threads", "-1"], ["--device", "tpu"]])
def test_a_bad_flag_is_reported(scripts, arguments):
    ended = call_main(scripts.server, *arguments)
    assert ended.returncode == 2
    assert arguments[0].strip("-").replace("-", "_") in ended.stderr.splitlines()[-1].replace("-", "_")


# Conversion


@pytest.mark.slow
def test_converting_again_gives_the_same_models_and_writes_nothing_to_the_home_folder(reconverted, new_account):
    result, folder = reconverted
    assert (result.returncode, result.stderr) == (0, "")
    assert list(Path(new_account["HOME"]).iterdir()) == []
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(names) == 5
    rows = np.array(load_test_rows()[0], dtype=np.float32)
    for name in names:
        assert np.abs(predict_with(folder / name, rows) - predict_with(ONNX_DIR / name, rows)).max() <= 1e-6


def predict_with(path: Path, rows: np.ndarray) -> np.ndarray:
    """Evaluate a model with the reference evaluator of the package onnx: NumPy, and not ONNX Runtime."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(str(path)).run(["output"], {"input": rows})[0]


@pytest.mark.slow
def test_conversion_prints_the_accuracy_of_all_four_models(reconverted):
    rows = re.findall(r"^(PyTorch|scikit-learn) +([12]) +(\S+) +(\S+) +(\S+) +(\S+)$", reconverted[0].stdout, re.M)
    assert {row[:2] for row in rows} == {
        (source, version) for source in ("PyTorch", "scikit-learn") for version in "12"
    }
    assert {(row[1], row[2], row[3]) for row in rows} == {("1", "0.9386", "0.3325"), ("2", "0.9386", "0.1559")}
    assert all(float(row[4]) <= 1e-6 and float(row[5]) <= 1e-5 for row in rows)


@pytest.mark.parametrize(
    ("script", "first"),
    [pytest.param("reconverted", "loading PyTorch", marks=pytest.mark.slow), ("optimized", "optimising")],
)
def test_a_long_script_shows_its_steps_and_fits_a_terminal(request, script, first):
    ended, _ = request.getfixturevalue(script)
    *lines, last = ended.stdout.splitlines()
    assert lines[0].startswith(first)
    assert last.startswith("wrote 5 models to ")  # the one line whose length depends on the folder
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize(
    "path", sorted(ONNX_DIR.glob("models/*/*/model.onnx")), ids=lambda path: "-".join(path.parts[-3:-1])
)
def test_a_converted_model_is_valid_and_says_what_it_is(path):
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["output"]
    facts = {fact.key: fact.value for fact in model.metadata_props}
    assert facts["version"] == path.parent.name
    assert json.loads(facts["features"])[0] == "mean radius"
    assert str(REPOSITORY_DIR).encode() not in path.read_bytes()


def test_the_newest_version_lies_where_the_document_looks_for_it():
    assert (ONNX_DIR / "model.onnx").read_bytes() == (ONNX_DIR / "models/my_model/2/model.onnx").read_bytes()


# Inference in process


def test_the_script_predicts_and_says_where(inference):
    result = call_main(inference)
    assert (result.returncode, result.stderr) == (0, "")
    assert "test accuracy: 0.9386" in result.stdout
    assert "Prediction: [[1. 0.]]" in result.stdout
    assert re.search(r"predicted 115 rows with (CPU|CUDA)ExecutionProvider$", result.stdout)


def test_the_predictor_of_the_document_works_as_written(inference, monkeypatch):
    monkeypatch.chdir(ONNX_DIR)
    predictor = inference.ONNXPredictor("model.onnx")
    assert predictor.predict([[1.0, 2.0, 3.0, 4.0, 5.0]]).shape == (1, 2)
    rows, _ = load_test_rows()
    assert np.abs(predictor.predict(rows) - load_expected("2")).max() <= TOLERANCE


def test_demanding_cuda_never_falls_back_in_silence(inference):
    result = call_main(inference, "--device", "cuda")
    if result.returncode == 0:
        assert "with CUDAExecutionProvider" in result.stdout
    else:
        assert (result.stdout, result.stderr.count("\n")) == ("", 1)
        assert "CUDA was requested" in result.stderr
        with pytest.raises(inference.DeviceError, match="CUDA was requested"):
            inference.ONNXPredictor(ONNX_DIR / "model.onnx", "cuda")


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([], "empty"),
        ([[]], r"shape \(1, 0\)"),
        ([GOOD_ROW[:4]], r"shape \(1, 4\)"),
        (GOOD_ROW, r"shape \(5,\)"),
        ([GOOD_ROW, GOOD_ROW[:4]], "differ in length"),
        ([["1", *GOOD_ROW[1:]]], "not a number"),
        ([[None, *GOOD_ROW[1:]]], "not a number"),
        ([[True] * 5], "not a number"),
        ([GOOD_ROW, [float("nan"), *GOOD_ROW[1:]]], "row 1, mean radius"),
        ([[*GOOD_ROW[:4], 1e39]], "row 0, mean symmetry"),
        (None, "not a number"),
    ],
)
def test_the_predictor_refuses_bad_rows(inference, rows, word):
    with pytest.raises(ValueError, match=word):
        inference.ONNXPredictor(ONNX_DIR / "model.onnx", "cpu").predict(rows)


@pytest.mark.parametrize("script", ["inference", "optimize"])
@pytest.mark.parametrize(("content", "word"), [(None, "not found"), (b"junk", "cannot be loaded")])
def test_a_missing_or_corrupt_model_is_one_line(request, tmp_path, monkeypatch, script, content, word):
    module = request.getfixturevalue(script)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    result = call_main(module)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert word in result.stderr
    assert "run python convert_to_onnx.py" in result.stderr


def test_a_model_of_another_shape_is_refused(inference, tmp_path):
    import onnx

    number = onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["batch"])
    node = onnx.helper.make_node("Identity", ["label"], ["same"])
    same = onnx.helper.make_tensor_value_info("same", onnx.TensorProto.INT64, ["batch"])
    graph = onnx.helper.make_graph([node], "labels", [number], [same])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "labels.onnx")
    with pytest.raises(inference.ModelError, match="'label' is tensor"):
        inference.ONNXPredictor(tmp_path / "labels.onnx", "cpu")


# Optimisation


def test_optimizing_writes_every_variant_and_prints_one_table(optimized):
    result, folder = optimized
    assert (result.returncode, result.stderr) == (0, "")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "model_all.onnx",
        "model_basic.onnx",
        "model_extended.onnx",
        "model_quantized.onnx",
        "model_quantized_static.onnx",
    ]
    assert all(len(re.findall(rf"^{name} ", result.stdout, re.M)) == 1 for name in [*names, "model.onnx"])


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_an_optimized_graph_answers_the_same(optimized, inference, level):
    rows, _ = load_test_rows()
    probabilities = inference.ONNXPredictor(optimized[1] / f"model_{level}.onnx", "cpu").predict(rows)
    assert np.abs(probabilities - load_expected("2")).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["model_quantized.onnx", "model_quantized_static.onnx"])
def test_a_quantized_model_stays_within_its_stated_tolerance(optimized, inference, name):
    import onnx

    rows, labels = load_test_rows()
    path = optimized[1] / name
    probabilities = inference.ONNXPredictor(path, "cpu").predict(rows)
    assert np.abs(probabilities - load_expected("2")).max() <= 0.1
    # Else this processor clips sums of int8 products, and another one does not.
    assert np.abs(probabilities - predict_with(path, np.array(rows, np.float32))).max() <= 1e-5
    assert np.mean(probabilities.argmax(axis=1) == labels) >= 0.9386 - 0.02
    assert path.stat().st_size < (ONNX_DIR / "model.onnx").stat().st_size
    weights = onnx.load(path).graph.initializer
    assert any(weight.data_type == onnx.TensorProto.INT8 for weight in weights)


# Long work


@pytest.mark.parametrize(
    ("script", "step", "stop"),
    [
        ("convert_to_onnx.py", "loading", signal.SIGINT),  # imports
        # trains: scikit-learn would go on
        pytest.param("convert_to_onnx.py", "source", signal.SIGINT, marks=pytest.mark.slow),
        ("optimize.py", "optimising", signal.SIGTERM),
    ],
)
def test_a_stop_signal_ends_a_script_with_one_line_and_leaves_no_file(start_script, tmp_path, script, step, stop):
    folder = tmp_path / "models"
    process = start_script(script, "--output-dir", folder)
    wait_until(lambda: process.stdout.readline().startswith(step), f"the line {step}", process)
    process.send_signal(stop)
    errors = process.communicate(timeout=DEADLINE_S)[1]
    name = script.removesuffix(".py")
    assert (process.returncode, errors) == (1, f"{name}: interrupted; nothing was written\n")
    assert not folder.exists() or not list(folder.iterdir())


# The folder


@pytest.mark.parametrize("script", ["server", "onnx_inference", "optimize"])
def test_a_script_writes_nothing_to_the_home_folder(new_account, start_script, script):
    """ONNX Runtime would write a device's number and a report to ~/.cache, and send the report to Microsoft."""
    process = start_script("-c", f"import {script}")
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert list(Path(new_account["HOME"]).iterdir()) == []


def test_the_scripts_need_no_other_folder_but_data(tmp_path):
    shutil.copytree(ONNX_DIR, tmp_path / "onnx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY_DIR / "data", tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    program = "import optimize, server, onnx_inference; onnx_inference.main()"
    assert "with" in run_python("-c", program, cwd=tmp_path / "onnx", check=True).stdout


def test_the_reference_says_how_long_the_server_is():
    said = re.search(r"([\d,]+) lines in (\d+) files, none above (\d+)", (ONNX_DIR / "REFERENCE.md").read_text())
    lines, files, longest = (int(number.replace(",", "")) for number in said.groups())
    copied = re.findall(r"\w+\.py", re.search(r"^COPY .*?\./$", (ONNX_DIR / "Dockerfile").read_text(), re.M | re.S)[0])
    counted = [len((ONNX_DIR / name).read_text().splitlines()) for name in copied]
    assert (len(counted), max(counted) <= longest) == (files, True)
    assert abs(sum(counted) - lines) < 100


def test_the_image_health_check_is_a_real_prediction(onnx_server):
    dockerfile = (ONNX_DIR / "Dockerfile").read_text().replace("\\\n", "")
    command = json.loads(re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", dockerfile, re.M)[1])
    dead_port = find_free_ports(["rest"])["rest"]
    for port, status in ((onnx_server.endpoint.ports["rest"], 0), (dead_port, 1)):
        patient = [part.replace("timeout=2", f"timeout={DEADLINE_S}") for part in command[1:]]
        proxies = {name: None for name in os.environ if name.lower().endswith("_proxy")}
        assert run_python(*(part.replace(":8000", f":{port}") for part in patient), env=proxies).returncode == status
