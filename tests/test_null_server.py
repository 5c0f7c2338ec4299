"""The null server: the floor under every measurement."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from bad_requests import GOOD_ROW
from client.ask import ask, send
from endpoints.base import load_endpoints
from endpoints.null_server import BACKLOG, REPLY
from endpoints.reference import load_test_rows
from helpers import DEADLINE_S, REPOSITORY_DIR, run_python

BENCHMARKS_DIR = REPOSITORY_DIR / "benchmarks"
HEADERS = {b"content-type": b"application/json", b"content-length": b"%d" % len(REPLY)}
GET = b"GET /predict HTTP/1.1\r\nHost: here\r\n\r\n"
LAST = b"GET /predict HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
ANSWER = (200, HEADERS, REPLY)
LAST_ANSWER = (200, {**HEADERS, b"connection": b"close"}, REPLY)
REFUSAL = (400, {b"content-length": b"0", b"connection": b"close"}, b"")


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


# HTTP/1.1, byte by byte


@contextlib.contextmanager
def connect(server):
    with socket.create_connection(("127.0.0.1", server.endpoint.port), timeout=DEADLINE_S) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def split_replies(data: bytes) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    """The replies in `data`, each as status, headers and body; nothing must be left over."""
    replies = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        headers = dict(line.split(b": ") for line in lines)
        size = int(headers[b"content-length"])
        assert len(data) >= size
        replies.append((int(re.fullmatch(rb"HTTP/1\.1 (\d+) [A-Za-z ]+", status_line)[1]), headers, data[:size]))
        data = data[size:]
    return replies


def replies_to(server, *pieces: bytes) -> list[tuple]:
    """Send `pieces`, each in a segment, and return the replies until the server closes the connection."""
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        return split_replies(read_all(connection))


def test_pipelined_requests_are_each_answered(null_server):
    assert replies_to(null_server, 1000 * GET + LAST) == 1000 * [ANSWER] + [LAST_ANSWER]


def test_a_request_may_come_byte_by_byte(null_server):
    request = b"POST /any/path HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\nbody" + LAST
    pieces = [request[place : place + 1] for place in range(len(request))]
    assert replies_to(null_server, *pieces) == [ANSWER, LAST_ANSWER]


def test_a_connection_is_kept_until_its_client_asks_to_close_it(null_server):
    with connect(null_server) as connection:
        for _ in range(3):
            connection.sendall(GET)
            assert split_replies(connection.recv(1 << 16)) == [ANSWER]
        connection.sendall(LAST)
        assert split_replies(read_all(connection)) == [LAST_ANSWER]


def test_nothing_is_answered_after_the_last_request(null_server):
    assert replies_to(null_server, LAST + GET) == [LAST_ANSWER]
    assert replies_to(null_server, LAST + b"junk") == [LAST_ANSWER]


def test_http_1_0_is_closed_after_its_reply(null_server):
    assert replies_to(null_server, b"GET / HTTP/1.0\r\n\r\n") == [LAST_ANSWER]


def test_a_chunked_body_is_read_to_its_end(null_server):
    chunk = b"400\r\n" + 1024 * b"x" + b"\r\n"
    head = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert replies_to(null_server, head, *(100 * [chunk]), b"0\r\n\r\n", LAST) == [ANSWER, LAST_ANSWER]


def test_a_body_that_looks_like_a_request_is_not_one(null_server):
    head = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(GET)
    assert replies_to(null_server, head + GET + LAST) == [ANSWER, LAST_ANSWER]


def test_a_large_body_is_read_to_its_end_and_not_kept(null_server):
    process = psutil.Process(null_server.pid)
    before_bytes = process.memory_info().rss
    with connect(null_server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % (64 << 20))
        for _ in range(63):
            connection.sendall(bytes(1 << 20))
        assert process.memory_info().rss - before_bytes < 16 << 20
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):  # no answer before the body's end
            connection.recv(1)
        connection.settimeout(DEADLINE_S)
        connection.sendall(bytes(1 << 20) + LAST)
        assert split_replies(read_all(connection)) == [ANSWER, LAST_ANSWER]


def test_the_reply_to_head_has_no_body(null_server):
    with connect(null_server) as connection:
        connection.sendall(GET.replace(b"GET", b"HEAD") + LAST.replace(b"GET", b"HEAD"))
        first, second, rest = read_all(connection).split(b"\r\n\r\n")
    assert first.endswith(b"content-length: %d" % len(REPLY))
    assert second.endswith(b"content-length: %d\r\nconnection: close" % len(REPLY))
    assert rest == b""


@pytest.mark.parametrize(
    "junk",
    [
        b"junk\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: many\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n",
    ],
)
def test_junk_is_refused_and_the_connection_closed(null_server, junk):
    assert replies_to(null_server, junk) == [REFUSAL]
    assert replies_to(null_server, GET + junk) == [ANSWER, REFUSAL]


def test_another_protocol_is_not_switched_to(null_server):
    upgrade = GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert replies_to(null_server, upgrade) == [ANSWER]


def test_a_client_that_reads_no_replies_is_read_no_further(null_server):
    """Else its replies would fill the server's memory."""
    process = psutil.Process(null_server.pid)
    before_bytes = process.memory_info().rss
    requests = 1000 * GET
    with connect(null_server) as connection:
        connection.setblocking(False)
        sent_bytes = 0
        with contextlib.suppress(BlockingIOError):
            while sent_bytes < 256 << 20:
                sent_bytes += connection.send(requests[sent_bytes % len(GET) :])
        assert sent_bytes < 256 << 20
        assert process.memory_info().rss - before_bytes < 16 << 20
        connection.settimeout(DEADLINE_S)
        received = b""
        while len(received) < 100_000:  # it goes on when they are read
            received += connection.recv(1 << 16)
        assert ask(null_server.endpoint, [GOOD_ROW], "1").shape == (1, 2)


def test_64_connections_are_answered_at_once(null_server):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(null_server)) for _ in range(64)]
        for connection in connections:
            connection.sendall(GET + LAST)
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(read_all, connections))
    assert [split_replies(reply) for reply in replies] == 64 * [[ANSWER, LAST_ANSWER]]


def test_hundreds_of_connections_wait_to_be_accepted(null_server):
    """A backlog that is too short would make them wait for a second and more."""
    assert BACKLOG >= 2048
    process = psutil.Process(null_server.pid)
    process.suspend()
    try:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connect(null_server)) for _ in range(500)]
            process.resume()
            for connection in connections:
                connection.sendall(LAST)
            assert [split_replies(read_all(connection)) for connection in connections] == 500 * [[LAST_ANSWER]]
    finally:
        process.resume()


# The command


def test_a_taken_port_is_one_line(null_server):
    result = run_python("-m", "endpoints.null_server", "--port", str(null_server.endpoint.port), cwd=BENCHMARKS_DIR)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "is in use" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_asked_to_stop_is_no_failure(number):
    process = subprocess.Popen(
        [sys.executable, "-m", "endpoints.null_server", "--port", "0"],
        cwd=BENCHMARKS_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        port = int(re.search(r"serving on http://127\.0\.0\.1:(\d+), ", process.stdout.readline())[1])
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
            connection.sendall(GET)
            assert split_replies(connection.recv(1 << 16)) == [ANSWER]
            process.send_signal(number)  # while a connection is open
            errors = process.communicate(timeout=DEADLINE_S)[1]
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (0, "")
