"""The null server: the floor under every measurement."""

import importlib
import json
import runpy
import signal
import subprocess
import sys

import numpy as np
from bad_requests import GOOD_ROW
from endpoint import Request, load_endpoints
from helpers import DEADLINE_S, REPOSITORY_DIR, run_python
from reference import load_test_rows
from server_process import ask, send

BENCHMARKS_DIR = REPOSITORY_DIR / "benchmarks"


def test_it_answers_the_same_probabilities_to_everything(null_server):
    rows, _ = load_test_rows()
    answers = [ask(null_server.endpoint, rows[:count], version) for count in (1, 2, 114) for version in ("1", "2")]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    assert answers[0].shape == (1, 2)


def test_it_is_a_floor_without_a_model():
    endpoint = load_endpoints()["null"]
    assert (endpoint.kind, endpoint.has_model) == ("floor", False)
    assert next(iter(load_endpoints())) == "null"


def test_its_answer_is_as_long_as_a_real_one(null_server, onnx_server):
    rows, _ = load_test_rows()
    port = onnx_server.endpoint.ports["rest"]
    lengths = [len(send(port, onnx_server.endpoint.request([row], "1"))[1]) for row in rows]
    constant = send(null_server.endpoint.ports["rest"], null_server.endpoint.request([GOOD_ROW], "1"))[1]
    assert abs(len(constant) - np.median(lengths)) <= 3


def test_it_runs_on_the_settings_of_the_onnx_server(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY_DIR / "onnx"))
    real = runpy.run_path(str(REPOSITORY_DIR / "onnx" / "server.py"))["UVICORN_SETTINGS"]
    assert real == importlib.import_module("null_server").UVICORN_SETTINGS


def test_it_reads_a_large_body_to_its_end(null_server):
    status, reply = send(null_server.endpoint.ports["rest"], Request("/predict", b"x" * 5_000_000))
    assert status == 200
    assert list(json.loads(reply)) == ["predictions"]


def test_a_taken_port_is_one_line(null_server):
    result = run_python("null_server.py", "--port", str(null_server.endpoint.port), cwd=BENCHMARKS_DIR)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "is in use" in result.stderr


def test_being_asked_to_stop_is_no_failure():
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "null_server.py", "--port", "0"],
            cwd=BENCHMARKS_DIR,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert "serving on" in process.stdout.readline()
            process.send_signal(number)
            errors = process.communicate(timeout=DEADLINE_S)[1]
        finally:
            process.kill()
            process.communicate()
        assert (process.returncode, errors) == (0, "")
