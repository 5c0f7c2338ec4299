"""onnx/http_server.py on real sockets: behind nginx, under abuse, asked by the usual clients, and its end.

An application that echoes what it was asked runs on uvloop in a thread of this process; what is said about memory and
exit codes is said about server.py itself.
"""

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
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import uvloop

from helpers import BEFORE_IDLE_TIMEOUT_S, DEADLINE_S, needs, start, wait_until
from http_toys import GET, LATER, SMUGGLED, Echo, http_connection, http_messages, http_server
from machine.free_ports import find_free_ports
from servers.process import ServerProcess

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
MAX_GROWTH_BYTES = 100e6


# An application on real sockets


class Served:
    """An Echo that answers on a real port, from a thread."""

    def __init__(self, host: str = "127.0.0.1", **limits):
        self.echo = Echo()
        self.host = host
        self.limits = http_messages.Limits(**limits)
        self.listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self.listener.getsockname()[1]
        self.is_ready = threading.Event()
        self.thread = threading.Thread(
            target=lambda: asyncio.Runner(loop_factory=uvloop.new_event_loop).run(self.serve())
        )

    async def serve(self) -> None:
        self.loop, self.until = asyncio.get_running_loop(), asyncio.Event()
        self.server = http_server.Server(self.echo, self.limits)
        self.loop.call_soon(self.is_ready.set)
        await self.server.serve(self.listener, self.until)

    def __enter__(self) -> "Served":
        self.thread.start()
        assert self.is_ready.wait(DEADLINE_S)
        return self

    def __exit__(self, *_) -> None:
        self.end()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.until.set)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=DEADLINE_S)

    def answer_kept(self) -> int:
        """Answer what has been asked at /later, and return how many that were.

        The server's thread adds more meanwhile: each is taken from the list in one step, and none that came since.
        """
        count = len(self.echo.kept)
        for _ in range(count):
            request, reply = self.echo.kept.pop(0)
            request.later(request.answer, reply)
        return count


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with Served() as served:
        yield served


@pytest.fixture
def served(shared) -> Served:
    shared.echo.asked.clear()
    shared.echo.kept.clear()  # of clients that left
    return shared


def read_all(client: socket.socket) -> bytes:
    """Return what comes until the other side ends."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            received += part
    return bytes(received)


def read_replies(stream: bytes) -> list[tuple[int, bytes]]:
    """Return status and body of the replies in `stream`, each of which tells its length."""
    replies, place = [], 0
    while place < len(stream):
        end = stream.index(b"\r\n\r\n", place)
        head = stream[place:end]
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        assert length, head
        place = end + 4 + int(length[1])
        assert place <= len(stream), "cut off"
        replies.append((int(head.split()[1]), stream[end + 4 : place]))
    return replies


def last(target: bytes) -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def test_more_late_requests_than_can_wait_are_all_answered(served):
    count = 500
    with served.connect() as client:
        client.sendall(LATER * count)
        answered = 0
        while answered < count:
            newly = wait_until(served.answer_kept, "more requests")
            assert newly <= 2 * http_connection.MAX_UNANSWERED
            answered += newly
        client.sendall(last(b"/end"))
        replies = read_replies(read_all(client))
    assert [json.loads(body)[1] for _, body in replies] == ["/later"] * count + ["/end"]


def test_a_client_that_reads_late_gets_every_reply_in_order(served):
    """More than the system's buffers hold, so that writing and reading stop, and go on, again and again."""
    body = os.urandom(2000)
    count = 3000
    with served.connect() as client:
        heads = [
            b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (number, len(body))
            for number in range(count)
        ]
        sender = threading.Thread(
            target=lambda: client.sendall(b"".join(head + body for head in heads) + last(b"/end"))
        )
        sender.start()
        wait_until(lambda: len(served.echo.asked) > 100, "requests")
        replies = read_replies(read_all(client))
        sender.join(DEADLINE_S)
    assert [json.loads(reply)[1] for _, reply in replies] == [*(f"/{number}" for number in range(count)), "/end"]
    assert {json.loads(reply)[2] for _, reply in replies[:-1]} == {body.hex()}


def test_a_half_closed_connection_is_answered_and_closed(served):
    with served.connect() as client:
        client.sendall(GET * 3 + LATER)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: served.echo.kept, "the last request")
        served.answer_kept()
        assert [status for status, _ in read_replies(read_all(client))] == [200] * 4


def test_clients_that_leave_before_their_answer_disturb_nobody(served):
    for _ in range(20):
        with served.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
            client.sendall(LATER * 100)

    def are_gone() -> bool:
        served.answer_kept()  # a connection that is not read is not known to be lost
        return not served.server.connections

    wait_until(are_gone, "the end of all connections")
    with served.connect() as client:
        client.sendall(last(b"/end"))
        assert [status for status, _ in read_replies(read_all(client))] == [200]


def test_a_refusal_in_the_middle_of_a_body_reaches_its_client():
    """It goes on sending: were the connection closed at once, it would be reset, and the refusal lost."""
    with Served(max_connections=1) as served, served.connect() as first:
        first.sendall(GET)
        first.recv(1)
        with served.connect() as client:
            with contextlib.suppress(ConnectionError):
                for _ in range(20):
                    client.sendall(b"x" * 10_000)
            assert [status for status, _ in read_replies(read_all(client))] == [503]
    with Served() as served, served.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        for _ in range(20):
            client.sendall(b"x" * 10_000)
        assert [status for status, _ in read_replies(read_all(client))] == [400]


# A graceful end


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
    except ConnectionError:
        return True
    return False


def test_what_is_under_way_at_the_end_is_answered_and_nothing_new_is_taken(monkeypatch):
    monkeypatch.setattr(http_server, "STOP_S", DEADLINE_S)
    with Served() as served, served.connect() as late, served.connect() as half, served.connect() as idle:
        idle.sendall(GET)
        half.sendall(b"POST /half HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
        late.sendall(LATER * 3)
        wait_until(
            lambda: len(served.echo.kept) == 3 and any(each.arriving for each in list(served.server.connections)),
            "requests",
        )
        served.end()
        wait_until(lambda: refuses(served.port), "no new connections")
        assert [status for status, _ in read_replies(read_all(idle))] == [200]
        half.sendall(b"cd")
        assert [body for _, body in read_replies(read_all(half))] == [b'["POST", "/half", "61626364"]']
        served.answer_kept()
        assert [status for status, _ in read_replies(read_all(late))] == [200] * 3


def test_clients_that_do_not_read_do_not_keep_the_server_from_ending():
    with Served() as served, served.connect() as client:
        client.setblocking(False)
        body = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
        wait_until(lambda: not send_some(client, body), "a server that reads no more")
        served.end()
        served.thread.join(DEADLINE_S)
        assert not served.thread.is_alive()


def send_some(client: socket.socket, data: bytes) -> bool:
    """Send what the other side takes; return whether it takes anything."""
    try:
        return bool(client.send(data))
    except (BlockingIOError, ConnectionError):
        return False


def test_server_py_answers_what_is_under_way_at_sigterm_and_ends_with_0(tmp_path):
    port, grpc_port = find_free_ports(["rest", "grpc"]).values()
    script = f"import http_server, sys; http_server.STOP_S = {DEADLINE_S}; import server; sys.exit(server.main())"
    command = [sys.executable, "-c", script, "--port", str(port), "--grpc-port", str(grpc_port)]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=Path(http_server.__file__).parent, stdout=log, stderr=log)
        try:
            wait_until(lambda: not refuses(port), lambda: (tmp_path / "log").read_text(), while_alive=process)
            body = json.dumps({"data": [[13.82, 24.49, 0.1162, 0.1357, 0.2275]] * 10_000}).encode()
            clients = [socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) for _ in range(4)]
            for client in clients:
                head = (
                    f"POST /predict HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                client.sendall(head.encode())
            for client in clients:
                assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"  # so it is under way
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses(port), "no new connections")
            for client in clients:
                client.sendall(body)
            for client in clients:
                ((status, reply),) = read_replies(read_all(client))
                assert status == 200
                assert len(json.loads(reply)["predictions"]) == 10_000
                client.close()
            assert process.wait(DEADLINE_S) == 0
            assert (tmp_path / "log").read_text().endswith("stopped\n")
        finally:
            process.kill()
            process.wait()


# Behind nginx


@pytest.fixture(scope="module")
def nginx(shared, tmp_path_factory) -> Iterator[int]:
    """The port of an nginx before the echo, with connections to it that are kept."""
    if not NGINX:
        pytest.skip("no nginx on PATH: apt-get install nginx")
    folder = tmp_path_factory.mktemp("nginx")
    port = find_free_ports(["nginx"])["nginx"]
    paths = " ".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"""
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off; {paths}
    client_header_timeout 2s; client_body_timeout 2s; keepalive_timeout 2s;
    upstream app {{ server 127.0.0.1:{shared.port}; keepalive 4; }}
    server {{
        listen 127.0.0.1:{port}; client_max_body_size 0;
        location / {{
            proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
            proxy_request_buffering off; proxy_next_upstream off;
        }}
    }}
}}
"""
    )
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: not refuses(port), lambda: (folder / "error.log").read_text(), while_alive=process)
        yield port
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def send_through(port: int, stream: bytes) -> list[tuple[int, bytes]]:
    """Return what a client gets for these bytes until the other side ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(stream)
        return read_replies(read_all(client))


@pytest.mark.parametrize("name", SMUGGLED)
@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_nginx_and_this_server_never_see_different_requests(served, nginx, name, method):
    asked = served.echo.asked
    stream = method + b" /first HTTP/1.1\r\nHost: a\r\n" + SMUGGLED[name] + b"\r\n0\r\n\r\n" + last(b"/smuggled")
    answered = [body for status, body in send_through(nginx, stream) if status == 200]
    assert [json.loads(body)[:2] for body in answered] == [[method, target] for method, target, _ in asked]
    asked.clear()
    for number in range(3):  # on the connections that are kept
        ((status, body),) = send_through(nginx, last(b"/honest%d" % number))
        assert (status, json.loads(body)) == (200, ["GET", f"/honest{number}", ""])
    assert len(asked) == 3


@pytest.mark.parametrize("chunk_bytes", [7_000, 100_000])
def test_large_chunked_bodies_come_through_nginx_as_they_were_sent(served, nginx, chunk_bytes):
    body = os.urandom(400_000)
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part)
        for part in (body[place : place + chunk_bytes] for place in range(0, len(body), chunk_bytes))
    )
    head = b"POST /upload HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    stream = (head + b"\r\n" + chunks + b"0\r\n\r\n") * 2
    with socket.create_connection(("127.0.0.1", nginx), timeout=DEADLINE_S) as client:
        client.sendall(stream + last(b"/end"))
        wait_until(lambda: len(served.echo.asked) == 3, "three requests")
    assert served.echo.asked == [("POST", "/upload", body)] * 2 + [("GET", "/end", b"")]


def test_nginx_passes_on_a_refusal_of_a_body_and_goes_on(served, nginx):
    chunks = (b"%x\r\n" % 300_000 + b"x" * 300_000 + b"\r\n") * 5 + b"0\r\n\r\n"
    head = b"POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(3):
        ((status, _),) = send_through(nginx, head + chunks)
        assert status == 413
        ((status, _),) = send_through(nginx, last(b"/honest"))
        assert status == 200
    assert [asked[1] for asked in served.echo.asked] == ["/honest"] * 3


# Abuse of server.py, whose memory is bounded; honest clients are answered during it


@pytest.fixture(scope="module")
def abused() -> Iterator[ServerProcess]:
    with start("onnx") as server:
        yield server


def rss_bytes(server: ServerProcess) -> int:
    return psutil.Process(server.pid).memory_info().rss


def assert_honest_is_answered(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.endpoint.port, timeout=BEFORE_IDLE_TIMEOUT_S)
    connection.request("GET", "/v2/health/live")
    assert connection.getresponse().read() == b'{"live":true}'
    connection.close()


CHUNKED = b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "start_of_it", [b"GET / HTTP/1.1\r\nx: ", b"GET /", CHUNKED + b"1;a=", CHUNKED + b"1\r\na\r\n0\r\nx: "]
)
def test_what_has_no_end_is_refused_and_fills_no_memory(abused, start_of_it):
    before = rss_bytes(abused)
    with socket.create_connection(("127.0.0.1", abused.endpoint.port), timeout=BEFORE_IDLE_TIMEOUT_S) as client:
        client.sendall(start_of_it)
        with contextlib.suppress(ConnectionError):
            for _ in range(500):
                client.sendall(b"x" * 100_000)
        assert_honest_is_answered(abused)
        with contextlib.suppress(ConnectionError):
            received = client.recv(12)
            assert received in (b"HTTP/1.1 431", b"")
    assert rss_bytes(abused) - before < MAX_GROWTH_BYTES


@pytest.mark.parametrize("path", [b"/docs", b"/openapi.json"])
def test_clients_that_ask_a_thousand_times_and_never_read_fill_no_memory(abused, path):
    before = rss_bytes(abused)
    stream = (b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path) * 20_000
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(10):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", abused.endpoint.port)))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            clients.append(client)
        for _ in range(5):
            for client in clients:
                send_some(client, stream)
            assert_honest_is_answered(abused)
            assert rss_bytes(abused) - before < MAX_GROWTH_BYTES


def test_bodies_of_clients_that_leave_fill_no_memory(abused):
    before = rss_bytes(abused)
    for _ in range(300):
        with socket.create_connection(("127.0.0.1", abused.endpoint.port)) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\n\r\n" + b"[" * 900_000)
    assert_honest_is_answered(abused)
    assert rss_bytes(abused) - before < MAX_GROWTH_BYTES


def test_silent_and_trickling_clients_hold_up_nobody(abused):
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", abused.endpoint.port), timeout=DEADLINE_S))
            for _ in range(200)
        ]
        for byte in b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n":
            for client in clients[:10]:
                client.sendall(bytes([byte]))
        assert_honest_is_answered(abused)
        for client in clients[:10]:
            client.sendall(b"\r\n")
        for client in clients[:10]:
            assert client.recv(12) == b"HTTP/1.1 200"


@pytest.mark.slow
def test_silent_clients_are_closed_and_trickling_ones_refused(abused):
    """After body_timeout_s, 10 s."""
    with contextlib.ExitStack() as stack:
        silent, half, old = (
            stack.enter_context(socket.create_connection(("127.0.0.1", abused.endpoint.port), timeout=DEADLINE_S))
            for _ in range(3)
        )
        half.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n[")
        old.sendall(b"POST /predict HTTP/1.0\r\nContent-Length: 50\r\n\r\n[")
        assert read_all(silent) == b""
        assert read_all(half).startswith(b"HTTP/1.1 408")
        assert read_all(old).startswith(b"HTTP/1.1 408")


# The usual clients


@needs("curl")
@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--http2"], ("GET", "/curl", b"")),
        (["--http2", "--data-binary", "@{}"], ("POST", "/curl", b"x" * 300_000)),
        (["-T", "-"], ("PUT", "/curl", b"x" * 300_000)),
        (["-T", "-", "--http2"], ("PUT", "/curl", b"x" * 300_000)),
        (["-T", "-", "-H", "Expect:"], ("PUT", "/curl", b"x" * 300_000)),
        (
            ["-H", "Expect: 100-continue", "--expect100-timeout", "200", "--data-binary", "@{}"],
            ("POST", "/curl", b"x" * 300_000),
        ),
        (["-T", "{}", "--expect100-timeout", "200"], ("PUT", "/curl", b"x" * 300_000)),
        (["-I"], ("HEAD", "/curl", b"")),
        (["--http1.0"], ("GET", "/curl", b"")),
        (["--http1.0", "--data-binary", "@{}"], ("POST", "/curl", b"x" * 300_000)),
        (["-H", "Connection: close"], ("GET", "/curl", b"")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value[0],
)
def test_curl(served, tmp_path, options, asked):
    """Twice in one call: the second request finds the connection in step, or closed."""
    path = tmp_path / "body"
    path.write_bytes(b"x" * 300_000)
    one = [option.format(path) for option in options] + ["-sS", "-w", "%{http_code}\n", "-o", "/dev/null"]
    one.append(f"http://127.0.0.1:{served.port}/curl")
    twice = one if "-" in options else [*one, "--next", *one]
    with path.open("rb") as body:
        done = subprocess.run(["curl", *twice], stdin=body, capture_output=True, text=True, timeout=DEADLINE_S)
    times = 1 if "-" in options else 2
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["200"] * times, "")
    assert served.echo.asked == [asked] * times


def test_http_client_and_urllib_and_requests(served):
    url = f"http://127.0.0.1:{served.port}"
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=DEADLINE_S)
    for method, body in (("GET", None), ("POST", b"ab"), ("HEAD", None), ("PUT", iter([b"a", b"b"])), ("DELETE", b"")):
        connection.request(method, "/python", body, encode_chunked=False)
        reply = connection.getresponse()
        said = reply.read()
        assert said == b"" if method == "HEAD" else json.loads(said)[0] == method
        sock = connection.sock
        assert sock is not None  # kept
    connection.close()
    assert [asked[2] for asked in served.echo.asked] == [b"", b"ab", b"", b"ab", b""]
    with urllib.request.urlopen(urllib.request.Request(f"{url}/urllib", b"ab"), timeout=DEADLINE_S) as reply:
        assert json.load(reply) == ["POST", "/urllib", b"ab".hex()]
        assert reply.headers["connection"] == "close"  # as it asks
    with requests.Session() as session:
        session.trust_env = False
        for body in (b"ab", iter([b"a", b"b"]), None):
            reply = session.post(f"{url}/requests", data=body, timeout=DEADLINE_S)
            assert reply.json() == ["POST", "/requests", b"ab".hex() if body else ""]
        assert session.head(f"{url}/requests", timeout=DEADLINE_S).text == ""
        assert session.options(f"{url}/requests", timeout=DEADLINE_S).status_code == 200


def test_an_address_of_ipv6_is_served():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with Served("::1") as served:
        connection = http.client.HTTPConnection("::1", served.port, timeout=DEADLINE_S)
        connection.request("GET", "/six")  # Host: [::1]:port
        assert json.loads(connection.getresponse().read()) == ["GET", "/six", ""]
        connection.close()
