"""Make uvicorn safe for unknown clients. bentoml/ and tfserving/local/ hold the same file.

Accepting: uvloop accepts one new connection a turn of its event loop, and a turn answers every connection that has a
request. With 500 to 1,000 busy connections and as many new ones waiting, a new user waited 7 to 10 s to be accepted;
with up to 16 a turn 0.6 to 1.5 s (tests/test_reliability.py). This is on only while many are connected: otherwise it
costs a tenth of the speed for clients that open a connection for each request.

Ending: uvicorn closes idle connections at once, and loses the requests that are on their way there, a few of 1,000.

Replies: uvicorn sends a reply's head and body separately. A process that is killed between the two leaves half a
reply, and no gateway can ask another server for the rest.

Requests: uvicorn waits without limit for the rest of a head or body, and keeps any amount of a head in memory. It drops
the body of a request that asks for another protocol, as each of Java's HttpClient does (Upgrade: h2c), and then reads
that body as a request. It answers a request without the header Host, or with two. Its refusals are plain text.
"""

import asyncio
import contextlib
import json
import re
import socket
import time
from http import HTTPStatus

import httptools
import uvicorn
from uvicorn.protocols.http import httptools_impl

BUSY_CONNECTIONS = 64  # with more than these, several new ones are accepted a turn
ACCEPTS_A_TURN = 15  # in addition to uvloop's one
HEAD_TIMEOUT_S = 10.0  # for a request's first bytes on a new connection, and for the rest of its head
BODY_TIMEOUT_S = 30.0
LEAVE_S = 0.5  # for which an ending server still answers, one request a connection
LINGER_S = 2.0  # for a refused client to read the reply; closing with unread bytes would reset the connection
MAX_HEAD_BYTES = 65_536
FRAMING = (b"content-length", b"transfer-encoding")
HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
FINAL_HEADS = tuple(b"HTTP/1.1 %d" % first for first in (2, 3, 4, 5))  # of a reply that is not 100 Continue


class Protocol(httptools_impl.HttpToolsProtocol):
    """One connection, with limits for the client's pauses, upgrades ignored, and refusals as JSON."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.transport = Joined(transport, self.loop)
        self.wait_for("head")
        self.head_bytes = 0
        self.refusal: tuple[HTTPStatus, str] | None = None  # sent when the request before it is answered
        self.is_leaving = False

    def wait_for(self, part: str) -> None:
        """Start to wait for a request's "head" or "body", or for a refused client's "end"; "" ends the wait."""
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
        hosts = [value for name, value in self.headers if name == b"host"]
        if self.parser.get_http_version() == "1.1" and not (len(hosts) == 1 and HOST.fullmatch(hosts[0])):
            raise ValueError("HTTP/1.1 needs one valid header Host (RFC 9112, 3.2)")  # ends feed_data
        super().on_headers_complete()
        self.head_bytes = 0
        self.wait_for("body")
        if self.is_leaving:
            self.cycle.keep_alive = False

    def leave(self) -> None:
        """Answer the present or next request, announce that it is the last one, and close the connection."""
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
        """Continue a request that asks for another protocol: the wish is ignored (RFC 9110, 7.8), the body is read.

        A new parser gets the headers that frame the body, and reads it.
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
        """End a wait for the client that has lasted too long."""
        if self.flow.read_paused:  # the client waits for us
            self.wait_for(self.awaited)
        limit_s = {"head": HEAD_TIMEOUT_S, "body": BODY_TIMEOUT_S, "end": LINGER_S}.get(self.awaited)
        if limit_s is None or time.monotonic() - self.since_s <= limit_s:
            return
        if self.awaited == "end" or (self.awaited == "head" and not self.head_bytes):
            self.transport.close()
        else:
            self.refuse(HTTPStatus.REQUEST_TIMEOUT, f"the {self.awaited} did not arrive within {limit_s:g} s")

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer with an error, after any reply that is due, and close when the client has closed."""
        if self.awaited == "body" and self.cycle.response_started:  # the client has its answer
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
    """A transport that sends a reply's head together with the data that follow in the same turn of the event loop."""

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
    """The callbacks of httptools for a request whose head is known, see Protocol.ignore_upgrade."""

    def __init__(self, protocol: Protocol):
        self.protocol, self.has_begun = protocol, False

    def __getattr__(self, name: str):
        method = getattr(self.protocol, name)  # on AttributeError httptools does not call it
        if name in ("on_body", "on_message_complete"):
            return method
        return lambda *arguments: method(*arguments) if self.has_begun else None


async def refuse_connection(_scope, receive, send) -> None:
    """Refuse a client beyond `limit_concurrency`, and read the rest of its body before closing; ASGI."""
    body = b'{"error": "too many connections; try again"}'
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})  # whole; closed only later
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body"})


httptools_impl.service_unavailable = refuse_connection


class Server(uvicorn.Server):
    """A uvicorn.Server with the changes above; without `sockets` it accepts like uvicorn's."""

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
        """Start or stop watching the listeners, and check the clients' time; uvicorn calls this every 0.1 s."""
        connections = self.server_state.connections
        self.watch(self.listeners if len(connections) > BUSY_CONNECTIONS else ())
        if counter % 10 == 0:
            for connection in list(connections):
                connection.check_time()
        return await super().on_tick(counter)

    def watch(self, listeners: tuple[socket.socket, ...]) -> None:
        """Accept from exactly these `listeners`, in addition to uvloop."""
        loop = asyncio.get_running_loop()
        for listener in set(self.watched) - set(listeners):
            loop.remove_reader(listener)
        for listener in set(listeners) - set(self.watched):
            loop.add_reader(listener, self.accept, listener)
        self.watched = listeners

    def accept(self, listener: socket.socket) -> None:
        """Accept up to ACCEPTS_A_TURN of the connections that wait at `listener`."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # mostly BlockingIOError: none is waiting
            for _ in range(ACCEPTS_A_TURN):
                connection, _ = listener.accept()
                task = loop.create_task(loop.connect_accepted_socket(self.make_protocol, connection))
                self.accepting.add(task)  # the event loop itself does not keep it
                task.add_done_callback(self.accepting.discard)

    def make_protocol(self) -> asyncio.Protocol:
        """Return the protocol that uvicorn's startup makes for each connection."""
        return self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let each connection get its last answer, then end as uvicorn does."""
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
