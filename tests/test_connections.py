"""What uvicorn lacks for unknown clients: connections.py of two folders, on a real event loop."""

import asyncio
import json
import re
import socket
from types import ModuleType, SimpleNamespace

import pytest
import uvicorn
import uvloop

from endpoints.base import REPOSITORY_DIR
from helpers import DEADLINE_S, load_script

COPIES = [REPOSITORY_DIR / folder / "connections.py" for folder in ("bentoml", "tfserving/local")]
NEW = 60
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def connections():
    return load_script(COPIES[1])


async def application(_scope, _receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def connect(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=DEADLINE_S)


def with_ticks(server_class: type[uvicorn.Server]) -> type[uvicorn.Server]:
    """Return a subclass that sets `ticked` whenever uvicorn has looked around, which it does every 0.1 s."""

    class Server(server_class):
        ticked = asyncio.Event()

        async def on_tick(self, counter: int) -> bool:
            should_end = await super().on_tick(counter)
            self.ticked.set()
            return should_end

    return Server


def turns_until_accepted(server_class: type[uvicorn.Server], connected: int) -> int:
    """Return the turns of the event loop that NEW connections take to be accepted while `connected` are there.

    Every connection, old and new, gets its answer, and afterwards the server ends and no longer listens.
    """

    async def run() -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        server = with_ticks(server_class)(
            uvicorn.Config(application, http="httptools", lifespan="off", log_level="error")
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        clients = []
        for number in (connected, NEW):
            clients += [connect(address) for _ in range(number)]
            turns = 0
            while len(server.server_state.connections) < len(clients):
                await asyncio.sleep(0)
                turns += 1
            server.ticked.clear()
            await server.ticked.wait()  # now it knows how many are connected
        for client in clients:
            client.sendall(REQUEST)
            reply = await asyncio.to_thread(client.recv, 1000)
            assert reply.startswith(b"HTTP/1.1 200"), reply
        server.should_exit = True
        await asyncio.wait_for(serving, DEADLINE_S)
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        for client in clients:
            client.close()
        return turns

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def test_a_busy_server_takes_new_connections_together(connections):
    assert turns_until_accepted(uvicorn.Server, 100) >= NEW  # why connections.py is there
    assert turns_until_accepted(connections.Server, 100) <= NEW / 5


def test_a_server_that_is_not_busy_accepts_as_uvicorn_does(connections, monkeypatch):
    taken = []
    monkeypatch.setattr(connections.Server, "accept", lambda _, listener: taken.append(listener))
    turns_until_accepted(connections.Server, connections.BUSY_CONNECTIONS - NEW)
    assert not taken


def test_connections_accepted_in_the_last_turn_do_not_hold_up_the_end(connections):
    class EndsAtOnce(with_ticks(connections.Server)):
        late = False

        async def on_tick(self, counter: int) -> bool:
            if self.late:
                self.accept(self.listeners[0])
            return self.late or await super().on_tick(counter)

    async def run() -> list[bytes]:
        listener = socket.create_server(("127.0.0.1", 0))
        server = EndsAtOnce(uvicorn.Config(application, http="httptools", lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.ticked.wait()
        # No turn of the loop between these, so that it is accept() that takes them.
        clients = [connect(listener.getsockname()) for _ in range(10)]
        server.late = True
        await asyncio.wait_for(serving, DEADLINE_S)
        return [await asyncio.to_thread(client.recv, 1) for client in clients]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == [b""] * 10


class Client:
    """Sends to a server in this process, whose clock stands until `wait_too_long`."""

    def __init__(self, connections: ModuleType, monkeypatch: pytest.MonkeyPatch):
        self.now_s = self.sent_bytes = self.received_bytes = self.looks = 0
        self.news, self.release = asyncio.Event(), asyncio.Event()
        client = self

        class Protocol(connections.Protocol):
            def data_received(self, data: bytes) -> None:
                super().data_received(data)
                client.received_bytes += len(data)
                client.news.set()

            def check_time(self) -> None:
                super().check_time()
                client.looks += 1
                client.news.set()

        monkeypatch.setattr(connections, "Protocol", Protocol)
        monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    async def open(self, address: tuple[str, int]) -> None:
        self.reader, self.writer = await asyncio.open_connection(*address)

    async def send(self, data: bytes) -> None:
        """Send, and wait until the server has read it."""
        self.writer.write(data)
        self.sent_bytes += len(data)
        while self.received_bytes < self.sent_bytes:
            self.news.clear()
            await self.news.wait()

    def wait_too_long(self) -> None:
        self.now_s += 1000
        self.looks = 0

    async def looked_at(self, times: int) -> None:
        """Wait until the server has looked so often at how long this takes."""
        while self.looks < times:
            self.news.clear()
            await self.news.wait()


@pytest.fixture
def talk(connections, monkeypatch):
    """A function that sends these parts, each once the server has read the last, and returns all that comes back.

    Then it asks to close the connection, or waits too long; with `releases` the application then answers what is slow,
    and these bytes are sent before it asks. The application answers with what it got.
    """
    client = Client(connections, monkeypatch)

    async def echo(scope, receive, send) -> None:
        if scope["path"] == "/refused":
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        if scope["path"] == "/slow":
            await client.release.wait()
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        body = f"{scope['method']} {scope['path']} {body.decode()}".encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def exchange(listener: socket.socket, parts: tuple[bytes, ...], waits: bool, releases: bytes) -> bytes:
        await client.open(listener.getsockname())
        for part in parts:
            await client.send(part)
        if waits:
            client.wait_too_long()
        if releases:
            await client.looked_at(1)
            client.release.set()
            client.writer.write(releases)
        if releases or not waits:
            client.writer.write(b"GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        replies = await client.reader.read()
        client.writer.close()
        return replies

    async def serve(parts: tuple[bytes, ...], limit: int | None, **turns) -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        server = connections.Server(uvicorn.Config(echo, lifespan="off", log_level="error", limit_concurrency=limit))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            return await asyncio.wait_for(exchange(listener, parts, **turns), DEADLINE_S)
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, DEADLINE_S)

    def run(*parts: bytes, waits: bool = False, releases: bytes = b"", limit: int | None = None) -> bytes:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(parts, limit, waits=waits, releases=releases))

    return run


def post(headers: bytes, body: bytes = b"hello") -> bytes:
    return b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%s\r\n\r\n%s" % (len(body), headers, body)


UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB",
    "websocket": b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13",
    "tls": b"Connection: upgrade\r\nUpgrade: TLS/1.2",
}


@pytest.mark.parametrize("name", UPGRADES)
@pytest.mark.parametrize("cut", [None, 40, -5, -3], ids=["whole", "in the head", "before the body", "in the body"])
def test_an_upgrade_is_ignored_and_the_body_read(talk, name, cut):
    request = post(UPGRADES[name])
    parts = [request] if cut is None else [request[:cut], request[cut:]]
    replies = talk(*parts, post(b"X: y", b"second"))
    assert replies.count(b"HTTP/1.1 200") == 3
    assert replies.index(b"POST /a hello") < replies.index(b"POST /a second") < replies.index(b"GET /end")


def test_an_upgrade_with_a_chunked_body_or_none(talk):
    head = b"%s /a HTTP/1.1\r\nHost: a\r\n" + UPGRADES["h2c"] + b"\r\n"
    chunked = head % b"POST" + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    replies = talk(chunked, head % b"GET" + b"\r\n")
    assert b"POST /a abc" in replies
    assert replies.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    "sent",
    [b"POST /a HT", b"POST /a HTTP/1.1\r\nHost: a\r\nX-Y", post(b"X: y")[:-1], b"\r\n", post(UPGRADES["h2c"])[:-1]],
    ids=["line", "head", "body", "newline", "upgrade"],
)
def test_a_wait_for_a_client_ends_with_408(talk, sent):
    head, _, body = talk(sent, waits=True).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"application/json" in head
    assert re.fullmatch(r"the (head|body) did not arrive within \d\d s", json.loads(body)["error"])


def test_a_client_that_says_nothing_is_let_go(talk):
    assert talk(waits=True) == b""


def test_a_wait_in_a_later_request_of_a_connection_ends_too(talk):
    replies = talk(post(b"X: y"), post(b"X: y")[:-1], waits=True)
    assert replies.count(b"HTTP/1.1 200") == 1
    assert b"HTTP/1.1 408" in replies


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12_000, 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    ],
    ids=["garbage", "connect", "address", "head", "no host", "two hosts", "no such host"],
)
def test_what_is_refused_is_refused_in_json(talk, sent, status):
    head, _, body = talk(sent).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]


@pytest.mark.parametrize("rest", [b"", b"no chunk\r\n"], ids=["late", "wrong"])
def test_a_request_that_has_its_answer_gets_no_second_one(talk, rest):
    head = b"POST /refused HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    replies = talk(head, *[rest] * bool(rest), waits=True)
    assert replies.count(b"HTTP/1.1 ") == 1
    assert b"HTTP/1.1 413" in replies


def test_a_request_behind_a_slow_one_is_not_waited_for_while_nothing_is_read(talk):
    """The server reads no more of the second before the first is answered."""
    slow = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
    replies = talk(slow + post(b"X: y")[:-1], waits=True, releases=post(b"X: y")[-1:])
    assert replies.count(b"HTTP/1.1 200") == 3
    assert replies.index(b"GET /slow") < replies.index(b"POST /a hello") < replies.index(b"GET /end")


def test_what_is_refused_is_refused_after_the_reply_that_is_due(talk):
    replies = talk(post(b"X: y") + b"GARBAGE\r\n\r\n")
    assert replies.index(b"HTTP/1.1 200") < replies.index(b"HTTP/1.1 400")


def test_connections_beyond_the_limit_are_refused_in_json(talk):
    head, _, body = talk(post(b"X: y"), limit=1, waits=True).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert json.loads(body)["error"].startswith("too many connections")


def test_a_client_beyond_the_limit_can_send_its_body_and_read_the_refusal(connections):
    """Closing with bytes unread would reset the connection: the client could send no more, and lose the reply."""
    body = bytes(8_000_000)  # more than the sockets' buffers hold

    def send(address: tuple[str, int]) -> bytes:
        with connect(address) as client:
            client.sendall(post(b"X: y", body))
            return client.makefile("rb").read()

    async def run() -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(application, lifespan="off", log_level="error", limit_concurrency=1)
        server = connections.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            return await asyncio.to_thread(send, listener.getsockname())
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, DEADLINE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        reply = runner.run(run())
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert reply.count(b"too many connections") == 1


def test_a_request_that_comes_while_the_server_ends_is_answered_and_the_connection_then_closed(connections):
    class Ends(connections.Server):
        is_ending = asyncio.Event()

        async def shutdown(self, sockets=None) -> None:
            self.is_ending.set()
            await super().shutdown(sockets)

    async def run() -> tuple[bytes, bytes]:
        listener = socket.create_server(("127.0.0.1", 0))
        server = Ends(uvicorn.Config(application, lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(REQUEST)
        first = await reader.readuntil(b"ok")
        server.should_exit = True
        await server.is_ending.wait()
        writer.write(REQUEST)
        last = await reader.read()
        await asyncio.wait_for(serving, DEADLINE_S)
        return first, last

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        first, last = runner.run(run())
    assert b"connection: close" not in first
    assert last.startswith(b"HTTP/1.1 200 ") and last.count(b"HTTP/1.1") == 1
    assert b"connection: close\r\n" in last


def test_the_copies_are_the_same():
    assert len({path.read_bytes() for path in COPIES}) == 1
