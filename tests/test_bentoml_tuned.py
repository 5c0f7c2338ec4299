"""bentoml/ beyond the default service: tuned_service answers as service does; limits; A/B; the batched API."""

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from bad_requests import GOOD_ROW, bad_requests
from endpoint import REPOSITORY_DIR, Request, load_endpoints
from reference import TOLERANCE, load_expected, load_test_rows
from server_process import ServerProcess, ask, find_free_ports, send

FOLDER = REPOSITORY_DIR / "bentoml"
DEADLINE_S = 30.0


@contextlib.contextmanager
def started(name: str):
    endpoint_class = load_endpoints()[name]
    with ServerProcess(endpoint_class(find_free_ports(list(endpoint_class.default_ports)))) as server:
        yield server


@pytest.fixture(scope="module")
def default_server():
    with started("bentoml") as server:
        yield server


@pytest.fixture(scope="module")
def tuned_server():
    with started("bentoml-tuned") as server:
        yield server


def post(server: ServerProcess, path: str, body) -> tuple[int, dict | list]:
    status, reply = send(server.endpoint.port, Request(path, json.dumps(body).encode()))
    return status, json.loads(reply)


def test_the_two_configuration_files_set_the_same_keys():
    def keys(value, path=()):
        if isinstance(value, dict):
            return {key for name, part in value.items() for key in keys(part, (*path, name))}
        return {path}

    default, tuned = (yaml.safe_load((FOLDER / name).read_text()) for name in ("default.yaml", "tuned.yaml"))
    assert keys(default) == keys(tuned)


def test_default_yaml_holds_bentomls_own_values():
    package = Path(importlib.util.find_spec("bentoml").origin).parent
    theirs = yaml.safe_load((package / "_internal/configuration/v2/default_configuration.yaml").read_text())

    def check(ours, theirs) -> None:
        for key, value in ours.items():
            if isinstance(value, dict):
                check(value, theirs[key])
            else:
                assert value == theirs[key], key

    check(yaml.safe_load((FOLDER / "default.yaml").read_text()), theirs)


@pytest.mark.parametrize(
    "body",
    [
        {"features": GOOD_ROW},
        {"features": [GOOD_ROW]},
        {"features": [GOOD_ROW, GOOD_ROW], "version": "v1.0.0"},
        {"features": [GOOD_ROW] * 300},
        {"features": [1, 2, 3, 4, 5]},
    ],
)
def test_both_services_answer_alike(default_server, tuned_server, body):
    (status, default), (tuned_status, tuned) = (post(each, "/predict", body) for each in (default_server, tuned_server))
    assert status == tuned_status == 200
    assert default.keys() == tuned.keys()
    assert default["version"] == tuned["version"]
    assert default["prediction"] == tuned["prediction"]
    assert np.abs(np.array(default["probability"]) - np.array(tuned["probability"])).max() < 1e-12
    assert np.shape(default["probability"]) == np.shape(tuned["probability"])


def test_both_services_refuse_alike(default_server, tuned_server):
    for case in bad_requests(default_server.endpoint):
        replies = []
        for server in (default_server, tuned_server):
            request = bad_requests(server.endpoint)[case]
            replies.append(send(server.endpoint.port, request))
        assert replies[0] == replies[1], case
        assert 400 <= replies[0][0] < 500, case


def test_requests_that_share_a_call_get_their_own_answers(tuned_server):
    rows, _ = load_test_rows()
    expected = {version: load_expected(version) for version in ("1", "2")}

    def ask_for(number: int) -> float:
        version, start, count = "12"[number % 2], number % len(rows), 1 + number % 3
        wanted = expected[version][start : start + count]
        return np.abs(ask(tuned_server.endpoint, rows[start : start + count], version) - wanted).max()

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert max(pool.map(ask_for, range(600))) <= TOLERANCE


def test_a_body_above_the_limit_is_refused(tuned_server, default_server):
    body = json.dumps({"features": [GOOD_ROW] * 40_000}).encode()
    assert len(body) > 1_000_000
    for server in (tuned_server, default_server):
        status, reply = send(server.endpoint.port, Request("/predict", body))
        assert status == 413
        assert b"send fewer rows" in reply


def test_chance_chooses_the_version_of_predict_ab_and_the_reply_says_which(tuned_server):
    expected = {f"v{version}.0.0": load_expected(version)[0] for version in ("1", "2")}
    row = load_test_rows()[0][0]
    seen = []
    for _ in range(60):  # all of one version by chance: once in 5e17 runs
        status, reply = post(tuned_server, "/predict_ab", {"features": row})
        assert status == 200
        assert np.abs(np.array(reply["probability"]) - expected[reply["version"]]).max() <= TOLERANCE
        seen.append(reply["version"])
    assert set(seen) == set(expected)
    assert post(tuned_server, "/predict_ab", {"features": row, "version": "v1.0.0"})[0] == 400


def test_the_batched_api_gives_each_request_its_own_answers(tuned_server):
    rows, _ = load_test_rows()
    expected = load_expected("2")

    def ask_for(number: int) -> float:
        status, reply = post(tuned_server, "/predict_batched", {"rows": rows[number : number + 2]})
        assert status == 200, reply
        return np.abs(np.array(reply) - expected[number : number + 2]).max()

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask_for, range(100))) <= TOLERANCE


def test_metrics_have_fine_buckets_and_count_direct_answers(tuned_server):
    ask(tuned_server.endpoint, [GOOD_ROW], "1")
    status, text = send(tuned_server.endpoint.port, Request("/metrics", b"", method="GET"))
    assert status == 200
    lines = [line for line in text.decode().splitlines() if 'endpoint="/predict"' in line]
    assert any('le="0.0005"' in line for line in lines), text[:3000]
    assert any("_count" in line and 'http_response_code="200"' in line for line in lines)


def test_a_killed_worker_is_replaced(tuned_server):
    worker = next(
        child for child in psutil.Process(tuned_server.pid).children(recursive=True) if child.net_connections()
    )
    os.kill(worker.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < deadline_s, "no answer after a worker was killed"
        with contextlib.suppress(OSError, RuntimeError):
            ask(tuned_server.endpoint, [GOOD_ROW], "1")
            break
        time.sleep(0.1)
    assert not worker.is_running()
