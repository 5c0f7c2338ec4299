"""HTTP/1.1 (RFC 9110, 9112) for answers that take microseconds: connections, framing, limits, and their end.

httptools' parser finds the end of a request; uvloop moves the bytes. When the head has arrived, the application
returns a `Route`; when the body has arrived, the route handles the request, at once or later and in any thread. Replies
leave in the order of their requests. There is no ASGI layer: its messages, a task and two coroutines per request cost
27 µs on a machine where all of this takes 5.
"""

import asyncio
import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import httptools
from http_messages import Head, Refusal, Request

MAX_HEAD_BYTES = 65_536  # of a head, of a chunk's extension, of trailers
MAX_KNOWN_BYTES = 2048  # larger heads are not cached
MAX_UNANSWERED = 64  # requests of one connection: above it reading stops until half are answered
LINGER_S = 2.0  # reading goes on for this long after a reply that closes, so that the client can read the reply
KEPT_HEADERS = frozenset(
    b"host connection content-length content-type content-encoding transfer-encoding expect "
    b"inference-header-content-length".split()
)


class Connection(asyncio.Protocol):
    """One connection; httptools calls the methods on_…"""

    transport: asyncio.Transport
    has_served = owes_continue = is_parsing = False
    is_ending = False  # nothing more is read
    is_stuck = is_full = False  # reading is paused: the client does not read its replies, or too many are due

    def __init__(self, server: Any):
        self.server = server
        self.parser = httptools.HttpRequestParser(self)
        self.head: Head | None = None  # while it arrives
        self.arriving: Request | None = None  # while its body does
        self.unanswered: collections.deque[Request] = collections.deque()
        self.unread = b""  # bytes not parsed yet
        self.completed: list[Head] = []  # by the bytes that are being parsed
        self.unclear_bytes = 0  # of an unfinished head, chunk extension or trailers
        self.since_s = server.now_s  # of the current phase: idle, head, body, or a client that does not read

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.server.connections.add(self)
        if len(self.server.connections) > self.server.limits.max_connections:
            self.refuse_rest(Refusal(503, "too many connections: try again", "retry-after: 1\r\n", closes=True))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_ending = True
        self.unanswered.clear()
        self.server.connections.discard(self)
        self.parser = self.arriving = None  # else the cycle, and a body, would live until garbage collection

    def data_received(self, data: bytes) -> None:
        if self.is_ending:
            return
        end = 0
        if self.head is None and self.arriving is None and not self.unanswered:
            end = data.find(b"\r\n\r\n") + 4  # of a new head, usually complete and equal to an earlier one
            head = self.server.known_heads.get(data[:end])
            if head is not None and len(data) - end == head.length:
                request = self.begin(head)
                request.body = data[end:]
                self.serve(request)
                return
        self.unread += data
        self.parse()
        if 4 <= end <= MAX_KNOWN_BYTES and len(self.completed) == 1:  # else it was cut, or more bytes followed
            head = self.completed[0]
            if head.is_plain and len(data) - end == head.length:
                self.server.remember(data[:end], head)
        self.completed.clear()

    def parse(self) -> None:
        """Parse the bytes that have arrived, one request at a time, until too many replies are due or unread."""
        data, place, self.is_parsing, self.completed = self.unread, 0, True, []
        while place < len(data) and not (self.is_stuck or self.is_full or self.is_ending):
            body_bytes = self.arriving.head.length - self.arriving.size if self.arriving else 0  # if announced
            end = place + body_bytes if body_bytes > 0 else data.find(b"\r\n\r\n", place) + 4
            piece = memoryview(data)[place : end if end > place else None]
            self.unclear_bytes += len(piece)
            try:
                place += self.feed(piece)
            except httptools.HttpParserError as error:
                self.refuse_rest(Refusal(400, f"this is not HTTP/1.1: {error}", closes=True))
            if self.unclear_bytes > MAX_HEAD_BYTES and (self.head or self.arriving):
                self.refuse_rest(Refusal(431, f"more than {MAX_HEAD_BYTES} bytes of headers", closes=True))
            self.is_full = len(self.unanswered) > MAX_UNANSWERED
        self.unread, self.is_parsing = data[place:], False
        (self.transport.pause_reading if self.is_stuck or self.is_full else self.transport.resume_reading)()

    def feed(self, piece: memoryview) -> int:
        """Return the number of bytes parsed of `piece`: all, except after a head that asks for another protocol."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self.ignore_upgrade()
            return upgrade.args[0]
        return len(piece)

    def eof_received(self) -> bool:
        """Handle the end of the client's data; it may still read its replies."""
        if self.arriving is not None and self.arriving.reply is None:
            self.unanswered.pop()  # it will never be complete
        self.arriving = self.head = None
        if not self.unanswered:
            return False
        self.unanswered[-1].keeps_alive, self.is_ending = False, True
        return True

    def pause_writing(self) -> None:
        self.is_stuck, self.since_s = True, self.server.now_s
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.is_stuck, self.since_s = False, self.server.now_s
        if not self.is_parsing:
            self.parse()

    # Called by the parser

    def on_message_begin(self) -> None:
        if self.is_ending:
            raise ConnectionError("what follows the last request is not read")  # ends feed_data
        self.head = Head()
        self.since_s = self.server.now_s

    def on_url(self, part: bytes) -> None:
        self.head.target += part.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if self.head is not None and name in KEPT_HEADERS:  # no head: trailers, which are ignored
            headers = self.head.headers
            headers[name] = value if name not in headers else headers[name] + b", " + value

    def on_headers_complete(self) -> None:
        head, self.head, self.unclear_bytes = self.head, None, 0
        request = self.arriving = self.begin(head)
        request.parts, request.size = [], 0
        try:
            head.check(self.parser)
            request.keeps_alive = head.keeps_alive
            head.route, head.routes = self.server.application.find(head), self.server.application.routes
            if head.length > self.server.limits.max_body_bytes:
                raise self.server.too_large()
        except Exception as error:  # noqa: BLE001 - see `serve`
            request.keeps_alive = head.keeps_alive and not head.expects  # else it may or may not send the body
            head.is_plain = False
            request.fail(error)
            self.is_ending = not request.keeps_alive
        self.owes_continue = head.expects and request.reply is None
        if self.owes_continue and self.unanswered[0] is request:
            self.send_continue()

    def on_body(self, part: bytes) -> None:
        self.unclear_bytes = 0
        request = self.arriving
        request.size += len(part)
        if request.reply is None:  # else it is refused and read to its end, so that the connection stays usable
            request.parts.append(part)
            if request.size > self.server.limits.max_body_bytes:
                request.parts.clear()
                request.refuse(self.server.too_large())

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # httptools ends such a request after its head; see ignore_upgrade
        request, self.arriving = self.arriving, None
        self.unclear_bytes, self.since_s = 0, self.server.now_s
        self.completed.append(request.head)
        self.is_ending = not request.keeps_alive
        if request.reply is None:
            request.body = b"".join(request.parts)
            self.serve(request)

    # Shared

    def begin(self, head: Head) -> Request:
        request = Request(self, head)
        request.started_s = time.perf_counter()
        self.since_s = self.server.now_s
        self.unanswered.append(request)
        return request

    def serve(self, request: Request) -> None:
        """Have a complete request answered, or its error sent."""
        try:
            head, application = request.head, self.server.application
            if head.routes is not application.routes:
                head.route, head.routes = application.find(head), application.routes
            request.route = head.route
            request.route.handle(request)
        except Exception as error:  # noqa: BLE001 - any error is the answer to this request only
            request.fail(error)

    def send_continue(self) -> None:
        self.owes_continue = False
        if self.arriving.reply is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def ignore_upgrade(self) -> None:
        """Continue with a request that asks for another protocol: the wish is ignored (RFC 9110, 7.8), the body is not.

        A new parser gets the framing of the body, and reads on.
        """
        request = self.arriving
        if self.is_ending or request is None:
            return
        headers = request.head.headers
        framing = [
            name + b": " + headers[name] for name in (b"content-length", b"transfer-encoding") if name in headers
        ]
        framing += [] if request.keeps_alive else [b"connection: close"]
        resumed = _Resumed(self)
        self.parser = httptools.HttpRequestParser(resumed)
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", b""]))
        resumed.has_begun = True

    def flush(self) -> None:
        """Send the available replies, in the order of their requests."""
        unanswered = self.unanswered
        while unanswered and unanswered[0].reply is not None:
            request = unanswered.popleft()
            self.transport.write(request.reply)
            if not request.keeps_alive:
                self.end(lingers=request is self.arriving)
                return
        self.has_served, self.since_s = True, self.server.now_s
        if self.owes_continue and unanswered and unanswered[0] is self.arriving:
            self.send_continue()
        if self.is_full and len(unanswered) <= MAX_UNANSWERED // 2:
            self.is_full = False
            self.parse()

    def refuse_rest(self, refusal: Refusal) -> None:
        """Send `refusal` after the replies that are due, and read nothing more."""
        if self.is_ending:
            return
        request = self.arriving or self.begin(Head())
        self.arriving, self.head, self.is_ending = request, None, True
        request.keeps_alive = False
        if request.reply is None:
            request.refuse(refusal)
        elif not self.unanswered:  # it has been refused
            self.end(lingers=True)

    def end(self, lingers: bool) -> None:
        """Close after everything written is sent; `lingers`: the client may still be sending."""
        self.is_ending, self.since_s = True, self.server.now_s
        self.unanswered.clear()
        if lingers and self.transport.can_write_eof():
            self.transport.write_eof()  # closing with unread bytes would reset the connection and lose the reply
            self.transport.resume_reading()
        else:
            self.transport.close()

    def check_time(self) -> None:
        """End a wait for this client that has taken too long."""
        limits, waited_s = self.server.limits, self.server.now_s - self.since_s
        if self.transport.get_write_buffer_size():
            if waited_s > limits.write_timeout_s:
                self.transport.abort()
        elif self.is_ending:
            if waited_s > LINGER_S and not self.unanswered:
                self.transport.abort()
        elif self.is_full or (self.owes_continue and self.arriving):
            return  # the client waits for this server
        elif self.head is not None:
            if waited_s > limits.head_timeout_s:
                late = f"the head did not arrive within {limits.head_timeout_s:g} s"
                self.refuse_rest(Refusal(408, late, closes=True))
        elif self.arriving is not None:
            if waited_s > limits.body_timeout_s:
                late = f"the body did not arrive within {limits.body_timeout_s:g} s"
                self.refuse_rest(Refusal(408, late, closes=True))
        elif not self.unanswered and waited_s > (limits.idle_timeout_s if self.has_served else limits.head_timeout_s):
            self.end(lingers=False)


class _Resumed:
    """The httptools callbacks for a request whose head is known: see Connection.ignore_upgrade."""

    def __init__(self, connection: Connection):
        self.has_begun = False
        self.on_body, self.on_message_complete = connection.on_body, connection.on_message_complete
        for name in ("on_message_begin", "on_url", "on_header", "on_headers_complete"):
            setattr(self, name, functools.partial(self.forward, getattr(connection, name)))

    def forward(self, method: Callable, *arguments: bytes) -> None:
        if self.has_begun:
            method(*arguments)
