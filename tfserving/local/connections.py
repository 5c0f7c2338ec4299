"""What uvicorn lacks for unknown clients. The same file is in bentoml/ and tfserving/local/.

uvloop accepts one new connection a turn of its event loop, and a turn answers every connection that has a request.
With 500 to 1,000 of them busy and as many new ones waiting, a new user waited 7 to 10 s to be heard at all; with up
to 16 a turn 0.6 to 1.5 s (tests/test_reliability.py). Only while many are connected: a server that is not busy would
lose a tenth of its speed for clients that connect anew for each request.

uvicorn that is told to end closes the connections on which nothing happens at once, and with them the requests that
are on their way there: of 1,000 some were lost.

uvicorn sends a reply's head and its body each by themselves. A process that is killed between the two leaves a reply
that is cut, and no gateway can ask another server for the rest.

uvicorn waits for ever for a head or a body that does not come, and holds any amount of a head in memory. It drops the
body of a request that asks for another protocol, as each of Java's HttpClient does (Upgrade: h2c), and takes what
comes later for a request. Its refusals are plain text.
"""

import asyncio
import contextlib
import json
import socket
import time
from http import HTTPStatus

import httptools
import uvicorn
from uvicorn.protocols.http import httptools_impl

BUSY_CONNECTIONS = 64  # with more than these, new ones are taken together
ACCEPTS_A_TURN = 15  # beside the one that uvloop takes
HEAD_TIMEOUT_S = 10.0  # for a request's first bytes on a new connection, and for the rest of its head
BODY_TIMEOUT_S = 30.0
LEAVE_S = 0.5  # in which a server that ends still answers, one request a connection
LINGER_S = 2.0  # for a refused client to read that; closing with bytes unread would reset the connection
MAX_HEAD_BYTES = 65_536
FRAMING = (b"content-length", b"transfer-encoding")
FINAL_HEADS = tuple(b"HTTP/1.1 %d" % first for first in (2, 3, 4, 5))  # of a reply that is not 100 Continue


class Protocol(httptools_impl.HttpToolsProtocol):
    """One connection. Waits for its client have an end, an upgrade is ignored, and refusals are JSON."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.transport = Joined(transport, self.loop)
        self.wait_for("head")
        self.head_bytes = 0
        self.refusal: tuple[HTTPStatus, str] | None = None  # once the request before it is answered
        self.is_leaving = False

    def wait_for(self, part: str) -> None:
        """Begin to wait for a request's "head" or "body", or for the "end" of a refused client; "": for nothing."""
        self.awaited, self.since_s = part, time.monotonic()

    def data_received(self, data: bytes) -> None:
        if self.awaited == "end" or self.refusal:
            return
        if not self.awaited and (self.cycle is None or self.cycle.response_complete):
            self.wait_for("head")
        if self.awaited == "head":
            self.head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parse(data)
        except httptools.HttpParserError:
            self.refuse(HTTPStatus.BAD_REQUEST, "this is no valid HTTP request")
            return
        if self.awaited == "head" and self.head_bytes > MAX_HEAD_BYTES:
            self.refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the head is larger than {MAX_HEAD_BYTES} bytes")

    def parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.ignore_upgrade()
            self.parse(data[upgrade.args[0] :])

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.head_bytes = 0
        self.wait_for("body")
        if self.is_leaving:
            self.cycle.keep_alive = False

    def leave(self) -> None:
        """Answer what is under way or comes next, tell the client that it was the last, and close then."""
        self.is_leaving = True
        if self.cycle and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # httptools ends such a request after its head
        super().on_message_complete()
        self.wait_for("")

    def _should_upgrade(self) -> bool:
        return False

    def ignore_upgrade(self) -> None:
        """Go on with a request that asks for another protocol: that is ignored (RFC 9110, 7.8), its body is not.

        Another parser is told how the body is framed, and reads on.
        """
        framing = [name + b": " + value for name, value in self.headers if name in FRAMING]
        resumed = Resumed(self)
        self.parser = httptools.HttpRequestParser(resumed)
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", b""]))
        resumed.has_begun = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.refusal:
            self.refuse(*self.refusal)

    def check_time(self) -> None:
        """End a wait for the client that has taken too long."""
        if self.flow.read_paused:  # it is the client that waits
            self.wait_for(self.awaited)
        limit_s = {"head": HEAD_TIMEOUT_S, "body": BODY_TIMEOUT_S, "end": LINGER_S}.get(self.awaited)
        if limit_s is None or time.monotonic() - self.since_s <= limit_s:
            return
        if self.awaited == "end" or (self.awaited == "head" and not self.head_bytes):
            self.transport.close()
        else:
            self.refuse(HTTPStatus.REQUEST_TIMEOUT, f"the {self.awaited} did not arrive within {limit_s:g} s")

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer with an error, after the reply that is due, and close once the client has."""
        if self.awaited == "body" and self.cycle.response_started:  # it has its answer
            self.transport.close()
            return
        if self.awaited != "body" and self.cycle and not self.cycle.response_complete:
            self.refusal = status, message
            self.wait_for("")
            return
        body = json.dumps({"error": message}).encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.wait_for("end")
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.transport.resume_reading()
        else:  # TLS
            self.transport.close()


class Joined:
    """A transport that sends a reply's head with what follows it in the same turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self.transport, self.loop, self.head = transport, loop, b""

    def __getattr__(self, name: str):
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if self.head:
            data, self.head = self.head + data, b""
        elif data.startswith(FINAL_HEADS) and data.endswith(b"\r\n\r\n"):
            self.head = data
            self.loop.call_soon(self.flush)
            return
        self.transport.write(data)

    def flush(self) -> None:
        if self.head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self.transport.close()


class Resumed:
    """What httptools calls for a request whose head is known: see Protocol.ignore_upgrade."""

    def __init__(self, protocol: Protocol):
        self.protocol, self.has_begun = protocol, False

    def __getattr__(self, name: str):
        method = getattr(self.protocol, name)  # AttributeError: httptools does not call it
        if name in ("on_body", "on_message_complete"):
            return method
        return lambda *arguments: method(*arguments) if self.has_begun else None


async def refuse_connection(_scope, receive, send) -> None:
    """Answer a client beyond `limit_concurrency`, and let it send the rest of its body before it is closed; ASGI."""
    body = b'{"error": "too many connections; try again"}'
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})  # all of it; only then it is closed
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body"})


httptools_impl.service_unavailable = refuse_connection


class Server(uvicorn.Server):
    """Serves like uvicorn.Server; asked to serve without `sockets`, just like it."""

    listeners: tuple[socket.socket, ...] = ()
    watched: tuple[socket.socket, ...] = ()

    def __init__(self, config: uvicorn.Config):
        config.http = Protocol
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting: set[asyncio.Task] = set()
        # Duplicates, because uvloop watches the sockets themselves; non-blocking, because both share that flag.
        self.listeners = tuple(listener.dup() for listener in sockets or ())
        for listener in self.listeners:
            listener.setblocking(False)

    async def on_tick(self, counter: int) -> bool:
        """Watch the listeners, or stop watching them, and look at the clients; uvicorn calls this every 0.1 s."""
        connections = self.server_state.connections
        self.watch(self.listeners if len(connections) > BUSY_CONNECTIONS else ())
        if counter % 10 == 0:
            for connection in list(connections):
                connection.check_time()
        return await super().on_tick(counter)

    def watch(self, listeners: tuple[socket.socket, ...]) -> None:
        """Accept from `listeners`, and from no other, beside what uvloop does."""
        loop = asyncio.get_running_loop()
        for listener in set(self.watched) - set(listeners):
            loop.remove_reader(listener)
        for listener in set(listeners) - set(self.watched):
            loop.add_reader(listener, self.accept, listener)
        self.watched = listeners

    def accept(self, listener: socket.socket) -> None:
        """Take up to ACCEPTS_A_TURN of the connections that wait at `listener`."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # mostly BlockingIOError: none is left
            for _ in range(ACCEPTS_A_TURN):
                connection, _ = listener.accept()
                task = loop.create_task(loop.connect_accepted_socket(self.make_protocol, connection))
                self.accepting.add(task)  # the event loop itself does not keep it
                task.add_done_callback(self.accepting.discard)

    def make_protocol(self) -> asyncio.Protocol:
        """What uvicorn's startup makes for each connection."""
        return self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End as uvicorn does. It closes the connections that it has; one that came after that would hold it up."""
        self.watch(())
        for listener in (*self.listeners, *self.servers, *(sockets or ())):
            listener.close()
        await asyncio.gather(*self.accepting, return_exceptions=True)
        for connection in self.server_state.connections:
            connection.leave()
        ends_s = time.monotonic() + LEAVE_S
        while self.server_state.connections and not self.force_exit and time.monotonic() < ends_s:  # noqa: ASYNC110
            await asyncio.sleep(LEAVE_S / 20)
        await super().shutdown(sockets)
