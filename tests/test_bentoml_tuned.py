"""bentoml/ beyond the default service: tuned_service answers as service does; limits; A/B; the batched API."""

import asyncio
import collections
import concurrent.futures
import contextlib
import gc
import http.client
import importlib
import importlib.util
import json
import os
import shutil
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
from server_process import ServerError, ServerProcess, ask, send

FOLDER = REPOSITORY_DIR / "bentoml"
DEADLINE_S = 30.0


@contextlib.contextmanager
def started(name: str):
    endpoint_class = load_endpoints()[name]
    with ServerProcess(endpoint_class.on_free_ports()) as server:
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


@pytest.mark.parametrize("rows", [[], GOOD_ROW, [GOOD_ROW[:4]], [["1", *GOOD_ROW[1:]]], {}, None])
def test_the_batched_api_refuses_bad_rows_one_by_one(tuned_server, rows):
    def ask_for(number: int) -> int:
        return post(tuned_server, "/predict_batched", {"rows": rows if number % 2 else [GOOD_ROW]})[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask_for, range(8))) == [200, 400] * 4


def test_monitor_writes_features_and_predictions_of_every_row(default_server, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "bentoml", ignore=shutil.ignore_patterns("prometheus_multiproc_dir", "bentos"))
    rows, _ = load_test_rows()
    for name in ("bentoml", "bentoml-tuned"):
        endpoint = load_endpoints()[name].on_free_ports()
        endpoint.folder = tmp_path / "bentoml"
        environment = endpoint.environment()
        endpoint.environment = lambda environment=environment: {**environment, "MONITOR": "seen"}
        with ServerProcess(endpoint):
            ask(endpoint, rows[:20], "2")
        path = endpoint.folder / "monitoring" / "seen" / "data" / "data.1.log"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records = [record for record in records if record["version"] == "v2.0.0"]
        path.unlink()
        assert [record["mean radius"] for record in records] == [row[0] for row in rows[:20]]
        answers = np.array([record["P(benign)"] for record in records])
        assert np.abs(answers - load_expected("2")[:20, 1]).max() <= TOLERANCE
    assert post(default_server, "/predict", {"features": GOOD_ROW})[0] == 200
    assert not (FOLDER / "monitoring").exists(), "written though nobody asked for it"


def waiting_timers() -> int:
    return sum(isinstance(each, asyncio.TimerHandle) and not each.cancelled() for each in gc.get_objects())


def test_an_answered_request_leaves_no_timer_as_bentomls_own_middleware_does(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    guard = importlib.import_module("guard")
    middleware_class = guard.TimeoutMiddleware

    async def application(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_message) -> None:
        pass

    async def left_by_ten_requests(answer) -> int:
        middleware = middleware_class(application, 60.0)
        before = waiting_timers()
        for _ in range(10):
            await answer(middleware, {"type": "http"}, receive, send)
        return waiting_timers() - before

    assert asyncio.run(left_by_ten_requests(middleware_class.__call__)) == 10, "BentoML has mended it: drop ours"
    assert asyncio.run(left_by_ten_requests(guard.answer_in_time)) == 0


def test_a_request_that_takes_too_long_still_gets_504(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    guard = importlib.import_module("guard")
    sent = []

    async def application(_scope, _receive, _send):
        await asyncio.sleep(60)

    async def send(message) -> None:
        sent.append(message)

    middleware = guard.TimeoutMiddleware(application, 0.05)
    asyncio.run(guard.answer_in_time(middleware, {"type": "http"}, None, send))
    assert sent[0]["status"] == 504


def test_a_corrupt_version_in_the_store_neither_starts_nor_touches_the_server_that_runs(tmp_path):
    copy = tmp_path / "bentoml"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("prometheus_multiproc_dir", "bentos"))
    endpoints = [load_endpoints()["bentoml-tuned"].on_free_ports() for _ in range(2)]
    for endpoint in endpoints:
        environment = endpoint.environment() | {"BENTOML_HOME": str(copy / "store")}
        endpoint.environment = lambda environment=environment: environment
    rows, _ = load_test_rows()
    with ServerProcess(endpoints[0]):
        model = copy / "store" / "models" / "my_model" / "v2.0.0" / "saved_model.pkl"
        model.write_bytes(model.read_bytes()[:3000])
        with pytest.raises(ServerError, match="v2.0.0 cannot be loaded"), ServerProcess(endpoints[1]):
            pass
        assert np.abs(ask(endpoints[0], rows, "2") - load_expected("2")).max() <= TOLERANCE


def count_answers(port: int, requests: int, act, at: int) -> collections.Counter:
    """Ask for both versions on a connection each, 8 at once; call `act` when `at` are asked. Count the outcomes."""
    rows, _ = load_test_rows()
    expected = {f"v{version}.0.0": load_expected(version) for version in ("1", "2")}

    def ask_for(number: int) -> str:
        if number == at:
            act()
        place, version = number % len(rows), f"v{number % 2 + 1}.0.0"
        body = json.dumps({"features": [rows[place]] * 3, "version": version}).encode()
        try:
            status, reply = send(port, Request("/predict", body), timeout_s=60)
        except (OSError, http.client.HTTPException):
            return "lost"
        if status != 200:
            return f"status {status}"
        answer = json.loads(reply)
        right = np.abs(np.array(answer["probability"]) - expected[version][place]).max() <= TOLERANCE
        return "right" if right and answer["version"] == version else "wrong"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return collections.Counter(pool.map(ask_for, range(requests)))


def find_worker(server: ServerProcess) -> psutil.Process:
    return next(child for child in psutil.Process(server.pid).children(recursive=True) if child.net_connections())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_ends_under_load_loses_at_most_what_was_under_way(capsys, number):
    """SIGTERM is how a new service.py or model is taken up without closing the port; eight clients ask."""
    with started("bentoml-tuned") as server:
        worker = find_worker(server)
        outcomes = count_answers(server.endpoint.port, 1000, lambda: worker.send_signal(number), 300)
        assert not worker.is_running()
    with capsys.disabled():
        print(f"\nbentoml-tuned, {number.name} for the worker: of 1000 {dict(outcomes)}")
    assert set(outcomes) <= {"right", "lost"}, outcomes
    assert outcomes["lost"] <= 8, outcomes


def test_a_killed_worker_is_replaced(tuned_server):
    worker = find_worker(tuned_server)
    os.kill(worker.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < deadline_s, "no answer after a worker was killed"
        with contextlib.suppress(OSError, RuntimeError):
            ask(tuned_server.endpoint, [GOOD_ROW], "1")
            break
        time.sleep(0.1)
    assert not worker.is_running()
