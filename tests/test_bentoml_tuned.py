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
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from bad_requests import GOOD_ROW, bad_requests
from client.ask import ask, send
from endpoints.base import REPOSITORY_DIR, Request, ServerError
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import DEADLINE_S, assert_ends_whole, load_together, post, run, start, wait_until
from servers.process import ServerProcess

FOLDER = REPOSITORY_DIR / "bentoml"
MONITOR = "seen"


def copied(name: str, folder: Path) -> ServerProcess:
    """Return a server, not yet entered, of a copy of the folder and its store in `folder`; it logs predictions."""
    ignored = shutil.ignore_patterns("bentos", "prometheus_multiproc_dir", "monitoring", "__pycache__")
    shutil.copytree(FOLDER, folder, ignore=ignored)
    server = start(name)
    server.endpoint.folder = folder
    environment = {**server.endpoint.environment(), "MONITOR": MONITOR}
    server.endpoint.environment = lambda: environment
    return server


@pytest.fixture(scope="module")
def tuned_server(tmp_path_factory):
    with copied("bentoml-tuned", tmp_path_factory.mktemp("tuned") / "bentoml") as server:
        yield server


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
def test_both_services_answer_alike(bentoml_server, tuned_server, body):
    (status, default), (tuned_status, tuned) = (post(each, "/predict", body) for each in (bentoml_server, tuned_server))
    assert status == tuned_status == 200
    assert default.keys() == tuned.keys()
    assert default["version"] == tuned["version"]
    assert default["prediction"] == tuned["prediction"]
    assert np.abs(np.array(default["probability"]) - np.array(tuned["probability"])).max() < 1e-12
    assert np.shape(default["probability"]) == np.shape(tuned["probability"])


def test_both_services_refuse_alike(bentoml_server, tuned_server):
    for case in bad_requests(bentoml_server.endpoint):
        replies = []
        for server in (bentoml_server, tuned_server):
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


def test_a_body_above_the_limit_is_refused(tuned_server, bentoml_server):
    body = json.dumps({"features": [GOOD_ROW] * 40_000}).encode()
    assert len(body) > 1_000_000
    for server in (tuned_server, bentoml_server):
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


def ask_batched(server: ServerProcess, rows: object) -> tuple[int, Any]:
    """Return status and reply of the batched API, asked again while it refuses with 503.

    So it refuses what it expects to wait too long for, by the time that its first runs took, as on a busy machine.
    """
    replies: list[tuple[int, Any]] = []
    wait_until(
        lambda: replies.append(post(server, "/predict_batched", {"rows": rows})) or replies[-1][0] != 503, "an answer"
    )
    return replies[-1]


def test_the_batched_api_gives_each_request_its_own_answers(tuned_server):
    rows, _ = load_test_rows()
    expected = load_expected("2")

    def ask_for(number: int) -> float:
        status, reply = ask_batched(tuned_server, rows[number : number + 2])
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
        return ask_batched(tuned_server, rows if number % 2 else [GOOD_ROW])[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask_for, range(8))) == [200, 400] * 4


def read_monitored(server: ServerProcess) -> list[dict]:
    """Return what bentoml.monitor has written so far, a record a row."""
    path = server.endpoint.folder / "monitoring" / MONITOR / "data" / "data.1.log"
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_monitors(server: ServerProcess) -> None:
    """Ask, and expect a record of features and prediction for every row."""
    rows, _ = load_test_rows()
    before = len(read_monitored(server))  # the start has asked already
    ask(server.endpoint, rows[:20], "2")
    wait_until(lambda: len(read_monitored(server)) >= before + 20, "20 records")
    records = read_monitored(server)[before:]
    assert {record["version"] for record in records} == {"v2.0.0"}
    assert [record["mean radius"] for record in records] == [row[0] for row in rows[:20]]
    answers = np.array([record["P(benign)"] for record in records])
    assert np.abs(answers - load_expected("2")[:20, 1]).max() <= TOLERANCE


def test_monitor_writes_features_and_predictions_of_every_row(tuned_server):
    assert_monitors(tuned_server)


@pytest.mark.slow
def test_the_default_service_monitors_too_and_its_worker_ends_with_it(tmp_path):
    with copied("bentoml", tmp_path / "bentoml") as server:
        assert_monitors(server)
        assert_ends_whole(server, signal.SIGTERM)


def test_nothing_is_monitored_unless_asked_for(bentoml_server):
    def sizes() -> dict:
        return {path: path.stat().st_size for path in (FOLDER / "monitoring").rglob("*")}

    before = sizes()  # a reader may have asked for it
    assert post(bentoml_server, "/predict", {"features": GOOD_ROW})[0] == 200
    assert sizes() == before


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


def test_a_client_that_leaves_within_its_body_keeps_nothing_waiting(monkeypatch):
    """BentoML waits for a reply until `traffic.timeout`, and a server that is told to end waits with it."""
    import uvicorn
    from bentoml._internal.server.http.traffic import TimeoutMiddleware

    monkeypatch.setattr(uvicorn.Config, "__init__", uvicorn.Config.__init__)  # the service sets both
    monkeypatch.setattr(uvicorn, "Server", uvicorn.Server)
    [service] = load_together(FOLDER, "service")
    received = iter([{"type": "http.request", "body": b"[", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict:
        return next(received)

    async def send(_message) -> None:
        pass

    middleware = TimeoutMiddleware(service.JsonOnly(app=None), timeout=2 * DEADLINE_S)
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    asyncio.run(asyncio.wait_for(middleware(scope, receive, send), DEADLINE_S))


@pytest.mark.slow
def test_a_corrupt_version_in_the_store_neither_starts_nor_touches_the_server_that_runs(tuned_server):
    rows, _ = load_test_rows()
    folder = tuned_server.endpoint.folder
    pickled = folder / "store" / "models" / "my_model" / "v2.0.0" / "saved_model.pkl"
    whole = pickled.read_bytes()
    pickled.write_bytes(whole[:3000])
    command = [Path(sys.executable).with_name("bentoml"), "serve", "tuned_service:svc", "--port", "0"]
    try:
        refused = run(*command, cwd=folder, env={"BENTOML_HOME": str(folder / "store")})
    finally:
        pickled.write_bytes(whole)
    assert refused.returncode != 0
    [line] = (refused.stdout + refused.stderr).splitlines()
    assert "my_model:v2.0.0 cannot be loaded" in line
    assert "run python train_and_save.py" in line
    assert np.abs(ask(tuned_server.endpoint, rows, "2") - load_expected("2")).max() <= TOLERANCE


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
            status, reply = send(port, Request("/predict", body), DEADLINE_S)
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
    """SIGTERM is how a new service.py or model is taken up without closing the port, and loses none; eight ask."""
    with start("bentoml-tuned") as server:
        worker = find_worker(server)
        outcomes = count_answers(server.endpoint.port, 1000, lambda: worker.send_signal(number), 300)
        assert not worker.is_running()
    with capsys.disabled():
        print(f"\nbentoml-tuned, {number.name} for the worker: of 1000 {dict(outcomes)}")
    assert set(outcomes) <= {"right", "lost"}, outcomes
    assert outcomes["lost"] <= (8 if number == signal.SIGKILL else 0), outcomes


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_next_ends_with_its_supervisor(tuned_server):
    """Ends the tuned server, so it is the last test that asks it."""
    worker = find_worker(tuned_server)
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: answers(tuned_server), "an answer after a worker was killed", tuned_server.process)
    assert not worker.is_running()
    assert find_worker(tuned_server) != worker
    assert_ends_whole(tuned_server, signal.SIGKILL)


def answers(server: ServerProcess) -> bool:
    with contextlib.suppress(OSError, ServerError):
        ask(server.endpoint, [GOOD_ROW], "1")
        return True
    return False
